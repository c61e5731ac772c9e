"""DeepLabV3+'s head: separable atrous pyramid, then a fine feature map (https://arxiv.org/abs/1802.02611)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bpkd_sdk.models.blocks import ConvBN, SeparableConvBN, resize
from bpkd_sdk.models.heads.base import Head

DILATIONS = (12, 24, 36)
FINE_CHANNELS = 48


class SeparableASPPHead(Head):
    """The last feature map seen at four dilations and as a whole, refined by the first one. Arguments as `Head`."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes)
        width = in_channels[-1]
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvBN(width, channels))
        self.aspp_modules = nn.ModuleList(
            [
                ConvBN(width, channels),
                *(SeparableConvBN(width, channels, dilation=dilation) for dilation in DILATIONS),
            ]
        )
        self.bottleneck = ConvBN((2 + len(DILATIONS)) * channels, channels, 3)
        self.c1_bottleneck = ConvBN(in_channels[0], FINE_CHANNELS)
        self.sep_bottleneck = nn.Sequential(
            SeparableConvBN(channels + FINE_CHANNELS, channels), SeparableConvBN(channels, channels)
        )

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """First and last feature map -> (N, channels, h_0, w_0)."""
        x = features[-1]
        pyramid = [resize(self.image_pool(x), x.shape[-2:]), *(module(x) for module in self.aspp_modules)]
        coarse = self.bottleneck(torch.cat(pyramid, dim=1))
        fine = self.c1_bottleneck(features[0])
        embedded: Tensor = self.sep_bottleneck(torch.cat([resize(coarse, fine.shape[-2:]), fine], dim=1))
        return embedded
