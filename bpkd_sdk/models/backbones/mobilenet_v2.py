"""MobileNetV2 at output stride 8, without its last 1280-channel convolution."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from bpkd_sdk.models.backbones.base import Backbone
from bpkd_sdk.models.blocks import ConvBN

CHANNELS = (32, 16, 24, 32, 64, 96, 160, 320)
BLOCKS = (1, 2, 3, 4, 3, 3, 1)
STRIDES = (1, 2, 2, 1, 1, 1, 1)
DILATIONS = (1, 1, 1, 2, 2, 4, 4)
FEATURE_STAGES = (2, 3, 5, 7)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter by depthwise 3x3, project by 1x1. (N, C, H, W) -> (N, out_channels, H', W')."""

    def __init__(self, in_channels: int, out_channels: int, expand: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        hidden = in_channels * expand
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *([ConvBN(in_channels, hidden, activation=nn.ReLU6)] if expand > 1 else []),
            ConvBN(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden, activation=nn.ReLU6),
            ConvBN(hidden, out_channels, activation=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Residual where the shape is kept."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(Backbone):
    """MobileNetV2 of width 1 with strides 4, 8, 8, 8."""

    out_channels = (24, 32, 96, 320)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvBN(3, CHANNELS[0], 3, stride=2, activation=nn.ReLU6)
        facts = zip(pairwise(CHANNELS), BLOCKS, STRIDES, DILATIONS, strict=True)
        for index, ((in_channels, out_channels), count, stride, dilation) in enumerate(facts, start=1):
            expand = 1 if index == 1 else 6
            # As the originals were trained: only a stage's first block is dilated, the later ones are not.
            first = InvertedResidual(in_channels, out_channels, expand, stride, dilation)
            rest = (InvertedResidual(out_channels, out_channels, expand) for _ in range(count - 1))
            self.add_module(f"layer{index}", nn.Sequential(first, *rest))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> features of stages 2, 3, 5, 7 at strides 4, 8, 8, 8."""
        x = self.conv1(images)
        features = []
        for index in range(1, len(BLOCKS) + 1):
            x = self.get_submodule(f"layer{index}")(x)
            if index in FEATURE_STAGES:
                features.append(x)
        return features
