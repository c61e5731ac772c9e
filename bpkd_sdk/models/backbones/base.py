"""What a head may expect of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """Image (N, 3, H, W) -> four feature maps, finest first; `out_channels` has their widths."""

    out_channels: tuple[int, int, int, int]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """The features of one batch, (N, out_channels[i], h_i, w_i)."""
