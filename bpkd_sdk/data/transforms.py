"""Joint augmentation of image and label map, with torchvision.transforms.v2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from bpkd_sdk.data.sizes import scaled_size

IMAGE_FILL = (124, 116, 104)  # ImageNet's mean colour, so that padding is near 0 after normalisation

# OpenMMLab's photometric distortion, each with probability 0.5. torchvision's RandomPhotometricDistort also swaps the
# colour channels, which no segmentation recipe does: skies turn green.
PHOTOMETRIC: tuple[dict[str, float], ...] = (
    {"brightness": 0.125},
    {"contrast": 0.5},
    {"saturation": 0.5},
    {"hue": 0.05},
)


class RandomScale(v2.Transform):  # type: ignore[misc]
    """Resize image and label by one random factor, keeping the ratio of the sides.

    Args:
        scale: Lowest and highest factor; drawn uniformly.
        base_size: (longer side, shorter side) that images are fitted into at factor 1; None: they stay as they are.
    """

    def __init__(self, scale: tuple[float, float], base_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.base_size = base_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        factor = float(torch.empty(()).uniform_(*self.scale))
        height, width = v2.functional.get_size(flat_inputs[0])
        return {"size": list(scaled_size((height, width), factor, self.base_size))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Bilinear with antialiasing for images, nearest for labels."""
        return v2.functional.resize(inpt, params["size"], antialias=True)


class VariedCrop(v2.RandomCrop):  # type: ignore[misc]
    """A random crop in which no class fills more than a share of what is not void, as far as ten draws can find one.

    Args:
        crop_size: (height, width); where the image is smaller, it is padded.
        ignore_index: The void label, and what labels are padded with.
        max_class_share: The share, up to 1, where any crop will do.
    """

    def __init__(self, crop_size: tuple[int, int], ignore_index: int, max_class_share: float) -> None:
        fill = {tv_tensors.Image: IMAGE_FILL, tv_tensors.Mask: ignore_index}
        super().__init__(crop_size, pad_if_needed=True, fill=fill)
        self.ignore_index = ignore_index
        self.max_class_share = max_class_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the place."""
        label = next((inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.Mask)), None)
        params: dict[str, Any] = super().make_params(flat_inputs)
        if label is None or self.max_class_share >= 1:
            return params
        for _ in range(9):
            crop = self.transform(label, params)
            counts = torch.bincount(crop[crop != self.ignore_index].flatten())
            if counts.any() and counts.max() < self.max_class_share * counts.sum():
                break
            params = super().make_params(flat_inputs)
        return params


def training_transform(
    crop_size: tuple[int, int],
    *,
    ignore_index: int,
    scale: tuple[float, float] = (0.5, 2.0),
    base_size: tuple[int, int] | None = None,
    max_class_share: float = 1.0,
) -> v2.Transform:
    """Scale, crop (padded with void where the image is smaller), flip, photometric distortion: all on uint8."""
    return v2.Compose(
        [
            RandomScale(scale, base_size),
            VariedCrop(crop_size, ignore_index, max_class_share),
            v2.RandomHorizontalFlip(),
            *(v2.RandomApply([v2.ColorJitter(**jitter)], p=0.5) for jitter in PHOTOMETRIC),
        ]
    )


def augment(transform: v2.Transform, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Apply one transform to an image (3, H, W) uint8 and its label (H, W): uint8 image and int64 label."""
    out_image, out_label = transform(tv_tensors.Image(image), tv_tensors.Mask(label))
    return out_image.as_subclass(Tensor), out_label.as_subclass(Tensor).long()
