"""Data sets: named ones, folders, and the base class for other sources."""

from __future__ import annotations

from pathlib import Path

from bpkd_sdk.data.adapt import as_dataset
from bpkd_sdk.data.convert import ConversionReport, convert_annotations
from bpkd_sdk.data.dataset import DatasetSubset, FileDataset, SegmentationDataset
from bpkd_sdk.data.folder import open_folder
from bpkd_sdk.data.integrity import SplitReport, check_dataset
from bpkd_sdk.data.pairs import Pair, pair_files
from bpkd_sdk.data.public import convert_pascal_context
from bpkd_sdk.data.registry import DATASETS, DatasetEntry, find_folder
from bpkd_sdk.data.shapes import ShapesDataset
from bpkd_sdk.errors import did_you_mean

__all__ = [
    "DATASETS",
    "ConversionReport",
    "DatasetEntry",
    "DatasetSubset",
    "FileDataset",
    "Pair",
    "SegmentationDataset",
    "ShapesDataset",
    "SplitReport",
    "as_dataset",
    "check_dataset",
    "convert_annotations",
    "convert_pascal_context",
    "open_dataset",
    "pair_files",
]


def open_dataset(
    path_or_name: str | Path,
    root: str | Path | None = None,
    split: str = "train",
    *,
    pattern: str | None = None,
    val_share: float | None = None,
    val_seed: int = 0,
    skip_unlabelled: bool = False,
) -> SegmentationDataset:
    """Open a data set.

    Args:
        path_or_name: Path of a folder in the layout that `open_folder` describes, or the name of a data set: "shapes"
            (generated scenes, which need no `root`), "folder", "camvid", "cityscapes", "ade20k" or
            "pascal_context_59".
        root: Folder of a named data set, in the layout that OpenMMLab documents.
        split: "train", "val", or another split of the data set.
        pattern: Paths of images and labels in a folder, such as ``"photos/{split}/{}.jpg:masks/{split}/{}_gt.png"``;
            see `open_folder`.
        val_share: Share of a folder's training images that becomes the split "val", for example 0.1; see `open_folder`.
        val_seed: Seed of the division by `val_share`.
        skip_unlabelled: Whether images of a folder without a label file are left out instead of refused.

    Raises:
        ValueError: If the name is unknown, `root` is missing, or the data cannot be used.
        FileNotFoundError: If the data do not exist; with where to get them.
    """
    name = str(path_or_name)
    if folder := find_folder(path_or_name, root):
        return open_folder(
            folder, split, pattern=pattern, val_share=val_share, val_seed=val_seed, skip_unlabelled=skip_unlabelled
        )
    if name in ("shapes", *DATASETS):
        _check_no_selection(name, pattern=pattern, val_share=val_share, skip_unlabelled=skip_unlabelled or None)
    if path_or_name == "shapes":
        return ShapesDataset(split)
    if root is None and name not in DATASETS and (isinstance(path_or_name, Path) or "/" in name or "\\" in name):
        raise FileNotFoundError(f"There is no folder {name}.")
    if name not in DATASETS:
        if Path(name).is_dir():
            raise ValueError(
                f"{name} is a folder and needs no `root`, but got root={str(root)!r}. Pass a split by its name: "
                f"open_dataset({name!r}, split={str(root)!r})."
            )
        names = ["shapes", *DATASETS]
        raise ValueError(
            f"There is no folder {name!r} and no data set of that name.{did_you_mean(name, names)} Named data sets: "
            f"{', '.join(names)}."
        )
    if root is None:
        raise ValueError(f"The data set {name!r} needs `root`, the folder of its images and labels.")
    return DATASETS[name].open(root, split)


def _check_no_selection(name: str, **options: object) -> None:
    if given := [option for option, value in options.items() if value is not None]:
        raise ValueError(
            f"{given[0]} selects files of a folder, but {name!r} is a data set with a fixed layout. Leave it out, or "
            "pass the path of a folder."
        )
