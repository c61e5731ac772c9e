"""HRNet: branches at strides 4 to 32 side by side, exchanging features after every few blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from bpkd_sdk.models.backbones.base import Backbone
from bpkd_sdk.models.backbones.resnet import BasicBlock, Bottleneck, stage
from bpkd_sdk.models.blocks import conv_bn, resize


@dataclass(frozen=True)
class HRNetSize:
    """Width of the finest branch, residual blocks per branch, and exchange modules in stages 2, 3 and 4."""

    width: int
    blocks: int
    modules: tuple[int, int, int]


SIZES = {"w48": HRNetSize(48, 4, (1, 4, 3)), "w18s": HRNetSize(18, 2, (1, 3, 2))}


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
        facts = SIZES[size]
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
