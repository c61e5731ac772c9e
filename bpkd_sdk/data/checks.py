"""Checks of data: each sample is read once, and samples that cannot be used are reported."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bpkd_sdk.errors import format_list, warn
from bpkd_sdk.images import bit_depth, exif_orientation, has_unnamed_channel
from bpkd_sdk.pixels import MAX_CHANNELS, PixelFormat
from bpkd_sdk.progress import track

if TYPE_CHECKING:
    from bpkd_sdk.data.dataset import SegmentationDataset

LABEL_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class SampleReport:
    """The result of reading one sample.

    Attributes:
        sample: Name of the sample.
        size: (height, width) of the image; None if it cannot be read.
        labels: Values that occur in the label map, ascending.
        problem: Reason why the sample cannot be used; None if it can.
        turned: Whether EXIF data rotate or mirror the image, so that the label may not fit it: labels are read as
            stored.
        brightest: Largest value in the image; infinity if it cannot be read.
        bit_depth: Bits per channel that the image uses in its file; 8 if it is not known.
        extra_channel: Whether the file has a fourth channel that is not read and not declared as transparency.
    """

    sample: str
    size: tuple[int, int] | None = None
    labels: tuple[int, ...] = ()
    problem: str | None = None
    turned: bool = False
    brightest: float = math.inf
    bit_depth: int = 8
    extra_channel: bool = False


def check_samples(dataset: SegmentationDataset) -> None:
    """Read a data set once and refuse it if samples cannot be used.

    Warn if EXIF data turn images, and if 16-bit images are scaled by different bit depths.

    Raises:
        ValueError: If `SegmentationDataset.check_classes` fails, or with a list of the samples that cannot be used:
            unreadable files, images that are not uint8 RGB, labels outside the classes, an image and a label map of
            different sizes.
    """
    dataset.check_classes()
    check_reports(dataset, inspect_samples(dataset))


def check_for_training(dataset: SegmentationDataset) -> None:
    """Check a data set as `check_samples` does, and warn of classes that occur in no label.

    Raises:
        ValueError: As `check_samples`, and if labels of two classes contain only 0 and the void label 255.
    """
    dataset.check_classes()
    reports = inspect_samples(dataset)
    check_reports(dataset, reports)
    absent = absent_classes(dataset, reports)
    if absent and dataset.has_labels:
        values = sorted({label for report in reports for label in report.labels})
        shown = ", ".join(map(str, values[:20])) + (", ..." if len(values) > 20 else "")
        if values == [0, 255] and dataset.num_classes == 2 and dataset.ignore_index == 255:
            raise ValueError(
                f"The labels of {dataset.name} contain only 0 and 255, and 255 is void, so that no pixel has the class "
                f"{absent[0]!r}. If 255 stands for it, return 1 in its place (in a folder, map 255 in classes.json)."
            )
        warn(
            f"No label of {dataset.name} has the class{'es' if len(absent) > 1 else ''} "
            f"{', '.join(map(repr, absent))}; a network cannot learn a class without labels. The labels contain "
            f"{shown}, and {dataset.ignore_index} is void."
        )


def inspect_samples(dataset: SegmentationDataset) -> list[SampleReport]:
    """Read every sample of a data set, in several threads, and report on each."""
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        reports = pool.map(lambda index: inspect_sample(dataset, index), range(len(dataset)))
        return list(track(reports, total=len(dataset), description=f"Checking {dataset.name}"))


def inspect_sample(dataset: SegmentationDataset, index: int) -> SampleReport:
    """Read one sample of a data set and report on it."""
    sample = dataset.sample_name(index)
    try:
        image, label = dataset[index]
        path = dataset.image_path(index)
        orientation, depth, extra = 1, 8, False
        if path is not None and dataset.pixels.is_rgb8 and path.suffix.lower() != ".npy":
            orientation, depth, extra = exif_orientation(path), bit_depth(path), has_unnamed_channel(path)
    except (ValueError, OSError) as error:
        return SampleReport(sample, problem=_prefixed(sample, str(error)))
    except Exception as error:  # the data set of a user may raise any exception
        return SampleReport(sample, problem=_prefixed(sample, f"{type(error).__name__}: {error}"))
    if problem := image_problem(image, dataset.pixels) or label_problem(label):
        return SampleReport(sample, problem=f"{sample}: {problem}")
    size = (image.shape[1], image.shape[2])
    if size != tuple(label.shape):
        problem = f"{sample}: image is {size}, label is {tuple(label.shape)}"
        if orientation >= 5 and size == tuple(reversed(label.shape)):
            problem += (
                "; EXIF data turn the image, and the label fits it as stored: turn the label, or store the image "
                "upright"
            )
        return SampleReport(sample, size, problem=problem)
    labels = tuple(torch.unique(label).tolist())
    problem = None
    if unknown := unknown_labels(dataset, label):
        problem = (
            f"{sample}: labels {unknown[:10]} are outside the classes 0..{dataset.num_classes - 1} "
            f"and not the void label {dataset.ignore_index}"
        )
    # Orientations 5 to 8 swap height and width. A label of the upright size was drawn on the turned image, and fits.
    may_be_wrong = orientation > 1 and (orientation < 5 or size[0] == size[1])
    return SampleReport(
        sample,
        size,
        labels,
        problem,
        turned=dataset.has_labels and may_be_wrong,
        brightest=dataset.pixels.canonical(image).max().item(),
        bit_depth=depth,
        extra_channel=extra,
    )


def check_reports(dataset: SegmentationDataset, reports: Sequence[SampleReport]) -> None:
    """Raise the errors and warnings of `check_samples` for the reports that `inspect_samples` returned."""
    if problems := [report.problem for report in reports if report.problem]:
        labels = {label for report in reports for label in report.labels}
        raise ValueError(
            f"{len(problems)} of {len(dataset)} samples of {dataset.name} cannot be used:\n{format_list(problems)}"
            f"{dataset.label_advice(labels)}"
        )
    if dataset.has_labels and reports and not any(set(report.labels) - {dataset.ignore_index} for report in reports):
        raise ValueError(
            f"All labels of {dataset.name} are void ({dataset.ignore_index}), so there is nothing to learn or to "
            "score. If that value is a class, pass another ignore_index."
        )
    brightest = max((report.brightest for report in reports), default=math.inf)
    if dataset.pixels.is_too_dark(brightest):
        low, high = dataset.pixels.value_range
        if dataset.pixels.is_uint8:
            raise ValueError(
                f"All images of {dataset.name} contain only the values 0 and 1, expected 0 to 255. Do not divide "
                "images by 255: training and export normalise them."
            )
        raise ValueError(
            f"The largest value in all images of {dataset.name} is {brightest:g}, but their range is stated as "
            f"{low:g} to {high:g}. State the range that the values have, for example value_range=({low:g}, "
            f"{brightest:g})."
        )
    if turned := [report.sample for report in reports if report.turned]:
        warn(
            f"EXIF data turn {len(turned)} of {len(dataset)} images of {dataset.name}; labels are read as they are "
            "stored. Make sure that these labels were drawn on the turned images, or store the images upright:\n"
            f"{format_list(turned)}"
        )
    if extra := [report.sample for report in reports if report.extra_channel]:
        warn(
            f"{len(extra)} of {len(dataset)} images of {dataset.name} have a fourth channel that they do not declare "
            "as transparency. The images are read as RGB without it. If it is data, such as near infrared, state the "
            'channels and the range of the values (in a folder: {"channels": 4, "value_range": [0, 65535]} in '
            f"classes.json):\n{format_list(extra, limit=3)}"
        )
    depths = Counter(report.bit_depth for report in reports if report.bit_depth > 8)
    if len(depths) > 1:
        counts = ", ".join(f"{depth} bits in {count}" for depth, count in sorted(depths.items()))
        warn(
            f"The 16-bit images of {dataset.name} do not state how many bits they use, and their largest values need "
            f"{counts} of them. Each image is scaled by its own bit depth, so that they differ in brightness: store "
            "them with 8 bits, or with values that fill 16 bits."
        )


def absent_classes(dataset: SegmentationDataset, reports: Sequence[SampleReport]) -> tuple[str, ...]:
    """Return the names of the classes that occur in no label."""
    present = {label for report in reports for label in report.labels}
    return tuple(name for index, name in enumerate(dataset.class_names) if index not in present)


def unknown_labels(dataset: SegmentationDataset, label: Tensor) -> list[int]:
    """Return the values of a label map that are neither a class nor the void label, ascending."""
    outside = ((label < 0) | (label >= dataset.num_classes)) & (label != dataset.ignore_index)
    return sorted(set(label[outside].tolist())) if outside.any() else []


def image_problem(image: object, pixels: PixelFormat) -> str | None:
    """Return the reason why an image of a data set cannot be used; None if it has the format.

    Args:
        image: Image of a data set, expected as a tensor (channels, H, W).
        pixels: Format of the images of the data set.
    """
    expected = "uint8 (3, H, W) RGB" if pixels.is_rgb8 else f"({pixels.channels}, H, W), {pixels}"
    if not isinstance(image, Tensor):
        return f"image is a {type(image).__name__}, expected a torch tensor, {expected}"
    if image.ndim == 3 and image.shape[0] == pixels.channels and image.numel():
        if image.dtype == torch.uint8 and pixels.is_uint8:
            return None
        if not pixels.is_rgb8:
            problem = pixels.problem(image)
            return problem and f"image is not {expected}: {problem}"
    problem = f"image is {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}, expected {expected}"
    if not pixels.is_rgb8 or not isinstance(image, Tensor) or not image.numel():
        return problem
    if image.ndim == 3 and image.shape[0] != 3 and image.shape[0] <= MAX_CHANNELS:
        return f"{problem}. If the data have {image.shape[0]} channels, state channels={image.shape[0]}"
    if image.dtype == torch.uint16:
        return f"{problem}. {pixels.problem(image)}"
    if image.is_floating_point() and image.numel():
        problem += (
            f". Its values go from {image.min().item():.3g} to {image.max().item():.3g}; return the pixels as bytes of "
            "0 to 255, since training and export scale and normalise them themselves"
        )
    return problem


def checked_image(dataset: SegmentationDataset, index: int, image: Tensor) -> Tensor:
    """Return an image of a data set as uint8 or float32; raise ValueError if it does not have the data set's format.

    Args:
        dataset: Data set that the image is from.
        index: Index of the sample.
        image: Image (channels, H, W).
    """
    if problem := image_problem(image, dataset.pixels):
        raise ValueError(f"{dataset.sample_name(index)}: {problem}.")
    return dataset.pixels.canonical(image)


def label_problem(label: object) -> str | None:
    """Return the reason why a label map of a data set cannot be used; None for integers (H, W)."""
    if isinstance(label, Tensor) and label.ndim == 2 and label.dtype in LABEL_TYPES:
        return None
    kind = (
        f"{str(label.dtype).removeprefix('torch.')} {tuple(label.shape)}"
        if isinstance(label, Tensor)
        else f"a {type(label).__name__}"
    )
    problem = f"label is {kind}, expected a torch tensor of class ids, uint8 or int64 (H, W)"
    if isinstance(label, Tensor) and label.ndim == 3 and label.shape[0] > 1:
        problem += (
            ". If it has one map per class: each pixel has exactly one class here. Return label.argmax(0) if the maps "
            "exclude each other; several classes per pixel (multi-label) are not supported"
        )
    return problem


def _prefixed(sample: str, problem: str) -> str:
    """Put the name of the sample before a problem, unless the problem contains the name of its image or label."""
    return problem if Path(sample).stem in problem else f"{sample}: {problem}"
