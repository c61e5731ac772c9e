"""Checks of an augmentation before the first step: one geometry for image and mask, void padding, repeatable draws."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import unknown_labels
from bpkd_sdk.data.randomness import find_generators, seeded
from bpkd_sdk.training.augmentation import Augmentation, describe_transform

DRAWS = 24
TILES = 4  # along each side of a result, in which image and mask are compared
MIN_CORRELATION = 0.3  # of brightness and mask in a tile, for a pattern that the image and the mask both show
MAX_MISALIGNED_TILES = 0.25  # share of the tiles of a draw; parts of the image may have been covered
MAX_MISALIGNED_DRAWS = 1
MIN_PIXELS = 16  # of a tile, from which a correlation is computed
LEVELS = (64, 192)  # brightness of the two classes of the pattern


def check_augmentation(augmentation: Augmentation) -> None:
    """Check the augmentation of a run on a pattern and on the first sample.

    Raises:
        ValueError: If the transform moves only the image or only the mask, or returns labels that are not classes.
    """
    dataset = augmentation.dataset
    first, again = (augmentation.draw(0, seed=0) for _ in range(2))
    if augmentation.transform is not None and not isinstance(augmentation.transform, str):
        _check_geometry(augmentation)
        _check_fill(augmentation)
    if not all(map(torch.equal, first, again)):
        warnings.warn(
            f"Two draws of {dataset.sample_name(0)} with the same seeds differ, so a resumed run will see other crops "
            "than an uninterrupted one. Let data set and transform use the random numbers of torch, numpy or random, "
            "or generators that are their attributes.",
            stacklevel=3,
        )
    if augmentation.transform is not None and _varies(dataset):
        transform = describe_transform(augmentation.transform)
        warnings.warn(
            f"{dataset.name} returns {dataset.sample_name(0)} with other pixels in each call, so it augments its "
            f"samples by itself, and the transform augments them once more ({transform}). Pass transform=None to use "
            "the samples as they are.",
            stacklevel=3,
        )


def check_validation_data(dataset: SegmentationDataset) -> None:
    """Warn if validation data return other pixels in each call, so that scores depend on chance."""
    if _varies(dataset):
        warnings.warn(
            f"The validation data {dataset.name} return {dataset.sample_name(0)} with other pixels in each call, so "
            "the scores depend on chance. Pass validation data that do not augment: the parts of random_split share "
            "the augmentation of the whole data set.",
            stacklevel=3,
        )


def _varies(dataset: SegmentationDataset) -> bool:
    """Return whether the first sample differs between seeds."""
    generators = find_generators(dataset)
    samples = []
    for seed in range(6):
        with seeded(seed, generators):
            samples.append(dataset[0])
    return not all(
        torch.equal(part, other) for sample in samples for part, other in zip(sample, samples[0], strict=True)
    )


def _check_geometry(augmentation: Augmentation) -> None:
    """Raise ValueError if the image and the mask of a pattern of two classes differ after the transform."""
    dataset = augmentation.dataset
    height, width = dataset[0][1].shape
    side = max(4, min(height, width) // 32)
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(2, (-(-height // side), -(-width // side)), generator=generator, dtype=torch.uint8)
    pattern = cells.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width].contiguous()
    image = (LEVELS[0] + (LEVELS[1] - LEVELS[0]) * pattern).expand(3, -1, -1).contiguous()
    last = dataset.num_classes - 1
    misaligned = 0
    for seed in range(DRAWS):
        with seeded(seed, augmentation.generators):
            moved_image, moved_label = augmentation(image, pattern * last)
        if unknown := unknown_labels(dataset, moved_label):
            raise ValueError(
                f"The transform returns labels {unknown[:10]}, which are outside the classes 0..{last} and not the "
                f"void label {dataset.ignore_index}. Warp masks by the nearest pixel, and fill them with the void "
                "label."
            )
        misaligned += _misaligned_share(moved_image, moved_label, last) > MAX_MISALIGNED_TILES
    if misaligned > MAX_MISALIGNED_DRAWS:
        raise ValueError(
            f"The transform moves the image and not the mask, or the mask and not the image: in {misaligned} of "
            f"{DRAWS} draws, a pattern that both showed is at different places afterwards. Apply the same geometric "
            "change to both: Albumentations and torchvision.transforms.v2 do if they get both in one call. If the "
            "transform is right, pass check_data=False."
        )


def _misaligned_share(image: Tensor, label: Tensor, last: int) -> float:
    """Return the share of tiles in which the brightness does not correlate with the mask.

    Pixels at an edge of the mask are left out, because interpolation mixes them. Tiles of one brightness or one class
    do not count.
    """
    is_last = (label == last).float()[None]
    is_inner = (F.max_pool2d(is_last, 3, 1, 1) == -F.max_pool2d(-is_last, 3, 1, 1))[0]
    is_pattern = (label == 0) | (label == last)
    if (is_inner & is_pattern).sum() > is_pattern.sum() / 8:
        is_pattern &= is_inner
    tiles: list[bool] = []
    parts = (image.float().mean(0), is_last[0], is_pattern)
    for rows in zip(*(part.chunk(TILES, 0) for part in parts), strict=True):
        for brightness, classes, chosen in zip(*(part.chunk(TILES, 1) for part in rows), strict=True):
            pixels = torch.stack([brightness[chosen], classes[chosen]])
            if pixels.shape[1] >= MIN_PIXELS and (pixels.std(1) > torch.tensor([4.0, 0.2])).all():
                tiles.append(bool(torch.corrcoef(pixels)[0, 1].abs() < MIN_CORRELATION))
    return sum(tiles) / max(1, len(tiles))


def _check_fill(augmentation: Augmentation) -> None:
    """Warn if the transform gives pixels outside of the image a class."""
    dataset = augmentation.dataset
    image = torch.full_like(dataset[0][0], LEVELS[0])
    last = dataset.num_classes - 1
    label = torch.full(image.shape[1:], last, dtype=torch.uint8)
    found: set[int] = set()
    for seed in range(DRAWS):
        with seeded(seed, augmentation.generators):
            found |= set(torch.unique(augmentation(image, label)[1]).tolist())
    void = dataset.ignore_index
    if filled := sorted(found - {last, void}):
        names = ", ".join(f"{dataset.class_names[index]!r} ({index})" for index in filled)
        warnings.warn(
            f"The transform gives pixels that it adds to the mask the class {names}, so the network learns that the "
            f"fill is this class. Fill masks with the void label: fill_mask={void if void in range(256) else 255} in "
            f"Albumentations, fill={{tv_tensors.Mask: {void}, ...}} in torchvision.",
            stacklevel=4,
        )
