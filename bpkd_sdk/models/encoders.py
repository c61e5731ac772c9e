"""ResNet at output stride 8: the last two stages trade their stride for dilation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from bpkd_sdk.models.blocks import ConvBN, conv_bn, resize


class Backbone(nn.Module, ABC):
    """Image (N, 3, H, W) -> four feature maps, finest first; `out_channels` has their widths."""

    out_channels: tuple[int, int, int, int]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """The features of one batch, (N, out_channels[i], h_i, w_i)."""


RESNET_WIDTHS = (64, 128, 256, 512)
RESNET_STRIDES = (1, 2, 1, 1)
RESNET_DILATIONS = (1, 1, 2, 4)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The projection beside a residual block, or None where the block keeps the shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride=stride))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; stride and dilation sit on the first only. (N, C, H, W) -> (N, width, H', W')."""

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
        """Residual block."""
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + identity)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; stride and dilation sit on the 3x3. (N, C, H, W) -> (N, 4 * width, H', W')."""

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
        """Residual block."""
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        out: Tensor = self.relu(self.bn3(self.conv3(y)) + identity)
        return out


RESNET_BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


def stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, count: int, stride: int, dilation: int
) -> nn.Sequential:
    """`count` residual blocks; the first changes the size and uses half the stage's dilation."""
    first = block(in_channels, width, stride, max(dilation // 2, 1))
    rest = (block(width * block.expansion, width, dilation=dilation) for _ in range(count - 1))
    return nn.Sequential(first, *rest)


class ResNet(Backbone):
    """ResNet-18 or -101 with strides 4, 8, 8, 8.

    Args:
        depth: 18 or 101.
        deep_stem: Three 3x3 convolutions at the start (the "V1c" networks) instead of one 7x7.
    """

    def __init__(self, depth: int, *, deep_stem: bool = True) -> None:
        super().__init__()
        block, counts = RESNET_BLOCKS[depth]
        self.deep_stem = deep_stem
        if deep_stem:
            self.stem = nn.Sequential(
                *conv_bn(3, 32, 3, stride=2, relu=True), *conv_bn(32, 32, 3, relu=True), *conv_bn(32, 64, 3, relu=True)
            )
        else:
            self.conv1, self.bn1 = conv_bn(3, 64, 7, stride=2)
            self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        channels = 64
        for width, count, stride, dilation in zip(RESNET_WIDTHS, counts, RESNET_STRIDES, RESNET_DILATIONS, strict=True):
            stages.append(stage(block, channels, width, count, stride, dilation))
            channels = width * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        first, second, third, fourth = (width * block.expansion for width in RESNET_WIDTHS)
        self.out_channels = (first, second, third, fourth)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> features at strides 4, 8, 8, 8."""
        x = self.stem(images) if self.deep_stem else self.relu(self.bn1(self.conv1(images)))
        x = self.maxpool(x)
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


MOBILENET_CHANNELS = (32, 16, 24, 32, 64, 96, 160, 320)
MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
MOBILENET_STRIDES = (1, 2, 2, 1, 1, 1, 1)
MOBILENET_DILATIONS = (1, 1, 1, 2, 2, 4, 4)
MOBILENET_FEATURE_STAGES = (2, 3, 5, 7)


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
        self.conv1 = ConvBN(3, MOBILENET_CHANNELS[0], 3, stride=2, activation=nn.ReLU6)
        facts = zip(pairwise(MOBILENET_CHANNELS), MOBILENET_BLOCKS, MOBILENET_STRIDES, MOBILENET_DILATIONS, strict=True)
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
        for index in range(1, len(MOBILENET_BLOCKS) + 1):
            x = self.get_submodule(f"layer{index}")(x)
            if index in MOBILENET_FEATURE_STAGES:
                features.append(x)
        return features


@dataclass(frozen=True)
class HRNetSize:
    """Width of the finest branch, residual blocks per branch, and exchange modules in stages 2, 3 and 4."""

    width: int
    blocks: int
    modules: tuple[int, int, int]


HRNET_SIZES = {"w48": HRNetSize(48, 4, (1, 4, 3)), "w18s": HRNetSize(18, 2, (1, 3, 2))}


def lift(in_channels: int, out_channels: int) -> nn.Sequential:
    """From a coarser branch to a finer one: 1x1; the resize is done by `ExchangeModule`."""
    return nn.Sequential(*conv_bn(in_channels, out_channels, 1))


def lower(in_channels: int, out_channels: int, steps: int) -> nn.Sequential:
    """From a finer branch to a coarser one: a 3x3 of stride 2 per step; only the last changes the channels."""
    chain = [nn.Sequential(*conv_bn(in_channels, in_channels, 3, stride=2, relu=True)) for _ in range(steps - 1)]
    return nn.Sequential(*chain, nn.Sequential(*conv_bn(in_channels, out_channels, 3, stride=2)))


class ExchangeModule(nn.Module):
    """Residual blocks on every branch, then each branch sums what all of them have to say at its own resolution."""

    def __init__(self, channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(stage(BasicBlock, width, width, blocks, 1, 1) for width in channels)
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
            return lift(channels[source], channels[target])
        return lower(channels[source], channels[target], target - source)

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        """One tensor per branch in, one per branch out, same shapes."""
        own = [branch(x) for branch, x in zip(self.branches, branches, strict=True)]
        return [self._fuse(own, target) for target in range(len(own))]

    def _fuse(self, own: list[Tensor], target: int) -> Tensor:
        terms = []
        for source, path in enumerate(cast(nn.ModuleList, self.fuse_layers[target])):
            y = path(own[source])
            if source > target:
                # Twice, as in the originals: it changes the numbers where the sizes do not divide, such as 97x131.
                factor = 2 ** (source - target)
                y = resize(y, (y.shape[-2] * factor, y.shape[-1] * factor))
                y = resize(y, own[target].shape[-2:])
            terms.append(y)
        fused: Tensor = self.relu(reduce(torch.add, terms))
        return fused


class HRNet(Backbone):
    """HRNetV2 with features at strides 4, 8, 16, 32.

    Args:
        size: "w48", or "w18s" (the "small v2" network).
    """

    def __init__(self, size: str) -> None:
        super().__init__()
        facts = HRNET_SIZES[size]
        channels = (facts.width, 2 * facts.width, 4 * facts.width, 8 * facts.width)
        self.conv1, self.bn1 = conv_bn(3, 64, 3, stride=2)
        self.conv2, self.bn2 = conv_bn(64, 64, 3, stride=2)
        self.relu = nn.ReLU()
        self.layer1 = stage(Bottleneck, 64, 64, facts.blocks, 1, 1)
        self.transition1 = nn.ModuleList(
            [
                nn.Sequential(*conv_bn(64 * Bottleneck.expansion, channels[0], 3, relu=True)),
                self._new_branch(64 * Bottleneck.expansion, channels[1]),
            ]
        )
        self.transition2 = nn.ModuleList([*(nn.Identity() for _ in range(2)), self._new_branch(*channels[1:3])])
        self.transition3 = nn.ModuleList([*(nn.Identity() for _ in range(3)), self._new_branch(*channels[2:4])])
        self.stage2, self.stage3, self.stage4 = (
            nn.Sequential(*(ExchangeModule(channels[:branches], facts.blocks) for _ in range(count)))
            for branches, count in enumerate(facts.modules, start=2)
        )
        self.out_channels = channels

    @staticmethod
    def _new_branch(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Sequential(*conv_bn(in_channels, out_channels, 3, stride=2, relu=True)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> features at strides 4, 8, 16, 32."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        branches: list[Tensor] = self.stage2([transition(x) for transition in self.transition1])
        for transitions, exchange in ((self.transition2, self.stage3), (self.transition3, self.stage4)):
            grown = [*branches, branches[-1]]
            branches = exchange([transition(x) for transition, x in zip(transitions, grown, strict=True)])
        return branches
