"""Evaluation protocols: whole images or sliding windows, image sizes, and mirror images."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.data.resize import scaled_size
from bpkd_sdk.errors import check_choice
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.runtime.inference import resized_bands, sliding_bands, to_mask

Mode = Literal["whole", "slide"]
BAND_ROWS = 64  # rows of a whole image's logits that are resized at once


@dataclass(frozen=True)
class EvaluationProtocol:
    """The rules by which images become masks, as in OpenMMLab's test-time settings.

    There is one view of an image for each scale, and with `flip` its mirror image. The logits of each view are resized
    bilinearly to the size of the image. With several views, their class probabilities are averaged.

    Attributes:
        mode: "whole" for whole images; "slide" for a sliding window, whose overlapping logits are averaged.
        crop_size: (height, width) of the window.
        stride: (vertical, horizontal) step of the window in pixels; None: two thirds of the window.
        base_size: (longer side, shorter side) of a rectangle that all images are fitted into, smaller and larger ones;
            None: images keep their size.
        scales: Factors on this size, one view for each.
        flip: Whether to add the mirror image of every view.
    """

    mode: Mode = "whole"
    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    base_size: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        """Check the values of all fields."""
        check_choice("mode", self.mode, get_args(Mode))
        for name in ("crop_size", "stride", "base_size", "scales"):  # lists, as JSON returns them, become tuples
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if self.mode == "whole" and (self.crop_size or self.stride):
            raise ValueError(
                f"crop_size={self.crop_size} and stride={self.stride} have no effect with mode='whole'. Leave them "
                "out, or pass mode='slide' with `crop_size`, the (height, width) of the window."
            )
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
        """Segment images at their own size.

        Args:
            runtime: Network to run. A runtime that returns masks can only segment whole images at their own size.
            images: RGB images of one size, uint8 (N, 3, H, W).
            batch_size: Largest number of windows per forward pass.

        Returns:
            Class ids, integers (N, H, W), on the device of the runtime.

        Raises:
            ValueError: If the runtime returns masks, and the protocol needs logits.
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
        assert total is not None  # noqa: S101  (there is at least one view)
        return to_mask(total)

    def _views(self, runtime: Runtime, images: Tensor, batch_size: int) -> Iterator[Iterator[Tensor]]:
        """Yield the logits of each view at the size of the images, in bands of rows from top to bottom."""
        size = (images.shape[2], images.shape[3])
        for scale in self.scales:
            view = _resized(images, scaled_size(size, scale, self.base_size))
            yield self._bands(runtime, view, size, batch_size)
            if self.flip:
                yield (band.flip(3) for band in self._bands(runtime, view.flip(3), size, batch_size))

    def _bands(self, runtime: Runtime, view: Tensor, size: tuple[int, int], batch_size: int) -> Iterator[Tensor]:
        if self.mode == "whole":
            bands = iter(torch.split(runtime.logits(view), BAND_ROWS, dim=2))
        else:
            assert self.crop_size is not None  # noqa: S101  (checked by __post_init__)
            bands = sliding_bands(runtime.logits, view, self.crop_size, self.stride, batch_size)
        return bands if view.shape[2:] == size else resized_bands(bands, view.shape[2], size)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[2:] == size:
        return images
    resized = F.interpolate(images.float(), size, mode="bilinear", align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _probabilities(logits: Tensor) -> Tensor:
    """Return class probabilities; for one class, its probability minus 0.5, since `to_mask` has its threshold at 0."""
    return logits.sigmoid() - 0.5 if logits.shape[1] == 1 else logits.softmax(1)
