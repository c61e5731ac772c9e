"""Evaluation protocols: how images of any size are given to a network, at which scales, and with mirror images."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bpkd_sdk.runtime import Runtime
from bpkd_sdk.runtime.fit import Fit, check_fit, fitted_bands, largest_batch, resize_outputs
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.sizes import Size, check_size, resize_images, scaled_size


@dataclass(frozen=True)
class EvaluationProtocol:
    """The rules by which images become masks.

    A network gets whole images where it accepts their size. For an exported file of one size, `fit` is the rule for all
    other sizes, as in `Predictor`. `crop_size` states a size for any network: ``EvaluationProtocol(crop_size=(512,
    1024))`` slides a window of this size, as in OpenMMLab's "slide" mode.

    There is one view of an image for each scale, and with `flip` its mirror image. The logits of each view are resized
    bilinearly to the size of the image. With several views, their class probabilities are averaged.

    Attributes:
        fit: "slide", "resize" or "pad": rule for images that the network does not get at their own size, see
            `bpkd_sdk.runtime.fit`.
        crop_size: (height, width) of what the network gets; None: whole images, or the size of an exported file.
        stride: (vertical, horizontal) step of windows in pixels; None: two thirds of the window.
        base_size: (longer side, shorter side) of a rectangle that all images are fitted into first, smaller and larger
            ones; None: images keep their size.
        scales: Factors on this size, one view for each.
        flip: Whether to add the mirror image of every view.
    """

    fit: Fit = "slide"
    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    base_size: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        """Check the values of all fields."""
        check_fit(self.fit)
        if isinstance(self.scales, list):  # lists, as JSON returns them, become tuples
            object.__setattr__(self, "scales", tuple(self.scales))
        for name in ("crop_size", "stride", "base_size"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_size(name, value))
        if self.base_size is not None and self.base_size[0] < self.base_size[1]:
            raise ValueError(f"Expected `base_size` to be (longer side, shorter side), but got {self.base_size}.")
        if self.stride and (self.fit != "slide" or self.crop_size is None):
            raise ValueError(
                f"stride={self.stride} is the step of a window. Leave it out, or pass fit='slide' with `crop_size`, "
                "the (height, width) of the window."
            )
        if self.crop_size and self.stride and any(map(operator.gt, self.stride, self.crop_size)):
            raise ValueError(
                f"Expected `stride` to be at most `crop_size`, but got {self.stride} and {self.crop_size}."
            )
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"Expected `scales` to be numbers above 0, at least one, but got {self.scales}.")
        if self.fit == "resize" and (self.base_size or self.scales != (1.0,)):
            raise ValueError(
                f"base_size={self.base_size} and scales={self.scales} have no effect with fit='resize', which resizes "
                "every image to one size. Leave them out, or pass fit='slide'."
            )

    def segment(self, runtime: Runtime, images: Tensor, batch_size: int | None = 1) -> Tensor:
        """Segment images at their own size.

        Args:
            runtime: Network to run.
            images: Images of one size, (N, channels, H, W), in the range of the network's images.
            batch_size: Largest number of images or windows per forward pass; None: all images, and windows as
                `bpkd_sdk.runtime.fit.largest_batch` states.

        Returns:
            Class ids, integers (N, H, W), on the device of the runtime.

        Raises:
            ValueError: If the runtime returns masks, and the protocol averages several views, or if the runtime does
                not accept `crop_size`.
        """
        size = (images.shape[2], images.shape[3])
        views = self._views(runtime, images, batch_size)
        if len(self.scales) == 1 and not self.flip:
            masks = [runtime.masks(band) for band in next(views)]
            return masks[0] if len(masks) == 1 else torch.cat(masks, dim=1)
        if runtime.metadata["argmax"]:
            raise ValueError(
                f"{runtime.name} returns masks, but several `scales` or `flip` average logits. Export the network with "
                "argmax=False, or leave them out."
            )
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

    def largest_batch(self, runtime: Runtime, size: Size) -> int:
        """Return the number of images of a size that are segmented together, so that the largest view fits memory."""
        return largest_batch(runtime.accepts, scaled_size(size, max(self.scales), self.base_size))

    def _views(self, runtime: Runtime, images: Tensor, batch_size: int | None) -> Iterator[Iterator[Tensor]]:
        """Yield the outputs of each view at the size of the images, in bands of rows from top to bottom."""
        size = (images.shape[2], images.shape[3])
        for scale in self.scales:
            view = resize_images(images, scaled_size(size, scale, self.base_size))
            yield self._bands(runtime, view, size, batch_size)
            if self.flip:
                yield (band.flip(3) for band in self._bands(runtime, view.flip(3), size, batch_size))

    def _bands(self, runtime: Runtime, view: Tensor, size: tuple[int, int], batch_size: int | None) -> Iterator[Tensor]:
        bands = fitted_bands(
            runtime, view, self.fit, crop_size=self.crop_size, stride=self.stride, batch_size=batch_size
        )
        return resize_outputs(runtime, bands, (view.shape[2], view.shape[3]), size)


def _probabilities(logits: Tensor) -> Tensor:
    """Return class probabilities; for one class, its probability minus 0.5, since `to_mask` has its threshold at 0."""
    return logits.sigmoid() - 0.5 if logits.shape[1] == 1 else logits.softmax(1)
