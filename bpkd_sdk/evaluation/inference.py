"""From images to logits and masks at the images' own size: whole, or by a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.models.spec import get_spec
from bpkd_sdk.output import as_output


def whole_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of whole images, at the images' size.

    Args:
        model: A segmentation network in eval mode.
        images: RGB (N, 3, H, W) in 0..255, on the network's device.

    Returns:
        (N, C, H, W) float32.
    """
    spec = get_spec(model)
    return full_size_logits(model, spec.normalize(images), spec.size_divisor)


def full_size_logits(model: nn.Module, inputs: Tensor, divisor: int) -> Tensor:
    """Run a network on normalised images of any size, and bring its logits to that size.

    The images are padded at the right and bottom to multiples of `divisor`, given to the network in its own precision,
    and the logits are resized bilinearly (align_corners False) and cropped back.

    Args:
        model: A segmentation network in eval mode.
        inputs: (N, 3, H, W) float32, normalised.
        divisor: What both sides must be multiples of.

    Returns:
        (N, C, H, W) float32.
    """
    height, width = inputs.shape[2:]
    padded = pad_to_multiple(inputs, divisor)
    precision = next((parameter.dtype for parameter in model.parameters()), inputs.dtype)
    logits = as_output(model(padded.to(precision))).logits.float()
    if logits.shape[2:] != padded.shape[2:]:
        logits = F.interpolate(logits, padded.shape[2:], mode="bilinear", align_corners=False)
    return logits[:, :, :height, :width]


def pad_to_multiple(images: Tensor, divisor: int) -> Tensor:
    """Append zeros at the right and bottom until both sides are multiples of `divisor`."""
    height, width = images.shape[2:]
    if height % divisor == 0 and width % divisor == 0:
        return images
    return F.pad(images, (0, -width % divisor, 0, -height % divisor))


def sliding_logits(model: nn.Module, images: Tensor, crop_size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Logits averaged over overlapping windows, at the images' size.

    Windows start at multiples of the stride; the last of a row or column is shifted back inside the image. Arguments
    and result otherwise as `whole_logits`.
    """
    windows = list(
        product(*(_window_starts(*sizes) for sizes in zip(images.shape[2:], crop_size, stride, strict=True)))
    )
    total: Tensor | None = None
    visits = torch.zeros(images.shape[2:], device=images.device)
    for top, left in windows:
        area = (..., slice(top, top + crop_size[0]), slice(left, left + crop_size[1]))
        logits = whole_logits(model, images[area])
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], *images.shape[2:])
        total[area] += logits
        visits[area] += 1
    assert total is not None  # noqa: S101  (an image has at least one window)
    return total / visits


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    count = max(-(-(length - window) // stride), 0) + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def to_mask(logits: Tensor) -> Tensor:
    """(N, C, H, W) -> class ids (N, H, W) int64: the highest logit, or with one class whether it is above 0."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


class Segmenter(Protocol):
    """Whatever turns images into masks: a module below, or an exported file (`bpkd_sdk.runtime`)."""

    def segment(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) on the CPU -> class ids (N, H, W)."""


@dataclass(frozen=True)
class ModuleSegmenter:
    """A torch module as a `Segmenter`.

    Attributes:
        module: In eval mode, on `device`.
        device: Where it runs.
        crop_size: (height, width) of a sliding window; None: whole images.
        stride: Step of the window; None: two thirds of it.
    """

    module: nn.Module
    device: torch.device
    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None

    @torch.inference_mode()
    def segment(self, images: Tensor) -> Tensor:
        """See `Segmenter`; the mask stays on the device."""
        images = images.to(self.device, non_blocking=True)
        if self.crop_size is None:
            return to_mask(whole_logits(self.module, images))
        height, width = self.crop_size
        stride = self.stride or (max(1, height * 2 // 3), max(1, width * 2 // 3))
        return to_mask(sliding_logits(self.module, images, self.crop_size, stride))
