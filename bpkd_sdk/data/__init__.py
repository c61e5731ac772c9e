"""Data sets by name, and the classes to build your own from."""

from __future__ import annotations

from pathlib import Path

from bpkd_sdk.data.dataset import DatasetSubset, FileDataset, Pair, SegmentationDataset, pair_files
from bpkd_sdk.data.folder import open_folder
from bpkd_sdk.data.integrity import SplitReport, check_dataset
from bpkd_sdk.data.public import convert_pascal_context
from bpkd_sdk.data.registry import DATASETS, DatasetEntry
from bpkd_sdk.data.shapes import ShapesDataset
from bpkd_sdk.errors import check_choice

__all__ = [
    "DATASETS",
    "DatasetEntry",
    "DatasetSubset",
    "FileDataset",
    "Pair",
    "SegmentationDataset",
    "ShapesDataset",
    "SplitReport",
    "check_dataset",
    "convert_pascal_context",
    "open_dataset",
    "pair_files",
]


def open_dataset(name: str | Path, root: str | Path | None = None, split: str = "train") -> SegmentationDataset:
    """Open a data set.

    Args:
        name: "shapes" (embedded, needs no root), "folder", "camvid", "cityscapes", "ade20k", "pascal_context_59", or
            the path of a folder in "folder" layout.
        root: Where the data lies, in the layout that OpenMMLab documents.
        split: "train" or "val", or any other split the data has.

    Raises:
        ValueError: For an unknown name, a missing root, or data that cannot be used.
        FileNotFoundError: If the data is not there; with where to get it.
    """
    if name == "shapes":
        return ShapesDataset(split)
    if root is None and Path(name).is_dir():
        return open_folder(name, split)
    if root is None and str(name) not in DATASETS and (isinstance(name, Path) or "/" in name or "\\" in name):
        raise FileNotFoundError(f"There is no folder {name}.")
    check_choice("name", str(name), ["shapes", *DATASETS])
    if root is None:
        raise ValueError(f"The data set {str(name)!r} needs `root`, the folder that holds its images and labels.")
    return DATASETS[str(name)].open(root, split)
