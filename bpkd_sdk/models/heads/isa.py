"""Interlaced sparse self-attention: attend across tiles, then inside them (https://arxiv.org/abs/1907.12273)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.models.blocks import ConvBN
from bpkd_sdk.models.heads.base import Head

TILE = 8
KEY_CHANNELS = 256


class SelfAttention(nn.Module):
    """Every pixel of (G, C, h, w) attends to all h * w pixels of its own group; same shape out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.key_project = nn.Sequential(ConvBN(channels, KEY_CHANNELS), ConvBN(KEY_CHANNELS, KEY_CHANNELS))
        self.query_project = nn.Sequential(ConvBN(channels, KEY_CHANNELS), ConvBN(KEY_CHANNELS, KEY_CHANNELS))
        self.value_project = nn.Conv2d(channels, channels, 1)
        self.output_project = ConvBN(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Softmax attention within each group."""
        # Scaled before the product, which would leave half precision's range otherwise; exact, being a power of two.
        query = self.query_project(x).flatten(2).transpose(1, 2) * KEY_CHANNELS**-0.5
        key = self.key_project(x).flatten(2)
        value = self.value_project(x).flatten(2).transpose(1, 2)
        weights = torch.softmax(query @ key, dim=-1)
        context = (weights @ value).transpose(1, 2).reshape(x.shape)
        attended: Tensor = self.output_project(context)
        return attended


class ISAHead(Head):
    """Global attention among pixels at the same place of their 8x8 tiles, then local within a tile. As `Head`."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes)
        self.in_conv = ConvBN(in_channels[-1], channels, 3)
        self.global_relation = SelfAttention(channels)
        self.local_relation = SelfAttention(channels)
        self.out_conv = ConvBN(2 * channels, channels)

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """The last feature map -> (N, channels, h, w) of the same size."""
        x = self.in_conv(features[-1])
        embedded: Tensor = self.out_conv(torch.cat([self._attend(x), x], dim=1))
        return embedded

    def _attend(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        rows, columns = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
        bottom, right = rows * TILE - height, columns * TILE - width
        top, left = bottom // 2, right // 2
        # The padding takes part in the attention, unmasked, as in the networks whose weights are loaded here.
        x = F.pad(x, (left, right - left, top, bottom - top))
        x = x.reshape(n, c, rows, TILE, columns, TILE).permute(0, 3, 5, 1, 2, 4)
        x = self.global_relation(x.reshape(n * TILE * TILE, c, rows, columns))
        x = x.reshape(n, TILE, TILE, c, rows, columns).permute(0, 4, 5, 3, 1, 2)
        x = self.local_relation(x.reshape(n * rows * columns, c, TILE, TILE))
        x = x.reshape(n, rows, columns, c, TILE, TILE).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(n, c, rows * TILE, columns * TILE)
        # Cropped by padding less than nothing: a slice ties torch.export to the kind of size that it traced.
        return F.pad(x, (-left, left - right, -top, top - bottom))
