"""CamVid (Brostow et al., 2009), 11 classes, in the SegNet split."""

from __future__ import annotations

from pathlib import Path

from bpkd_sdk.data.dataset import FileDataset, pair_files
from bpkd_sdk.models.spec import Color

CLASSES: dict[str, Color] = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
SPLITS = {"train": 367, "val": 101}


def open_camvid(root: str | Path, split: str = "train") -> FileDataset:
    """Open ``root/images/<split>`` with ``root/labels/<split>``: ids 0 to 10 in the order of `CLASSES`, 255 void.

    Raises:
        FileNotFoundError: If a folder is missing or empty.
        ValueError: If images lack labels.
    """
    root = Path(root)
    pairs = pair_files(root / "images" / split, root / "labels" / split)
    return FileDataset(f"camvid/{split}", pairs, tuple(CLASSES), tuple(CLASSES.values()))
