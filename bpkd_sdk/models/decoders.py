"""What all heads end with: dropout and a 1x1 classifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.models.blocks import ConvBN, SeparableConvBN, resize


class Head(nn.Module, ABC):
    """Features of a backbone, finest first -> logits.

    Args:
        in_channels: Widths of the backbone's features.
        channels: Width of the head's last feature map, the classifier's input.
        num_classes: Channels of the logits.
    """

    dropout_ratio: ClassVar[float] = 0.1

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(self.dropout_ratio)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[(N, in_channels[i], h_i, w_i)] -> logits (N, num_classes, h, w)."""
        logits: Tensor = self.conv_seg(self.dropout(self.embed(features)))
        return logits

    @abstractmethod
    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """[(N, in_channels[i], h_i, w_i)] -> what is classified, (N, channels, h, w)."""


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
