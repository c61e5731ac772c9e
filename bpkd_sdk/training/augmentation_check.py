"""Checks of an augmentation before the first step: one geometry for image and mask, void padding, repeatable draws."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import checked_image, unknown_labels
from bpkd_sdk.data.randomness import find_generators, seeded
from bpkd_sdk.errors import warn
from bpkd_sdk.training.augmentation import Augmentation, describe_transform

DRAWS = 24  # number of draws of each check
MAX_SECONDS = 5.0  # time after which a check stops, once it has done `MIN_DRAWS` draws
MIN_DRAWS = 6
MAX_SIDE = 512  # largest side of the pattern in pixels, unless the transform needs a larger image
LEVELS = (64, 192)  # brightness of the two classes of the pattern
MIN_DIFFERENCE = 6  # smallest difference in brightness of a pattern and its negative where the image is not covered
TILES = 4  # number of tiles along each side of a result; image and mask are compared in each tile
MIN_PIXELS = 16  # smallest number of pixels of a tile that counts
MIN_SHARPNESS = 0.7  # smallest ratio of the median to the largest difference in a tile that is not blurred
MIN_CORRELATION = 0.6  # smallest correlation of image and mask in a tile that is aligned
MAX_MISALIGNED_TILES = 0.25  # largest share of misaligned tiles in a draw that is aligned
MAX_MISALIGNED_DRAWS = 1  # largest number of misaligned draws without an error


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
        warn(
            f"Two draws of {dataset.sample_name(0)} with the same seeds differ, so a resumed run gets other crops "
            "than an uninterrupted one. Let data set and transform use the random numbers of torch, numpy or random, "
            "or generators that are their attributes."
        )
    if augmentation.transform is not None and _varies(dataset):
        transform = describe_transform(augmentation.transform)
        warn(
            f"{dataset.name} returns {dataset.sample_name(0)} with other pixels in each call, so it augments its "
            f"samples by itself, and the transform augments them once more ({transform}). Pass transform=None to use "
            "the samples as they are."
        )


def check_validation_data(dataset: SegmentationDataset) -> None:
    """Warn if validation data return other pixels in each call, so that scores depend on chance."""
    if _varies(dataset):
        warn(
            f"The validation data {dataset.name} return {dataset.sample_name(0)} with other pixels in each call, so "
            "the scores depend on chance. Pass validation data that do not augment: the parts of random_split share "
            "the augmentation of the whole data set."
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


def _draws() -> Iterator[int]:
    """Yield the seeds of a check, fewer of them if the transform is slow."""
    start = time.perf_counter()
    for seed in range(DRAWS):
        if seed >= MIN_DRAWS and time.perf_counter() - start > MAX_SECONDS:
            return
        yield seed


def _check_geometry(augmentation: Augmentation) -> None:
    """Raise ValueError if the image and the mask of a pattern of two classes differ after the transform."""
    dataset = augmentation.dataset
    last = dataset.num_classes - 1
    pattern = _pattern(*(min(side, MAX_SIDE) for side in dataset[0][1].shape))
    try:
        _transform_pattern(augmentation, pattern, 0)
    except ValueError:  # a transform may need larger images
        pattern = _pattern(*dataset[0][1].shape)
    draws = misaligned = 0
    for draws, seed in enumerate(_draws(), 1):  # noqa: B007
        (image, label), (negative, same_label) = _transform_pattern(augmentation, pattern, seed)
        if unknown := unknown_labels(dataset, label):
            raise ValueError(
                f"The transform returns labels {unknown[:10]}, which are outside the classes 0..{last} and not the "
                f"void label {dataset.ignore_index}. Warp masks by the nearest pixel, and fill them with the void "
                "label."
            )
        if torch.equal(label, same_label):  # otherwise draws cannot be repeated, which is a warning of its own
            misaligned += _misaligned_share(image - negative, label, last) > MAX_MISALIGNED_TILES
    if misaligned > MAX_MISALIGNED_DRAWS:
        raise ValueError(
            f"The transform moves the image and not the mask, or the mask and not the image: in {misaligned} of "
            f"{draws} draws, a pattern that both showed is at different places afterwards. Apply the same geometric "
            "change to both: Albumentations and torchvision.transforms.v2 do if they get both in one call. If the "
            "transform is right, pass check_data=False."
        )


def _pattern(height: int, width: int) -> Tensor:
    """Return random squares of 0 and 1, half of each, uint8 (height, width)."""
    side = max(4, min(height, width) // 32)
    rows, columns = -(-height // side), -(-width // side)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    cells = (order % 2).view(rows, columns).to(torch.uint8)
    return cells.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width].contiguous()


def _transform_pattern(augmentation: Augmentation, pattern: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Apply the same draw to images of a pattern and of its negative, each with the mask of the pattern.

    The difference of both results shows where the pattern was moved to: noise, fog and other changes of the brightness
    are the same in both, and where the image is covered the difference is 0.

    Returns:
        For both images: brightness (H, W) in 0..255, and label map (H, W).
    """
    dataset = augmentation.dataset
    low, high = dataset.pixels.value_range
    results = []
    for shown in (pattern, 1 - pattern):
        values = low + (high - low) * torch.where(shown == 1, LEVELS[1], LEVELS[0]) / 255
        image = dataset.pixels.canonical(values.round().byte() if dataset.pixels.is_uint8 else values)
        with seeded(seed, augmentation.generators):
            moved, label = augmentation(image.repeat(dataset.channels, 1, 1), pattern * (dataset.num_classes - 1))
        results.append((moved.float().mean(0) * 255 / (high - low), label))
    return results


