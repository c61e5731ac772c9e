"""Decoders of the zoo: heads that map the feature maps of an encoder to logits.

Every head ends with dropout and a 1x1 classifier. The parameters have OpenMMLab's names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.arrays import resize_bilinear
from bpkd_sdk.models.blocks import ConvBN, SeparableConvBN


class Head(nn.Module, ABC):
    """Base class of the heads; a subclass implements `embed`.

    Args:
        in_channels: Channels of the backbone's feature maps, finest map first.
        channels: Channels of the head's last feature map, which the classifier takes.
        num_classes: C, the number of channels of the logits.
    """

    dropout_ratio: ClassVar[float] = 0.1

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(self.dropout_ratio)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps (N, in_channels[i], h_i, w_i), finest first, to logits (N, num_classes, h, w)."""
        logits: Tensor = self.conv_seg(self.dropout(self.embed(features)))
        return logits

    @abstractmethod
    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps (N, in_channels[i], h_i, w_i), finest first, to one map (N, channels, h, w)."""


class AuxiliaryHead(Head):
    """Auxiliary head: a 3x3 convolution on the third feature map. Its loss helps a deep backbone train.

    The arguments are those of `Head`.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes)
        self.convs = nn.Sequential(ConvBN(in_channels[2], channels, 3))

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Map the third feature map to (N, channels, h, w) of the same size."""
        embedded: Tensor = self.convs(features[2])
        return embedded


class ConcatHead(Head):
    """HRNet's head: a 1x1 convolution over all feature maps, resized to the finest one and concatenated.

    The arguments are those of `Head`.
    """

    dropout_ratio = 0.0

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes)
        self.convs = nn.Sequential(ConvBN(sum(in_channels), channels))

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Map all feature maps to (N, channels, h_0, w_0)."""
        size = features[0].shape[-2:]
        embedded: Tensor = self.convs(torch.cat([resize_bilinear(feature, size) for feature in features], dim=1))
        return embedded


PSP_POOL_SCALES = (1, 2, 3, 6)  # cells per side


class PSPHead(Head):
    """PSPNet's head: the last feature map, concatenated with its averages over 1, 4, 9 and 36 cells.

    The arguments are those of `Head`.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes)
        width = in_channels[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBN(width, channels)) for scale in PSP_POOL_SCALES
        )
        self.bottleneck = ConvBN(width + len(PSP_POOL_SCALES) * channels, channels, 3)

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Map the last feature map to (N, channels, h, w) of the same size."""
        x = features[-1]
        pooled = [resize_bilinear(module(x), x.shape[-2:]) for module in self.psp_modules]
        embedded: Tensor = self.bottleneck(torch.cat([x, *pooled], dim=1))
        return embedded


ASPP_DILATIONS = (12, 24, 36)
ASPP_FINE_CHANNELS = 48  # channels of the first feature map after its 1x1 convolution


class SeparableASPPHead(Head):
    """DeepLabV3+'s head: atrous spatial pyramid pooling of the last feature map, refined by the first feature map.

    The pyramid has a 1x1 convolution, three dilated separable convolutions and the average of the whole map. The
    arguments are those of `Head`.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes)
        width = in_channels[-1]
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvBN(width, channels))
        self.aspp_modules = nn.ModuleList(
            [
                ConvBN(width, channels),
                *(SeparableConvBN(width, channels, dilation=dilation) for dilation in ASPP_DILATIONS),
            ]
        )
        self.bottleneck = ConvBN((2 + len(ASPP_DILATIONS)) * channels, channels, 3)
        self.c1_bottleneck = ConvBN(in_channels[0], ASPP_FINE_CHANNELS)
        self.sep_bottleneck = nn.Sequential(
            SeparableConvBN(channels + ASPP_FINE_CHANNELS, channels), SeparableConvBN(channels, channels)
        )

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Map the first and the last feature map to (N, channels, h_0, w_0)."""
        x = features[-1]
        pyramid = [resize_bilinear(self.image_pool(x), x.shape[-2:]), *(module(x) for module in self.aspp_modules)]
        coarse = self.bottleneck(torch.cat(pyramid, dim=1))
        fine = self.c1_bottleneck(features[0])
        embedded: Tensor = self.sep_bottleneck(torch.cat([resize_bilinear(coarse, fine.shape[-2:]), fine], dim=1))
        return embedded


ISA_TILE = 8  # side of a tile in positions
ISA_KEY_CHANNELS = 256


class SelfAttentionBlock(nn.Module):
    """Self-attention within groups: each position of (G, C, h, w) attends to all h * w positions of its group.

    Args:
        channels: C, channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        keys = ISA_KEY_CHANNELS
        self.key_project = nn.Sequential(ConvBN(channels, keys), ConvBN(keys, keys))
        self.query_project = nn.Sequential(ConvBN(channels, keys), ConvBN(keys, keys))
        self.value_project = nn.Conv2d(channels, channels, 1)
        self.output_project = ConvBN(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (G, C, h, w) to the same shape."""
        # Scaled before the product, which otherwise overflows float16; exact, because the factor is a power of two.
        query = self.query_project(x).flatten(2).transpose(1, 2) * ISA_KEY_CHANNELS**-0.5
        key = self.key_project(x).flatten(2)
        value = self.value_project(x).flatten(2).transpose(1, 2)
        weights = torch.softmax(query @ key, dim=-1)
        context = (weights @ value).transpose(1, 2).reshape(x.shape)
        attended: Tensor = self.output_project(context)
        return attended


class ISAHead(Head):
    """ISANet's head: interlaced self-attention on the last feature map.

    The first attention is global, among the positions that have the same place within their 8x8 tiles. The second
    attention is local, among the positions of one tile. The arguments are those of `Head`.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes)
        self.in_conv = ConvBN(in_channels[-1], channels, 3)
        self.global_relation = SelfAttentionBlock(channels)
        self.local_relation = SelfAttentionBlock(channels)
        self.out_conv = ConvBN(2 * channels, channels)

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Map the last feature map to (N, channels, h, w) of the same size."""
        x = self.in_conv(features[-1])
        embedded: Tensor = self.out_conv(torch.cat([self._attend(x), x], dim=1))
        return embedded

    def _attend(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        rows, columns = (height + ISA_TILE - 1) // ISA_TILE, (width + ISA_TILE - 1) // ISA_TILE
        bottom, right = rows * ISA_TILE - height, columns * ISA_TILE - width
        top, left = bottom // 2, right // 2
        # The padding takes part in the attention without a mask, as in OpenMMLab's networks, whose weights are loaded.
        x = F.pad(x, (left, right - left, top, bottom - top))
        x = x.reshape(n, c, rows, ISA_TILE, columns, ISA_TILE).permute(0, 3, 5, 1, 2, 4)
        x = self.global_relation(x.reshape(n * ISA_TILE * ISA_TILE, c, rows, columns))
        x = x.reshape(n, ISA_TILE, ISA_TILE, c, rows, columns).permute(0, 4, 5, 3, 1, 2)
        x = self.local_relation(x.reshape(n * rows * columns, c, ISA_TILE, ISA_TILE))
        x = x.reshape(n, rows, columns, c, ISA_TILE, ISA_TILE).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(n, c, rows * ISA_TILE, columns * ISA_TILE)
        # Negative padding crops. A slice would bind torch.export to the sizes that it traced.
        return F.pad(x, (-left, left - right, -top, top - bottom))
