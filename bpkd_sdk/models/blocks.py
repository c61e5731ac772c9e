"""Layers that the encoders and decoders share. Their parameters have OpenMMLab's names, so that its files fit."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


class ConvBN(nn.Sequential):
    """Convolution without bias (`conv`), batch normalisation (`bn`) and activation (`activate`).

    The module maps (N, in_channels, H, W) to (N, out_channels, H', W'); with stride 1 the padding keeps the size.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel, odd.
        stride: Stride of the convolution.
        dilation: Dilation of the convolution.
        groups: Number of groups of the convolution.
        activation: Class of the activation; None leaves it out.
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
    """Depthwise 3x3 and pointwise 1x1 `ConvBN`, both with ReLU.

    The module maps (N, in_channels, H, W) to (N, out_channels, H, W).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dilation: Dilation of the depthwise convolution.
    """

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
    """Return the layers of `ConvBN` as a list, for an nn.Sequential whose parameters are numbered instead of named."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return [*layers, nn.ReLU()] if relu else layers


def initialize(network: nn.Module) -> None:
    """Set random weights in place: He's for convolutions, small ones for classifiers, 1 and 0 for batch norm.

    Args:
        network: Network whose classifiers are named `conv_seg`.
    """
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
