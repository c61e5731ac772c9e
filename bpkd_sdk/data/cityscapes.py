"""Cityscapes (Cordts et al., CVPR 2016), 19 classes, fine labels."""

from __future__ import annotations

from pathlib import Path

from bpkd_sdk.data.dataset import FileDataset, pair_files
from bpkd_sdk.data.layout import find_root
from bpkd_sdk.errors import check_choice
from bpkd_sdk.models.spec import Color

CLASSES: dict[str, Color] = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}

# The 34 ids of *_labelIds.png; those that are not evaluated become void. 255 is what -1 (licence plate) is stored as.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CLASS_OF_ID = dict.fromkeys((*range(34), 255), 255) | {label: index for index, label in enumerate(LABEL_IDS)}

SPLITS = {"train": 2975, "val": 500}
IMAGE_SIZE = (1024, 2048)
SOURCE = (
    "Get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com/downloads/ "
    "(after registration) and unpack both into one folder."
)


def open_cityscapes(root: str | Path, split: str = "train") -> FileDataset:
    """Open ``root/leftImg8bit/<split>`` with ``root/gtFine/<split>``.

    Labels are ``*_labelIds.png`` as released, whose ids are mapped to the 19 classes here; where there are none, the
    ``*_labelTrainIds.png`` that OpenMMLab's preparation writes.

    Raises:
        FileNotFoundError: If a folder is missing or empty; with where to get the data.
        ValueError: For another split, or if images lack labels.
    """
    check_choice("split", split, SPLITS)
    images, labels = f"leftImg8bit/{split}", f"gtFine/{split}"
    top = find_root(root, (images, labels), nested=("cityscapes",), source=SOURCE)
    by_id = next((top / labels).rglob("*_labelIds.png"), None) is not None
    ending = "_gtFine_labelIds.png" if by_id else "_gtFine_labelTrainIds.png"
    pairs = pair_files(top / images, top / labels, lambda stem: stem.removesuffix("_leftImg8bit") + ending)
    ids = CLASS_OF_ID if by_id else None
    return FileDataset(f"cityscapes/{split}", pairs, tuple(CLASSES), tuple(CLASSES.values()), ids=ids)
