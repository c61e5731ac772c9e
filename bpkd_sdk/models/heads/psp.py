"""PSPNet's pyramid pooling head (https://arxiv.org/abs/1612.01105)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bpkd_sdk.models.blocks import ConvBN, resize
from bpkd_sdk.models.heads.base import Head

POOL_SCALES = (1, 2, 3, 6)


class PSPHead(Head):
    """The last feature map beside its averages over 1, 4, 9 and 36 cells. Arguments as `Head`."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes)
        width = in_channels[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBN(width, channels)) for scale in POOL_SCALES
        )
        self.bottleneck = ConvBN(width + len(POOL_SCALES) * channels, channels, 3)

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """The last feature map -> (N, channels, h, w) of the same size."""
        x = features[-1]
        pooled = [resize(module(x), x.shape[-2:]) for module in self.psp_modules]
        embedded: Tensor = self.bottleneck(torch.cat([x, *pooled], dim=1))
        return embedded
