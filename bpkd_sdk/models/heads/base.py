"""What all heads end with: dropout and a 1x1 classifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn


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
