"""Registry of the named data sets: how each is opened, and how many images a complete copy has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bpkd_sdk.data.dataset import FileDataset
from bpkd_sdk.data.folder import open_folder
from bpkd_sdk.data.public import (
    ADE20K_IMAGES,
    CAMVID_IMAGES,
    CITYSCAPES_IMAGE_SIZE,
    CITYSCAPES_IMAGES,
    PASCAL_IMAGES,
    open_ade20k,
    open_camvid,
    open_cityscapes,
    open_pascal_context,
)


@dataclass(frozen=True)
class DatasetEntry:
    """A data set that `open_dataset` opens by name.

    Attributes:
        open: Function that opens a split in the folder of the data set.
        images: Number of images in each split of a complete copy; None if it depends on the user's data.
        image_size: (height, width) of all images; None if they differ.
    """

    open: Callable[[str | Path, str], FileDataset]
    images: Mapping[str, int | None]
    image_size: tuple[int, int] | None = None

    def count_problem(self, split: str, dataset: FileDataset) -> str | None:
        """Return the difference between the number of images in a split and in a complete copy, or None."""
        expected = self.images.get(split)
        if expected in (None, len(dataset)):
            return None
        return f"{len(dataset)} images, but a complete copy has {expected}"


DATASETS: dict[str, DatasetEntry] = {
    "folder": DatasetEntry(open_folder, {"train": None, "val": None}),
    "camvid": DatasetEntry(open_camvid, CAMVID_IMAGES),
    "cityscapes": DatasetEntry(open_cityscapes, CITYSCAPES_IMAGES, CITYSCAPES_IMAGE_SIZE),
    "ade20k": DatasetEntry(open_ade20k, ADE20K_IMAGES),
    "pascal_context_59": DatasetEntry(open_pascal_context, PASCAL_IMAGES),
}


def find_folder(path_or_name: str | Path, root: str | Path | None = None) -> Path | None:
    """Return the folder that the arguments of `open_dataset` state, or None if they name another data set."""
    if root is not None:
        return Path(root) if path_or_name == "folder" else None
    return Path(path_or_name) if path_or_name != "shapes" and Path(path_or_name).is_dir() else None
