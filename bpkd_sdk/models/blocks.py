"""What every backbone and head of the zoo is made of; parameter names are OpenMMLab's, so its files fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ConvBN(nn.Sequential):
    """Convolution without bias (`conv`), batch normalisation (`bn`), then an activation unless it is None.

    (N, in_channels, H, W) -> (N, out_channels, H', W'); padded so that stride 1 keeps the size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        padding = dilation * (kernel_size // 2)
        layers = OrderedDict[str, nn.Module](
            conv=nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False),
            bn=nn.BatchNorm2d(out_channels),
        )
        if activation is not None:
            layers["activate"] = activation()
        super().__init__(layers)


class SeparableConvBN(nn.Sequential):
    """Depthwise 3x3 and pointwise 1x1 `ConvBN`, both with ReLU: (N, in_channels, H, W) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, dilation: int = 1) -> None:
        super().__init__(
            OrderedDict(
                depthwise_conv=ConvBN(in_channels, in_channels, 3, dilation=dilation, groups=in_channels),
                pointwise_conv=ConvBN(in_channels, out_channels),
            )
        )


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, relu: bool = False
) -> list[nn.Module]:
    """The same layers as `ConvBN`, for a sequence whose parameters are numbered instead of named."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return [*layers, nn.ReLU()] if relu else layers


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize (N, C, H, W) -> (N, C, *size) with pixel centres aligned: the only kind in these networks."""
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def initialize(network: nn.Module) -> None:
    """Random weights: He's for convolutions, 1 and 0 for batch norm, and small ones for the classifiers `conv_seg`."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.endswith("conv_seg"):
                nn.init.normal_(module.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
