"""The default size of the training crops, chosen from the sizes of all images."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median_low

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.images import image_size
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.sizes import Size, scaled_size
from bpkd_sdk.training.compatibility import size_divisor
from bpkd_sdk.training.teacher import TeacherModel

LARGEST_SIDE = 512
MAX_HEADERS = 5000  # largest number of image files whose header is read, spread evenly over the data set
MAX_IMAGES = 64  # largest number of images that are read if headers do not state the size
_MIXED_SHARE = 0.1  # smallest share of upright images, and of wide images, at which the crop is a square


def default_crop(
    dataset: SegmentationDataset, networks: Sequence[TeacherModel], base_size: Size | None
) -> tuple[Size, str]:
    """Choose the (height, width) of the training crops.

    It is the median height and the median width of the images; or a square of the median shorter side, if a tenth of
    the images or more is upright and a tenth or more is wide. Sides are at most 512 pixels, and reduced to a multiple
    that all networks accept. A network that accepts one size determines the crop.

    Args:
        dataset: Training data.
        networks: Student and teacher.
        base_size: (longer side, shorter side) that images are fitted into before they are cropped; None: they keep
            their size.

    Returns:
        The size, and one sentence on it.
    """
    for network in networks:
        if isinstance(network, Runtime) and network.accepts.fixed_size is not None:
            height, width = network.accepts.fixed_size
            return (height, width), f"{height}x{width}, the only size that {network.name} accepts."
    sizes, origin = _read_sizes(dataset)
    if base_size is not None:
        sizes = [scaled_size(size, 1.0, base_size) for size in sizes]
    upright = sum(height > width for height, width in sizes) / len(sizes)
    wide = sum(height < width for height, width in sizes) / len(sizes)
    if min(upright, wide) >= _MIXED_SHARE:
        chosen = [median_low(map(min, sizes))] * 2
        origin = f"the median shorter side of {origin}, of which {upright:.0%} are upright and {wide:.0%} wide"
    else:
        chosen = [median_low(sides) for sides in zip(*sizes, strict=True)]
        origin = f"the {'median ' if len(set(sizes)) > 1 else ''}size of {origin}"
    divisor = math.lcm(*(size_divisor(network) for network in networks))
    height, width = (max(divisor, min(side, LARGEST_SIDE) // divisor * divisor) for side in chosen)
    limits = [f"at most {LARGEST_SIDE} per side"] if max(chosen) > LARGEST_SIDE else []
    limits += [f"in multiples of {divisor}"] if any(min(side, LARGEST_SIDE) % divisor for side in chosen) else []
    limit = f", {' and '.join(limits)}" if limits else ""
    advice = "To choose another size, pass crop_size (--crop-size)."
    return (height, width), f"{height}x{width}, {origin}{limit}. {advice}"


def _read_sizes(dataset: SegmentationDataset) -> tuple[list[Size], str]:
    """Return the sizes of the images, and a description of these images.

    Headers of image files are read if the first image has the size that its header states, so that the data set does
    not resize images. Images that cannot be read are left out: the check of the data reports them.
    """
    height, width = dataset[0][0].shape[1:]
    has_headers = _header_size(dataset, 0) == (height, width)
    count = min(len(dataset), MAX_HEADERS if has_headers else MAX_IMAGES)
    indices = [(2 * number + 1) * len(dataset) // (2 * count) for number in range(count)]
    if has_headers:
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            read = list(pool.map(lambda index: _header_size(dataset, index), indices))
    else:
        read = [_read_size(dataset, index) for index in indices]
    sizes = [size for size in read if size is not None] or [(height, width)]
    share = f"all {count}" if count == len(dataset) else f"{count} of {len(dataset)}"
    return sizes, f"{share} images"


def _header_size(dataset: SegmentationDataset, index: int) -> Size | None:
    """Return the size that an image file states; None without a file, or if its header cannot be read."""
    path = dataset.image_path(index)
    try:
        return None if path is None else image_size(path)
    except (OSError, ValueError):
        return None


def _read_size(dataset: SegmentationDataset, index: int) -> Size | None:
    try:
        height, width = dataset[index][0].shape[1:]
    except Exception:  # the data set of a user may raise any exception
        return None
    return height, width
