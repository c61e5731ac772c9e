"""Networks that are small enough for tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from bpkd_sdk.models import encoders


def tiny(num_classes: int, *, width: int = 8, stride: int = 4, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """Build a network of three convolutions with random weights.

    Args:
        num_classes: Number of channels of the logits.
        width: Number of channels of the feature maps.
        stride: Ratio of the input size to the size of the logits.
        seed: Seed of the weights.
        dropout: Probability of the dropout before the classifier.
    """
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=stride // 2, padding=1),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(width, num_classes, 1),
    )


@contextmanager
def shallow_zoo() -> Iterator[None]:
    """Build the zoo's networks with fewer residual blocks, but with all kinds of their layers.

    ResNets and MobileNetV2 have two blocks in the stages with dilation and one in the others, HRNets one exchange
    module per stage.
    """
    blocks = {depth: (block, (1, 1, 2, 2)) for depth, (block, _) in encoders.RESNET_BLOCKS.items()}
    sizes = {name: size._replace(blocks=1, modules=(1, 1, 1)) for name, size in encoders.HRNET_SIZES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "RESNET_BLOCKS", blocks)
        patch.setattr(encoders, "HRNET_SIZES", sizes)
        patch.setattr(encoders, "MOBILENET_BLOCKS", (1, 1, 1, 2, 2, 2, 1))
        yield
