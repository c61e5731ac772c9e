"""Named data sets: `open_dataset`, the generated "shapes", and a registry of the others with their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bpkd_sdk.data.dataset import FileDataset, SegmentationDataset
from bpkd_sdk.data.folder import open_folder
from bpkd_sdk.data.names import SHAPES, check_data, find_folder
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
from bpkd_sdk.data.shapes import CLASS_NAMES, PALETTE, render


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
    check_data(path_or_name, root)
    name = str(path_or_name)
    if folder := find_folder(path_or_name, root):
        return open_folder(
            folder, split, pattern=pattern, val_share=val_share, val_seed=val_seed, skip_unlabelled=skip_unlabelled
        )
    _check_no_selection(name, pattern=pattern, val_share=val_share, skip_unlabelled=skip_unlabelled or None)
    if name == SHAPES:
        return ShapesDataset(split)
    assert root is not None  # noqa: S101  (checked above)
    return DATASETS[name].open(root, split)


def _check_no_selection(name: str, **options: object) -> None:
    if given := [option for option, value in options.items() if value is not None]:
        raise ValueError(
            f"{given[0]} selects files of a folder, but {name!r} is a data set with a fixed layout. Leave it out, or "
            "pass the path of a folder."
        )


class ShapesDataset(SegmentationDataset):
    """Generated scenes of overlapping, textured objects with thin and thick parts.

    Args:
        split: Name of the split, "train", "val" or any other. Splits have no scene in common.
        length: Number of scenes; None: 400 for "train" and 100 for other splits.
        size: (height, width) of the images in pixels, each at least 32.
        seed: Seed of the data set.
    """

    def __init__(
        self, split: str = "train", *, length: int | None = None, size: tuple[int, int] = (128, 128), seed: int = 0
    ) -> None:
        self.name = f"shapes/{split}"
        self.class_names = CLASS_NAMES
        self.palette = PALETTE
        self.split = split
        self.length = length if length is not None else (400 if split == "train" else 100)
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"Expected an index in [0, {self.length}), but got {index}.")
        image, label = render(self.seed, self.split, index, self.size)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)


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
