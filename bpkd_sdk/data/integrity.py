"""Check of a complete copy of a named data set, for `bpkd data check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bpkd_sdk.data.checks import SampleReport, absent_classes, inspect_samples
from bpkd_sdk.data.registry import DATASETS
from bpkd_sdk.errors import check_choice


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
