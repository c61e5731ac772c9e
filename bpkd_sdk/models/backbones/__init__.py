"""The backbones of the zoo: image (N, 3, H, W) -> one feature map per stage, finest first."""

from __future__ import annotations

from bpkd_sdk.models.backbones.base import Backbone
from bpkd_sdk.models.backbones.hrnet import HRNet
from bpkd_sdk.models.backbones.mobilenet_v2 import MobileNetV2
from bpkd_sdk.models.backbones.resnet import ResNet

__all__ = ["Backbone", "HRNet", "MobileNetV2", "ResNet"]
