"""Crops of training images with many classes, on which a teacher is checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import checked_image
from bpkd_sdk.data.transforms import IMAGE_FILL
from bpkd_sdk.sizes import Size, resize_images, resize_label, scaled_size

MAX_CROP_PIXELS = 1 << 18  # of all crops together, unless the teacher accepts only larger ones
MAX_CROPS, MIN_CROPS = 4, 2
MAX_READ = 12  # number of images that are read in search of a second class
VOID = -1  # label of the pixels that are left out


@dataclass(frozen=True)
class Sample:
    """An image with its label map.

    Attributes:
        image: uint8 or float32 (channels, H, W).
        label: int16 (H, W), with `VOID` for pixels without a label.
    """

    image: Tensor
    label: Tensor

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.label.shape[0], self.label.shape[1]


def read_samples(dataset: SegmentationDataset, base_size: Size | None) -> list[Sample]:
    """Read images that are spread evenly over a data set, more than `MAX_CROPS` only in search of a second class.

    Args:
        dataset: Training data.
        base_size: (longer side, shorter side) that images are resized into; None: they keep their size.
    """
    count = min(len(dataset), MAX_READ)
    spread = [(2 * index + 1) * len(dataset) // (2 * count) for index in range(count)]
    gap = max(1, count // MAX_CROPS)
    samples: list[Sample] = []
    classes: set[int] = set()
    for index in (index for start in range(gap) for index in spread[start::gap]):
        if len(samples) >= MAX_CROPS and (len(classes) > 1 or not dataset.has_labels):
            break
        samples.append(_read(dataset, index, base_size))
        classes |= set(torch.unique(samples[-1].label[::4, ::4]).tolist()) - {VOID}
    return samples


def _read(dataset: SegmentationDataset, index: int, base_size: Size | None) -> Sample:
    image, label = dataset[index]
    image = checked_image(dataset, index, image)
    label = label.int()  # uint8 cannot be compared with an ignore index outside 0..255
    known = (label >= 0) & (label < dataset.num_classes) & (label != dataset.ignore_index)
    label = torch.where(known, label, VOID).short() if dataset.has_labels else torch.full(label.shape, VOID).short()
    if base_size is not None:
        size = scaled_size((image.shape[1], image.shape[2]), 1.0, base_size)
        image = resize_images(image[None], size)[0]
        label = resize_label(label, size)
    return Sample(image, label)


def cut_crops(samples: Sequence[Sample], sizes: Sequence[Size], fill: Sequence[float] = IMAGE_FILL) -> list[Sample]:
    """Cut the crop with the most mixed classes out of each sample, and keep the most mixed crops, best first.

    Args:
        samples: Images with labels.
        sizes: (height, width) of the crop of each sample; smaller samples are padded.
        fill: Value of each channel in the padding.
    """
    crops = []
    for sample, size in zip(samples, sizes, strict=True):
        (top, left), mixture = _highest_entropy_window(sample.label, size)
        image, label = (part[..., top : top + size[0], left : left + size[1]] for part in (sample.image, sample.label))
        crops.append((mixture, int((label != VOID).sum()), _pad(Sample(image, label), size, fill)))
    crops.sort(key=lambda crop: crop[:2], reverse=True)
    count = min(MAX_CROPS, max(MIN_CROPS, MAX_CROP_PIXELS // max(map(math.prod, sizes))))
    return [crop for _, _, crop in crops[:count]]


def _highest_entropy_window(label: Tensor, size: Size) -> tuple[Size, float]:
    """Find the window whose classes have the highest entropy, on a coarse grid.

    Returns:
        (top, left) of the window, and the entropy of its classes without void. If no window has more than one class:
        the middle, and 0.
    """
    step = max(1, max(label.shape) // 64)
    grid = label[step // 2 :: step, step // 2 :: step]
    height, width = (min(-(-side // step), cells) for side, cells in zip(size, grid.shape, strict=True))
    classes = torch.unique(grid)
    masks = (grid == classes[classes != VOID].view(-1, 1, 1)).float()
    limits = [max(0, whole - side) for whole, side in zip(label.shape, size, strict=True)]
    middle = (limits[0] // 2, limits[1] // 2)
    if not len(masks):
        return middle, 0.0
    shares = F.avg_pool2d(F.avg_pool2d(masks, (height, 1), stride=1), (1, width), stride=1)
    entropy = torch.special.entr(shares).sum(0)
    mixture, position = entropy.flatten().max(0)
    if mixture <= 0:
        return middle, 0.0
    top, left = divmod(int(position), entropy.shape[1])
    return (min(top * step, limits[0]), min(left * step, limits[1])), float(mixture)


def _pad(sample: Sample, size: Size, fill: Sequence[float]) -> Sample:
    """Pad a sample at the bottom and at the right, as the training transform does."""
    height, width = sample.size
    if (height, width) == size:
        return sample
    image = torch.tensor(fill, dtype=sample.image.dtype).view(-1, 1, 1).repeat(1, *size)
    label = torch.full(size, VOID, dtype=torch.int16)
    image[:, :height, :width], label[:height, :width] = sample.image, sample.label
    return Sample(image, label)