def _misaligned_share(difference: Tensor, label: Tensor, last: int) -> float:
    """Return the share of tiles in which the sign of the difference does not correlate with the mask.

    Pixels at an edge of the mask are left out, because interpolation mixes them. Tiles in which the image is covered or
    blurred, or that have one class only, do not count.
    """
    is_last = (label == last).float()[None]
    is_inner = (F.max_pool2d(is_last, 3, 1, 1) == -F.max_pool2d(-is_last, 3, 1, 1))[0]
    is_used = ((label == 0) | (label == last)) & (difference.abs() >= MIN_DIFFERENCE)
    if (is_inner & is_used).sum() > is_used.sum() / 8:
        is_used &= is_inner
    tiles: list[bool] = []
    parts = (difference, is_last[0], is_used)
    for rows in zip(*(part.chunk(TILES, 0) for part in parts), strict=True):
        for values, classes, used in zip(*(part.chunk(TILES, 1) for part in rows), strict=True):
            pixels = torch.stack([values[used].sign(), classes[used]])
            if pixels.shape[1] < MIN_PIXELS or pixels[1].std() < 0.2:
                continue
            contrast = values[used].abs()
            if contrast.median() >= MIN_SHARPNESS * contrast.quantile(0.95):
                correlation = torch.corrcoef(pixels)[0, 1].nan_to_num().abs()  # NaN: one sign for both classes
                tiles.append(bool(correlation < MIN_CORRELATION))
    return sum(tiles) / max(1, len(tiles))


def _check_fill(augmentation: Augmentation) -> None:
    """Warn if the transform gives pixels outside of the image a class."""
    dataset = augmentation.dataset
    image, label = dataset[0]
    image = checked_image(dataset, 0, image)
    last, void = dataset.num_classes - 1, dataset.ignore_index
    label = torch.full_like(label, last)
    found: set[int] = set()
    for seed in _draws():
        with seeded(seed, augmentation.generators):
            found |= set(torch.unique(augmentation(image, label)[1]).tolist())
    if filled := sorted(found - {last, void}):
        names = ", ".join(f"{dataset.class_names[index]!r} ({index})" for index in filled)
        warn(
            f"The transform gives pixels that it adds to the mask the class {names}, so the network learns that the "
            f"fill is this class. Fill masks with the void label: fill_mask={void if void in range(256) else 255} in "
            f"Albumentations, fill={{tv_tensors.Mask: {void}, ...}} in torchvision."
        )
