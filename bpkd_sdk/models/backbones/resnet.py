"""ResNet at output stride 8: the last two stages trade their stride for dilation."""

from __future__ import annotations

from torch import Tensor, nn

from bpkd_sdk.models.backbones.base import Backbone
from bpkd_sdk.models.blocks import conv_bn

WIDTHS = (64, 128, 256, 512)
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)


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


BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
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
        block, counts = BLOCKS[depth]
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
        for width, count, stride, dilation in zip(WIDTHS, counts, STRIDES, DILATIONS, strict=True):
            stages.append(stage(block, channels, width, count, stride, dilation))
            channels = width * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        first, second, third, fourth = (width * block.expansion for width in WIDTHS)
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
