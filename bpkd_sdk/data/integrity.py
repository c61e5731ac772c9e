"""Checks of data: each sample is read once, and samples that cannot be used are reported."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bpkd_sdk.data.dataset import SegmentationDataset
from bpkd_sdk.data.registry import DATASETS
from bpkd_sdk.errors import check_choice, format_list
from bpkd_sdk.images import bit_depth, exif_orientation
from bpkd_sdk.progress import track

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
        brightest: Largest value in the image; 255 if it cannot be read.
        bit_depth: Bits per channel that the image uses in its file; 8 if it is not known.
    """

    sample: str
    size: tuple[int, int] | None = None
    labels: tuple[int, ...] = ()
    problem: str | None = None
    turned: bool = False
    brightest: int = 255
    bit_depth: int = 8


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
    """Check a data set as `check_samples` does, and warn of classes that occur in no label."""
    dataset.check_classes()
    reports = inspect_samples(dataset)
    check_reports(dataset, reports)
    absent = absent_classes(dataset, reports)
    if absent and dataset.has_labels:
        values = sorted({label for report in reports for label in report.labels})
        shown = ", ".join(map(str, values[:20])) + (", ..." if len(values) > 20 else "")
        warnings.warn(
            f"No label of {dataset.name} has the class{'es' if len(absent) > 1 else ''} "
            f"{', '.join(map(repr, absent))}; a network cannot learn a class without labels. The labels contain "
            f"{shown}, and {dataset.ignore_index} is void.",
            stacklevel=2,
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
    except (ValueError, OSError) as error:
        return SampleReport(sample, problem=_prefixed(sample, str(error)))
    except Exception as error:  # the data set of a user may raise any exception
        return SampleReport(sample, problem=_prefixed(sample, f"{type(error).__name__}: {error}"))
    if problem := image_problem(image) or label_problem(label):
        return SampleReport(sample, problem=f"{sample}: {problem}")
    size = (image.shape[1], image.shape[2])
    path = dataset.image_path(index)
    orientation = 1 if path is None else exif_orientation(path)
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
    # Orientations 5 to 8 swap height and width. A label of the upright size cannot be drawn on the stored image then.
    may_be_wrong = orientation > 1 and (orientation < 5 or size[0] == size[1])
    return SampleReport(
        sample,
        size,
        labels,
        problem,
        turned=dataset.has_labels and may_be_wrong,
        brightest=int(image.max().item()),
        bit_depth=8 if path is None else bit_depth(path),
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
    if reports and max(report.brightest for report in reports) <= 1:
        raise ValueError(
            f"All images of {dataset.name} contain only the values 0 and 1, expected 0 to 255. Do not divide images by "
            "255: training and export normalise them."
        )
    if turned := [report.sample for report in reports if report.turned]:
        warnings.warn(
            f"EXIF data turn {len(turned)} of {len(dataset)} images of {dataset.name}; labels are read as they are "
            "stored. Make sure that these labels were drawn on the turned images, or store the images upright:\n"
            f"{format_list(turned)}",
            stacklevel=3,
        )
    depths = Counter(report.bit_depth for report in reports if report.bit_depth > 8)
    if len(depths) > 1:
        counts = ", ".join(f"{depth} bits in {count}" for depth, count in sorted(depths.items()))
        warnings.warn(
            f"The 16-bit images of {dataset.name} do not state how many bits they use, and their largest values need "
            f"{counts} of them. Each image is scaled by its own bit depth, so that they differ in brightness: store "
            "them with 8 bits, or with values that fill 16 bits.",
            stacklevel=3,
        )


def absent_classes(dataset: SegmentationDataset, reports: Sequence[SampleReport]) -> tuple[str, ...]:
    """Return the names of the classes that occur in no label."""
    present = {label for report in reports for label in report.labels}
    return tuple(name for index, name in enumerate(dataset.class_names) if index not in present)


def unknown_labels(dataset: SegmentationDataset, label: Tensor) -> list[int]:
    """Return the values of a label map that are neither a class nor the void label, ascending."""
    outside = label[(label < 0) | (label >= dataset.num_classes)]
    return sorted(set(outside[outside != dataset.ignore_index].tolist()))


def image_problem(image: object) -> str | None:
    """Return the reason why an image of a data set cannot be used; None for uint8 (3, H, W)."""
    if not isinstance(image, Tensor):
        return f"image is a {type(image).__name__}, expected a torch tensor, uint8 (3, H, W)"
    if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3 and image.numel():
        return None
    problem = f"image is {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}, expected uint8 (3, H, W) RGB"
    if image.is_floating_point() and image.numel():
        problem += (
            f". Its values go from {image.min().item():.3g} to {image.max().item():.3g}; return the pixels as bytes of "
            "0 to 255, since training and export scale and normalise them themselves"
        )
    return problem


def label_problem(label: object) -> str | None:
    """Return the reason why a label map of a data set cannot be used; None for integers (H, W)."""
    if isinstance(label, Tensor) and label.ndim == 2 and label.dtype in LABEL_TYPES:
        return None
    kind = (
        f"{str(label.dtype).removeprefix('torch.')} {tuple(label.shape)}"
        if isinstance(label, Tensor)
        else f"a {type(label).__name__}"
    )
    return f"label is {kind}, expected a torch tensor of class ids, uint8 or int64 (H, W)"


def _prefixed(sample: str, problem: str) -> str:
    """Put the name of the sample before a problem, unless the problem contains the name of its image or label."""
    return problem if Path(sample).stem in problem else f"{sample}: {problem}"


@dataclass(frozen=True)
class SplitReport:
    """The result of checking one split of a data set.

    Attributes:
        split: Name of the split.
        images: Number of images; None if the split cannot be opened.
        expected: Number of images in a complete copy; None if it is not known.
        smallest: (height, width) of the image with the fewest pixels; None without images.
        largest: (height, width) of the image with the most pixels; None without images.
        absent_classes: Names of the classes that occur in no label.
        problems: All problems of the split, one line each.
    """

    split: str
    images: int | None
    expected: int | None
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    absent_classes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def check_dataset(name: str, root: str | Path) -> list[SplitReport]:
    """Read all splits of a named data set and report on each.

    Args:
        name: Name of the data set, one of `DATASETS`.
        root: Folder of the data set.

    Raises:
        ValueError: If the name is unknown. Problems of the data are in the reports.
    """
    check_choice("name", name, DATASETS)
    return [_check_split(name, root, split) for split in DATASETS[name].images]


def _check_split(name: str, root: str | Path, split: str) -> SplitReport:
    entry = DATASETS[name]
    expected = entry.images[split]
    try:
        dataset = entry.open(root, split)
        dataset.check_classes()
    except (FileNotFoundError, ValueError) as error:
        return SplitReport(split, None, expected, problems=(str(error),))
    reports = inspect_samples(dataset)
    problems = [
        entry.count_problem(split, dataset),
        *(report.problem or _size_problem(report, entry.image_size) or _turn_problem(report) for report in reports),
    ]
    sizes = sorted((report.size for report in reports if report.size), key=lambda size: size[0] * size[1])
    return SplitReport(
        split,
        len(dataset),
        expected,
        smallest=sizes[0] if sizes else None,
        largest=sizes[-1] if sizes else None,
        absent_classes=absent_classes(dataset, reports),
        problems=tuple(filter(None, problems)),
    )


def _size_problem(report: SampleReport, expected: tuple[int, int] | None) -> str | None:
    if expected is None or report.size in (None, expected):
        return None
    return f"{report.sample}: image is {report.size}, all images of this data set are {expected}"


def _turn_problem(report: SampleReport) -> str | None:
    if not report.turned:
        return None
    return f"{report.sample}: EXIF data turn the image, and the label is read as stored; does it fit the turned image?"
