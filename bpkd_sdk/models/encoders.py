"""Encoders of the zoo: ResNet, MobileNetV2 and HRNet.

ResNet and MobileNetV2 have output stride 8: dilation replaces the stride of their last stages. The parameters have
OpenMMLab's names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from bpkd_sdk.arrays import resize_bilinear
from bpkd_sdk.models.blocks import ConvBN, conv_bn


class Backbone(nn.Module, ABC):
    """Base class of the encoders; a subclass maps images to four feature maps, finest first.

    Attributes:
        out_channels: Channels of the four feature maps.
    """

    out_channels: tuple[int, int, int, int]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, in_channels, H, W) to four feature maps (N, out_channels[i], h_i, w_i)."""


RESNET_WIDTHS = (64, 128, 256, 512)
RESNET_STRIDES = (1, 2, 1, 1)
RESNET_DILATIONS = (1, 1, 2, 4)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the 1x1 convolution of a residual block's shortcut; None if the block keeps the shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride=stride))


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions; stride and dilation apply to the first one.

    Args:
        in_channels: Channels of the input.
        width: Channels of both convolutions and of the output.
        stride: Stride of the block.
        dilation: Dilation of the first convolution.
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, width, H', W')."""
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + identity)
        return out


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions; stride and dilation apply to the 3x3 one.

    Args:
        in_channels: Channels of the input.
        width: Channels of the first two convolutions; the output has 4 * width.
        stride: Stride of the block.
        dilation: Dilation of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, 4 * width, H', W')."""
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        out: Tensor = self.relu(self.bn3(self.conv3(y)) + identity)
        return out


# Class of the blocks and number of blocks per stage, by depth.
RESNET_BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


def residual_stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, count: int, stride: int, dilation: int
) -> nn.Sequential:
    """Return a stage of `count` residual blocks; the first has the stride, and half of the stage's dilation."""
    first = block(in_channels, width, stride, max(dilation // 2, 1))
    rest = (block(width * block.expansion, width, dilation=dilation) for _ in range(count - 1))
    return nn.Sequential(first, *rest)


class ResNet(Backbone):
    """ResNet-18 or ResNet-101 with feature maps at strides 4, 8, 8, 8.

    Args:
        depth: Number of layers, 18 or 101.
        deep_stem: Whether the network starts with three 3x3 convolutions ("V1c") instead of one 7x7 convolution.
        in_channels: Number of channels of the images.
    """

    def __init__(self, depth: int, *, deep_stem: bool = True, in_channels: int = 3) -> None:
        super().__init__()
        block, counts = RESNET_BLOCKS[depth]
        self.deep_stem = deep_stem
        if deep_stem:
            self.stem = nn.Sequential(
                *conv_bn(in_channels, 32, 3, stride=2, relu=True),
                *conv_bn(32, 32, 3, relu=True),
                *conv_bn(32, 64, 3, relu=True),
            )
        else:
            self.conv1, self.bn1 = conv_bn(in_channels, 64, 7, stride=2)
            self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        channels = 64
        for width, count, stride, dilation in zip(RESNET_WIDTHS, counts, RESNET_STRIDES, RESNET_DILATIONS, strict=True):
            stages.append(residual_stage(block, channels, width, count, stride, dilation))
            channels = width * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        first, second, third, fourth = (width * block.expansion for width in RESNET_WIDTHS)
        self.out_channels = (first, second, third, fourth)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, in_channels, H, W) to feature maps at strides 4, 8, 8, 8."""
        x = self.stem(images) if self.deep_stem else self.relu(self.bn1(self.conv1(images)))
        x = self.maxpool(x)
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


MOBILENET_CHANNELS = (32, 16, 24, 32, 64, 96, 160, 320)  # of the stem and of the seven stages
MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
MOBILENET_STRIDES = (1, 2, 2, 1, 1, 1, 1)
MOBILENET_DILATIONS = (1, 1, 1, 2, 2, 4, 4)
MOBILENET_FEATURE_STAGES = (2, 3, 5, 7)  # stages whose output is a feature map, counted from 1


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 expansion, depthwise 3x3 convolution, 1x1 projection; residual if the shape is kept.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        expand: Factor of the expansion; 1 leaves the expansion out.
        stride: Stride of the depthwise convolution.
        dilation: Dilation of the depthwise convolution.
    """

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
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(Backbone):
    """MobileNetV2 of width 1 with feature maps at strides 4, 8, 8, 8.

    Args:
        in_channels: Number of channels of the images.
    """

    out_channels = (24, 32, 96, 320)

    def __init__(self, *, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = ConvBN(in_channels, MOBILENET_CHANNELS[0], 3, stride=2, activation=nn.ReLU6)
        channels = pairwise(MOBILENET_CHANNELS)
        stages = zip(channels, MOBILENET_BLOCKS, MOBILENET_STRIDES, MOBILENET_DILATIONS, strict=True)
        for index, ((in_channels, out_channels), count, stride, dilation) in enumerate(stages, start=1):
            expand = 1 if index == 1 else 6
            # Only the first block of a stage is dilated, as in the original networks that were trained.
            first = InvertedResidual(in_channels, out_channels, expand, stride, dilation)
            rest = (InvertedResidual(out_channels, out_channels, expand) for _ in range(count - 1))
            self.add_module(f"layer{index}", nn.Sequential(first, *rest))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, in_channels, H, W) to the feature maps of stages 2, 3, 5 and 7, at strides 4, 8, 8, 8."""
        x = self.conv1(images)
        features = []
        for index in range(1, len(MOBILENET_BLOCKS) + 1):
            x = self.get_submodule(f"layer{index}")(x)
            if index in MOBILENET_FEATURE_STAGES:
                features.append(x)
        return features


class HRNetSize(NamedTuple):
    """Size of an HRNet.

    Attributes:
        width: Channels of the finest branch.
        blocks: Number of residual blocks per branch.
        modules: Number of exchange modules in stages 2, 3 and 4.
    """

    width: int
    blocks: int
    modules: tuple[int, int, int]


HRNET_SIZES = {"w48": HRNetSize(48, 4, (1, 4, 3)), "w18s": HRNetSize(18, 2, (1, 3, 2))}


def coarse_to_fine(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return the 1x1 convolution from a coarser branch to a finer one; `ExchangeModule` resizes its output."""
    return nn.Sequential(*conv_bn(in_channels, out_channels, 1))


def fine_to_coarse(in_channels: int, out_channels: int, steps: int) -> nn.Sequential:
    """Return `steps` 3x3 convolutions of stride 2 to a coarser branch; only the last one changes the channels."""
    chain = [nn.Sequential(*conv_bn(in_channels, in_channels, 3, stride=2, relu=True)) for _ in range(steps - 1)]
    return nn.Sequential(*chain, nn.Sequential(*conv_bn(in_channels, out_channels, 3, stride=2)))


class ExchangeModule(nn.Module):
    """HRNet's module: residual blocks on every branch, then each branch becomes the sum of all resized branches.

    Args:
        channels: Channels of the branches, finest branch first.
        blocks: Number of residual blocks per branch.
    """

    def __init__(self, channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(residual_stage(BasicBlock, width, width, blocks, 1, 1) for width in channels)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._path(channels, source, target) for source in range(len(channels)))
            for target in range(len(channels))
        )
        self.relu = nn.ReLU()

    @staticmethod
    def _path(channels: Sequence[int], source: int, target: int) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source > target:
            return coarse_to_fine(channels[source], channels[target])
        return fine_to_coarse(channels[source], channels[target], target - source)

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        """Map one tensor per branch to one tensor per branch, of the same shapes."""
        own = [branch(x) for branch, x in zip(self.branches, branches, strict=True)]
        return [self._fuse(own, target) for target in range(len(own))]

    def _fuse(self, own: list[Tensor], target: int) -> Tensor:
        terms = []
        for source, path in enumerate(cast(nn.ModuleList, self.fuse_layers[target])):
            y = path(own[source])
            if source > target:
                # Two resizes, as in the original: they differ from one if the size is not divisible, such as 97x131.
                factor = 2 ** (source - target)
                y = resize_bilinear(y, (y.shape[-2] * factor, y.shape[-1] * factor))
                y = resize_bilinear(y, own[target].shape[-2:])
            terms.append(y)
        fused: Tensor = self.relu(reduce(torch.add, terms))
        return fused


