"""Is a copy of a data set whole? Every file is read once, and what is there is set beside what should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bpkd_sdk.data.dataset import Finding, absent_classes
from bpkd_sdk.data.registry import DATASETS
from bpkd_sdk.errors import check_choice


@dataclass(frozen=True)
class SplitReport:
    """What one split of a data set holds.

    Attributes:
        split: Its name.
        images: How many images were found; None where the split could not be opened.
        expected: How many a whole copy has; None where that is not known.
        smallest: (height, width) of the image with the fewest pixels; None without any image.
        largest: (height, width) of the one with the most.
        absent_classes: Names of the classes that are in no label.
        problems: Everything that is wrong, one line each.
    """

    split: str
    images: int | None
    expected: int | None
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    absent_classes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def check_dataset(name: str, root: str | Path) -> list[SplitReport]:
    """Read a data set whole and report on each of its splits.

    Args:
        name: One of `DATASETS`.
        root: Where it lies.

    Raises:
        ValueError: For an unknown name. What is wrong with the data is in the reports.
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
    findings = dataset.examine()
    problems = [
        entry.count_problem(split, dataset),
        *(finding.problem or _wrong_size(finding, entry.image_size) or _turned(finding) for finding in findings),
    ]
    sizes = sorted((finding.size for finding in findings if finding.size), key=lambda size: size[0] * size[1])
    return SplitReport(
        split,
        len(dataset),
        expected,
        smallest=sizes[0] if sizes else None,
        largest=sizes[-1] if sizes else None,
        absent_classes=absent_classes(dataset, findings),
        problems=tuple(filter(None, problems)),
    )


def _wrong_size(finding: Finding, expected: tuple[int, int] | None) -> str | None:
    if expected is None or finding.size in (None, expected):
        return None
    return f"{finding.sample}: image is {finding.size}, all of this data set are {expected}"


def _turned(finding: Finding) -> str | None:
    if not finding.turned:
        return None
    return f"{finding.sample}: EXIF data turn the image, and the label is read as stored; does it fit the turned image?"
