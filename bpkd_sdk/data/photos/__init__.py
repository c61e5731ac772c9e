"""Natural images of any size, cut out of three embedded photographs.

chelsea.jpg: by Stefan van der Walt, CC0. coffee.jpg: by Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0.
rocket.jpg: by SpaceX, released into the public domain. All three are from the sample data of scikit-image.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PHOTOS: tuple[str, ...] = ("coffee", "rocket", "chelsea")

_SMALLEST_SHARE = 0.6  # smallest side of a cut-out, as a share of the largest one with the same aspect ratio


def photo(index: int, size: tuple[int, int]) -> Tensor:
    """Return a random part of a photograph, a different one for each index.

    Args:
        index: Index of the image, at least 0. Consecutive indices use the photographs in turn.
        size: (height, width) in pixels.

    Returns:
        RGB image, uint8 (3, H, W).

    Raises:
        ValueError: If a side is shorter than 1 pixel.
    """
    if min(size) < 1:
        raise ValueError(f"Expected `size` to be (height, width) of at least 1 pixel each, but got {size}.")
    rng = np.random.default_rng(index)
    photograph = _load(PHOTOS[index % len(PHOTOS)])
    full_size = np.array(photograph.shape[1:])
    crop_size = np.array(size) * (full_size / size).min() * rng.uniform(_SMALLEST_SHARE, 1)
    height, width = np.maximum(crop_size.astype(int), 1).tolist()
    top, left = rng.integers(0, full_size - (height, width), endpoint=True).tolist()
    crop = photograph[:, top : top + height, left : left + width]
    image = F.interpolate(crop[None], size, mode="bilinear", antialias=True)[0]
    return image.flip(2) if rng.integers(2) else image


@cache
def _load(name: str) -> Tensor:
    with Image.open(Path(__file__).with_name(f"{name}.jpg")) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
