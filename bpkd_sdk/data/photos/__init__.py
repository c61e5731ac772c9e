"""Natural images of any size, cut from three embedded photographs.

chelsea.jpg: by Stefan van der Walt, CC0. coffee.jpg: by Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0.
rocket.jpg: by SpaceX, released into the public domain. All three come by way of scikit-image's sample data.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

PHOTOS: tuple[str, ...] = ("coffee", "rocket", "chelsea")

_LEAST_ZOOM = 0.6  # of the largest part with the sides' ratio that was asked for


def photo(index: int, size: tuple[int, int]) -> Tensor:
    """A part of a photograph, another one for each index.

    Args:
        index: Not negative; the photographs take turns.
        size: Height and width in pixels.

    Returns:
        uint8 RGB (3, H, W).

    Raises:
        ValueError: If a side is less than a pixel.
    """
    if min(size) < 1:
        raise ValueError(f"Expected `size` to be (height, width) of at least 1 pixel each, but got {size}.")
    draw = np.random.default_rng(index)
    whole = _load(PHOTOS[index % len(PHOTOS)])
    room = np.array(whole.shape[1:])
    part = np.array(size) * (room / size).min() * draw.uniform(_LEAST_ZOOM, 1)
    height, width = np.maximum(part.astype(int), 1).tolist()
    top, left = draw.integers(0, room - (height, width), endpoint=True).tolist()
    image: Tensor = resized_crop(whole, top, left, height, width, list(size), antialias=True)
    return image.flip(2) if draw.integers(2) else image


@cache
def _load(name: str) -> Tensor:
    with Image.open(Path(__file__).with_name(f"{name}.jpg")) as image:
        whole: Tensor = pil_to_tensor(image)
    return whole
