"""Networks small enough to train in a test."""

import torch
from torch import nn


def tiny(num_classes: int, *, width: int = 8, stride: int = 4, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """Three convolutions; logits at `stride`."""
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
