"""FCN heads: one convolution before the classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bpkd_sdk.models.blocks import ConvBN, resize
from bpkd_sdk.models.heads.base import Head


class AuxiliaryHead(Head):
    """A 3x3 convolution on the third stage: the second loss that helps a deep backbone train. Arguments as `Head`."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes)
        self.convs = nn.Sequential(ConvBN(in_channels[2], channels, 3))

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """The third feature map -> (N, channels, h, w) of the same size."""
        embedded: Tensor = self.convs(features[2])
        return embedded


class ConcatHead(Head):
    """HRNet's head: a 1x1 convolution over all feature maps at the finest one's size. Arguments as `Head`."""

    dropout_ratio = 0.0

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes)
        self.convs = nn.Sequential(ConvBN(sum(in_channels), channels))

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """All feature maps -> (N, channels, h_0, w_0)."""
        size = features[0].shape[-2:]
        embedded: Tensor = self.convs(torch.cat([resize(feature, size) for feature in features], dim=1))
        return embedded
