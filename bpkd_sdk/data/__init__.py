"""Data sets: named ones, folders, and the base class for other sources.

Each name is imported when it is first used: the scenes of "shapes", label files and file lists need no torch.
"""

from typing import TYPE_CHECKING

from bpkd_sdk.errors import lazy_names

if TYPE_CHECKING:
    from bpkd_sdk.data.adapt import as_dataset
    from bpkd_sdk.data.convert import ConversionReport, convert_annotations
    from bpkd_sdk.data.dataset import DatasetSubset, FileDataset, SegmentationDataset
    from bpkd_sdk.data.integrity import SplitReport, check_dataset
    from bpkd_sdk.data.pairs import Pair, pair_files
    from bpkd_sdk.data.public import convert_pascal_context
    from bpkd_sdk.data.registry import DATASETS, DatasetEntry, ShapesDataset, open_dataset

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

__getattr__ = lazy_names(
    __name__,
    {
        "bpkd_sdk.data.adapt": ("as_dataset",),
        "bpkd_sdk.data.convert": ("ConversionReport", "convert_annotations"),
        "bpkd_sdk.data.dataset": ("DatasetSubset", "FileDataset", "SegmentationDataset"),
        "bpkd_sdk.data.integrity": ("SplitReport", "check_dataset"),
        "bpkd_sdk.data.pairs": ("Pair", "pair_files"),
        "bpkd_sdk.data.public": ("convert_pascal_context",),
        "bpkd_sdk.data.registry": ("DATASETS", "DatasetEntry", "ShapesDataset", "open_dataset"),
    },
)
