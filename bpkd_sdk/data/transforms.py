"""Joint augmentation of image and label map, with torchvision.transforms.v2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

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
    """

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__()
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        factor = float(torch.empty(()).uniform_(*self.scale))
        height, width = v2.functional.get_size(flat_inputs[0])
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Bilinear with antialiasing for images, nearest for labels."""
        return v2.functional.resize(inpt, params["size"], antialias=True)


def training_transform(
    crop_size: tuple[int, int], *, ignore_index: int, scale: tuple[float, float] = (0.5, 2.0)
) -> v2.Transform:
    """Scale, crop (padded with void where the image is smaller), flip, photometric distortion: all on uint8."""
    return v2.Compose(
        [
            RandomScale(scale),
            v2.RandomCrop(
                crop_size,
                pad_if_needed=True,
                fill={tv_tensors.Image: IMAGE_FILL, tv_tensors.Mask: ignore_index},
            ),
            v2.RandomHorizontalFlip(),
            *(v2.RandomApply([v2.ColorJitter(**jitter)], p=0.5) for jitter in PHOTOMETRIC),
        ]
    )


def augment(transform: v2.Transform, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Apply one transform to an image (3, H, W) uint8 and its label (H, W): uint8 image and int64 label."""
    out_image, out_label = transform(tv_tensors.Image(image), tv_tensors.Mask(label.long()))
    return out_image.as_subclass(Tensor), out_label.as_subclass(Tensor)
