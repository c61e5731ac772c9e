"""PASCAL Context (Mottaghi et al., CVPR 2014), the 59 most frequent classes, on the images of VOC 2010.

The classes stand in the order of the label files that `convert_pascal_context` and OpenMMLab's own preparation write,
which is alphabetical. Checkpoints of OpenMMLab's early versions carry the names in another order; their logits do not.
"""

from __future__ import annotations

from pathlib import Path

from bpkd_sdk.data.ade20k import PALETTE as ADE20K_PALETTE
from bpkd_sdk.data.dataset import FileDataset, Pair, complete
from bpkd_sdk.data.layout import find_root
from bpkd_sdk.errors import check_choice

# Name of each class, and its number among the 459 categories of the release.
CATEGORIES: dict[str, int] = {
    "aeroplane": 2, "bag": 9, "bed": 18, "bedclothes": 19, "bench": 22, "bicycle": 23, "bird": 25, "boat": 31,
    "book": 33, "bottle": 34, "building": 44, "bus": 45, "cabinet": 46, "car": 59, "cat": 65, "ceiling": 68,
    "chair": 72, "cloth": 80, "computer": 85, "cow": 98, "cup": 104, "curtain": 105, "dog": 113, "door": 115,
    "fence": 144, "floor": 158, "flower": 159, "food": 162, "grass": 187, "ground": 189, "horse": 207, "keyboard": 220,
    "light": 232, "motorbike": 258, "mountain": 259, "mouse": 260, "person": 284, "plate": 295, "platform": 296,
    "pottedplant": 308, "road": 324, "rock": 326, "sheep": 347, "shelves": 349, "sidewalk": 354, "sign": 355,
    "sky": 360, "snow": 366, "sofa": 368, "table": 397, "track": 415, "train": 416, "tree": 420, "truck": 424,
    "tvmonitor": 427, "wall": 440, "water": 445, "window": 454, "wood": 458,
}  # fmt: skip
CLASS_NAMES = tuple(CATEGORIES)
PALETTE = ADE20K_PALETTE[1:60]  # OpenMMLab's choice; its first colour is for the background

# Label 0 is the background, which the 59 classes leave out; 255 is void already.
CLASS_OF_ID = {0: 255, 255: 255} | {index + 1: index for index in range(len(CLASS_NAMES))}

SPLITS = {"train": 4996, "val": 5104}  # of the release; two images and one fewer than in the paper of 2014
FOLDERS = ("VOC2010", "VOCdevkit/VOC2010")
IMAGES, LABELS, LISTS = "JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"
RELEASE = "trainval_merged.json"
SOURCE = (
    "Get VOCtrainval_03-May-2010.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ and unpack it; put "
    f"{RELEASE} (linked from OpenMMLab's page on data set preparation) into VOCdevkit/VOC2010; then run "
    "`bpkd data convert VOCdevkit`."
)


def open_pascal_context(root: str | Path, split: str = "train") -> FileDataset:
    """Open ``root/JPEGImages`` with ``root/SegmentationClassContext``; the background, label 0, becomes void.

    Which images belong to a split is listed in ``root/ImageSets/SegmentationContext/<split>.txt``. Labels and lists
    are written by `convert_pascal_context`, or by OpenMMLab's preparation.

    Args:
        root: The folder VOC2010, or one that holds VOCdevkit/VOC2010.
        split: "train" or "val".

    Raises:
        FileNotFoundError: If a folder or a list is missing; with where to get the data.
        ValueError: For another split, an empty list, or if images or labels are missing.
    """
    check_choice("split", split, SPLITS)
    names = f"{LISTS}/{split}.txt"
    top = find_root(root, (IMAGES, LABELS, names), nested=FOLDERS, source=SOURCE)
    stems = (top / names).read_text().split()
    if not stems:
        raise ValueError(f"{top / names} lists no image. {SOURCE}")
    pairs = complete(Pair(top / IMAGES / f"{stem}.jpg", top / LABELS / f"{stem}.png") for stem in stems)
    return FileDataset(f"pascal_context_59/{split}", pairs, CLASS_NAMES, PALETTE, ids=CLASS_OF_ID)
