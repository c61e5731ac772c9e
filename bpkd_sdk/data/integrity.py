"""Check of all files of a data set, for `bpkd data check`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bpkd_sdk.data.checks import SampleReport, absent_classes, inspect_samples
from bpkd_sdk.data.dataset import FileDataset
from bpkd_sdk.data.folder import open_folder
from bpkd_sdk.data.layout import folder_splits
from bpkd_sdk.data.names import SHAPES, check_data, find_folder
from bpkd_sdk.data.registry import DATASETS, DatasetEntry


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


def check_dataset(path_or_name: str | Path, root: str | Path | None = None, **selection: Any) -> list[SplitReport]:
    """Read all splits of a data set in files and report on each.

    Args:
        path_or_name: Path of a folder, or name of a data set, one of `DATASETS`.
        root: Folder of a named data set.
        **selection: Options of `open_folder`, such as ``val_share``.

    Raises:
        ValueError: If the name is unknown, or an option cannot be used. Problems of the data are in the reports.
        FileNotFoundError: If the folder does not exist, or its layout is not known.
    """
    if path_or_name == SHAPES:
        raise ValueError("The scenes of 'shapes' are generated, so there are no files to check.")
    check_data(path_or_name, root)
    if folder := find_folder(path_or_name, root):
        entry = DATASETS["folder"]
        found = folder_splits(folder, selection.get("pattern"))
        splits = ["train", "val"] if found or selection.get("val_share") is not None else []
        if not splits:
            open_folder(folder, **selection)  # raises an error that describes the layout
        return [
            _check_split(entry, split, partial(open_folder, folder, split, **selection))
            for split in dict.fromkeys([*splits, *found])
        ]
    assert root is not None  # noqa: S101  (checked above)
    entry = DATASETS[str(path_or_name)]
    return [_check_split(entry, split, partial(entry.open, root, split)) for split in entry.images]


def _check_split(entry: DatasetEntry, split: str, open_split: Callable[[], FileDataset]) -> SplitReport:
    expected = entry.images.get(split)
    try:
        dataset = open_split()
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
