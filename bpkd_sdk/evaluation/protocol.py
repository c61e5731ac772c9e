"""How images become masks when a network is scored: whole or by windows, at which sizes, mirrored or not."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.data.transforms import scaled_size
from bpkd_sdk.errors import check_choice
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.runtime.inference import resized_bands, sliding_bands, to_mask

Mode = Literal["whole", "slide"]
BAND = 64  # rows of a whole image's logits that are resized at a time


@dataclass(frozen=True)
class EvaluationProtocol:
    """An evaluation protocol, as in OpenMMLab's test-time settings.

    The logits of every view, one for each scale and again mirrored, are resized bilinearly to the image's own size; of
    several views the class probabilities are averaged.

    Attributes:
        mode: "whole" images, or "slide" a window over them and average the logits.
        crop_size: (height, width) of the window.
        stride: (vertical, horizontal) step of the window; None: two thirds of the window.
        base_size: (longer side, shorter side) that images are fitted into first, smaller and larger ones alike; None:
            they stay as they are.
        scales: Factors on that size, one view each.
        flip: Add the mirror image of every view.
    """

    mode: Mode = "whole"
    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    base_size: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        check_choice("mode", self.mode, get_args(Mode))
        if self.mode == "slide" and self.crop_size is None:
            raise ValueError("mode='slide' needs `crop_size`, the (height, width) of the window.")
        for name in ("crop_size", "stride", "base_size"):
            value = getattr(self, name)
            if value is not None and not (len(value) == 2 and min(value) >= 1):
                raise ValueError(f"Expected `{name}` to be two numbers of at least 1, but got {value}.")
        if self.base_size is not None and self.base_size[0] < self.base_size[1]:
            raise ValueError(f"Expected `base_size` to be (longer side, shorter side), but got {self.base_size}.")
        if self.crop_size and self.stride and any(map(operator.gt, self.stride, self.crop_size)):
            raise ValueError(
                f"Expected `stride` to be at most `crop_size`, but got {self.stride} and {self.crop_size}."
            )
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"Expected `scales` to be numbers above 0, at least one, but got {self.scales}.")

    def segment(self, runtime: Runtime, images: Tensor, batch_size: int = 1) -> Tensor:
        """Class ids of images at their own size.

        Args:
            runtime: Any; one that returns masks can only take whole images as they are.
            images: uint8 RGB (N, 3, H, W).
            batch_size: Most windows at once.

        Returns:
            (N, H, W) integers on the runtime's device.

        Raises:
            ValueError: If the runtime returns masks and the protocol needs logits.
        """
        size = (images.shape[2], images.shape[3])
        views = self._views(runtime, images, batch_size)
        if self.scales == (1.0,) and not self.flip:
            if self.mode == "whole" and scaled_size(size, 1.0, self.base_size) == size:
                return runtime.segment(images)
            return torch.cat([to_mask(band) for band in next(views)], dim=1)
        total: Tensor | None = None
        for bands in views:
            top = 0
            for band in bands:
                if total is None:
                    total = band.new_zeros(*band.shape[:2], *size)
                total[:, :, top : top + band.shape[2]] += _probabilities(band)
                top += band.shape[2]
        assert total is not None  # noqa: S101  (there is a view)
        return to_mask(total)

    def _views(self, runtime: Runtime, images: Tensor, batch_size: int) -> Iterator[Iterator[Tensor]]:
        """Of each view its logits at the images' own size, in bands of rows, from the top to the bottom."""
        size = (images.shape[2], images.shape[3])
        for scale in self.scales:
            view = _resized(images, scaled_size(size, scale, self.base_size))
            yield self._bands(runtime, view, size, batch_size)
            if self.flip:
                yield (band.flip(3) for band in self._bands(runtime, view.flip(3), size, batch_size))

    def _bands(self, runtime: Runtime, view: Tensor, size: tuple[int, int], batch_size: int) -> Iterator[Tensor]:
        if self.mode == "whole":
            bands = iter(torch.split(runtime.logits(view), BAND, dim=2))
        else:
            assert self.crop_size is not None  # noqa: S101  (checked when it was made)
            bands = sliding_bands(runtime.logits, view, self.crop_size, self.stride, batch_size)
        return bands if view.shape[2:] == size else resized_bands(bands, view.shape[2], size)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[2:] == size:
        return images
    resized = F.interpolate(images.float(), size, mode="bilinear", align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _probabilities(logits: Tensor) -> Tensor:
    """Over classes; with one class, how far its probability is above a half, since `to_mask` splits at 0."""
    return logits.sigmoid() - 0.5 if logits.shape[1] == 1 else logits.softmax(1)