class HRNet(Backbone):
    """HRNetV2 with feature maps at strides 4, 8, 16, 32.

    Args:
        size: Key of `HRNET_SIZES`: "w48", or "w18s" (the "small v2" network).
        in_channels: Number of channels of the images.
    """

    def __init__(self, size: str, *, in_channels: int = 3) -> None:
        super().__init__()
        width, blocks, modules = HRNET_SIZES[size]
        channels = (width, 2 * width, 4 * width, 8 * width)
        self.conv1, self.bn1 = conv_bn(in_channels, 64, 3, stride=2)
        self.conv2, self.bn2 = conv_bn(64, 64, 3, stride=2)
        self.relu = nn.ReLU()
        self.layer1 = residual_stage(Bottleneck, 64, 64, blocks, 1, 1)
        self.transition1 = nn.ModuleList(
            [
                nn.Sequential(*conv_bn(64 * Bottleneck.expansion, channels[0], 3, relu=True)),
                self._new_branch(64 * Bottleneck.expansion, channels[1]),
            ]
        )
        self.transition2 = nn.ModuleList([*(nn.Identity() for _ in range(2)), self._new_branch(*channels[1:3])])
        self.transition3 = nn.ModuleList([*(nn.Identity() for _ in range(3)), self._new_branch(*channels[2:4])])
        self.stage2, self.stage3, self.stage4 = (
            nn.Sequential(*(ExchangeModule(channels[:branches], blocks) for _ in range(count)))
            for branches, count in enumerate(modules, start=2)
        )
        self.out_channels = channels

    @staticmethod
    def _new_branch(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Sequential(*conv_bn(in_channels, out_channels, 3, stride=2, relu=True)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, in_channels, H, W) to feature maps at strides 4, 8, 16, 32."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        branches: list[Tensor] = self.stage2([transition(x) for transition in self.transition1])
        for transitions, exchange in ((self.transition2, self.stage3), (self.transition3, self.stage4)):
            grown = [*branches, branches[-1]]
            branches = exchange([transition(x) for transition, x in zip(transitions, grown, strict=True)])
        return branches
