"""Readers of four public data sets: Cityscapes, ADE20K, PASCAL Context and CamVid.

Each section has the classes and colours of a data set, the class of each value in its label files, the number of images
in its splits, where to get it, and the function that opens it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bpkd_sdk.data.dataset import FileDataset
from bpkd_sdk.data.pairs import Pair, pair_files
from bpkd_sdk.errors import check_choice, format_list, import_optional
from bpkd_sdk.files import read_json, write_atomically
from bpkd_sdk.progress import track
from bpkd_sdk.spec import Color


def find_root(root: str | Path, required: Sequence[str], *, nested: Sequence[str] = (), source: str) -> Path:
    """Return the folder that contains all `required` paths: `root`, or one of the `nested` folders in it.

    Args:
        root: Folder that the user passed.
        required: Relative paths of folders and files of the data set.
        nested: Relative paths of the folders that archives of the data set unpack to.
        source: Sentences about where to get the data, for the error message.

    Raises:
        FileNotFoundError: If a path is missing; with the content of the folder, and `source`.
    """
    top = Path(root)
    folders = [top / name for name in nested if (top / name).is_dir()]
    for folder in (top, *folders):
        if all((folder / name).exists() for name in required):
            return folder
    folder = folders[0] if folders else top
    missing = [name for name in required if not (folder / name).exists()]
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        state = f"it contains {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"
    else:
        state = "there is no such folder"
    raise FileNotFoundError(f"Expected {' and '.join(missing)} in {folder}, but {state}. {source}")


# ---------------------------------------------------------------------------------------------------------------------
# Cityscapes (Cordts et al., CVPR 2016): 19 classes, fine labels

CITYSCAPES_CLASSES: dict[str, Color] = {
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

# *_labelIds.png contain 34 ids; those that are not evaluated become void. 255 stands for the id -1 (licence plate).
CITYSCAPES_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_CLASS_OF_ID = dict.fromkeys((*range(34), 255), 255) | {
    label: index for index, label in enumerate(CITYSCAPES_LABEL_IDS)
}
CITYSCAPES_IMAGES = {"train": 2975, "val": 500}
CITYSCAPES_IMAGE_SIZE = (1024, 2048)
CITYSCAPES_SOURCE = (
    "Get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com/downloads/ "
    "(after registration) and unpack both into one folder."
)


def open_cityscapes(root: str | Path, split: str = "train") -> FileDataset:
    """Open ``root/leftImg8bit/<split>`` with ``root/gtFine/<split>``.

    Labels are the released ``*_labelIds.png``, whose ids are mapped to the 19 classes. If there are none, labels are
    the ``*_labelTrainIds.png`` that OpenMMLab's preparation writes.

    Args:
        root: Folder of the data set, or the folder that contains it under the name "cityscapes".
        split: "train" or "val".

    Raises:
        FileNotFoundError: If a folder is missing or empty; with where to get the data.
        ValueError: If the split is unknown, or if images lack labels.
    """
    check_choice("split", split, CITYSCAPES_IMAGES)
    images, labels = f"leftImg8bit/{split}", f"gtFine/{split}"
    top = find_root(root, (images, labels), nested=("cityscapes",), source=CITYSCAPES_SOURCE)
    by_id = next((top / labels).rglob("*_labelIds.png"), None) is not None
    kind = "labelIds" if by_id else "labelTrainIds"
    pairs = pair_files(top / images, top / labels, f"{{}}_leftImg8bit.*:{{}}_gtFine_{kind}.png")
    ids = CITYSCAPES_CLASS_OF_ID if by_id else None
    return FileDataset(
        f"cityscapes/{split}", pairs, tuple(CITYSCAPES_CLASSES), tuple(CITYSCAPES_CLASSES.values()), ids=ids
    )


# ---------------------------------------------------------------------------------------------------------------------
# ADE20K (Zhou et al., CVPR 2017), as in the scene parsing challenge of 2016: 150 classes

_ADE20K_NAMES = """
wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet; sidewalk; person; earth; door;
table; mountain; plant; curtain; chair; car; water; painting; sofa; shelf; house; sea; mirror; rug; field; armchair;
seat; fence; desk; rock; wardrobe; lamp; bathtub; railing; cushion; base; box; column; signboard; chest of drawers;
counter; sand; sink; skyscraper; fireplace; refrigerator; grandstand; path; stairs; runway; case; pool table;
pillow; screen door; stairway; river; bridge; bookcase; blind; coffee table; toilet; flower; book; hill; bench;
countertop; stove; palm; kitchen island; computer; swivel chair; boat; bar; arcade machine; hovel; bus; towel;
light; truck; tower; chandelier; awning; streetlight; booth; television receiver; airplane; dirt track; apparel;
pole; land; bannister; escalator; ottoman; bottle; buffet; poster; stage; van; ship; fountain; conveyer belt;
canopy; washer; plaything; swimming pool; stool; barrel; basket; waterfall; tent; bag; minibike; cradle; oven; ball;
food; step; tank; trade name; microwave; pot; animal; bicycle; lake; dishwasher; screen; blanket; sculpture; hood;
sconce; vase; traffic light; tray; ashcan; fan; pier; crt screen; plate; monitor; bulletin board; shower; radiator;
glass; clock; flag
"""
_ADE20K_COLORS = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652
8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0
ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff
00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff
ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff
00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500
0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff
b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""
ADE20K_CLASS_NAMES = tuple(name.strip() for name in _ADE20K_NAMES.replace("\n", " ").split(";"))
ADE20K_PALETTE: tuple[Color, ...] = tuple(
    (int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in _ADE20K_COLORS.split()
)

# Label 0 is "other objects", which is not a class; 255 is void already.
ADE20K_CLASS_OF_ID = {0: 255, 255: 255} | {index + 1: index for index in range(len(ADE20K_CLASS_NAMES))}
ADE20K_IMAGES = {"train": 20_210, "val": 2_000}
_ADE20K_FOLDERS = {"train": "training", "val": "validation"}
ADE20K_SOURCE = (
    "Get ADEChallengeData2016.zip from http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip and "
    "unpack it."
)


def open_ade20k(root: str | Path, split: str = "train") -> FileDataset:
    """Open ``root/images/training`` (or ``validation``) with ``root/annotations/training``; label 0 becomes void.

    Args:
        root: The folder ADEChallengeData2016, or the folder that contains it.
        split: "train" or "val".

    Raises:
        FileNotFoundError: If a folder is missing or empty; with where to get the data.
        ValueError: If the split is unknown, or if images lack labels.
    """
    check_choice("split", split, ADE20K_IMAGES)
    images, labels = f"images/{_ADE20K_FOLDERS[split]}", f"annotations/{_ADE20K_FOLDERS[split]}"
    top = find_root(root, (images, labels), nested=("ADEChallengeData2016",), source=ADE20K_SOURCE)
    pairs = pair_files(top / images, top / labels)
    return FileDataset(f"ade20k/{split}", pairs, ADE20K_CLASS_NAMES, ADE20K_PALETTE, ids=ADE20K_CLASS_OF_ID)


# ---------------------------------------------------------------------------------------------------------------------
# PASCAL Context (Mottaghi et al., CVPR 2014): 59 classes on the images of PASCAL VOC 2010

# Number of each class among the 459 categories of the release file.
PASCAL_CATEGORIES: dict[str, int] = {
    "aeroplane": 2, "bag": 9, "bed": 18, "bedclothes": 19, "bench": 22, "bicycle": 23, "bird": 25, "boat": 31,
    "book": 33, "bottle": 34, "building": 44, "bus": 45, "cabinet": 46, "car": 59, "cat": 65, "ceiling": 68,
    "chair": 72, "cloth": 80, "computer": 85, "cow": 98, "cup": 104, "curtain": 105, "dog": 113, "door": 115,
    "fence": 144, "floor": 158, "flower": 159, "food": 162, "grass": 187, "ground": 189, "horse": 207, "keyboard": 220,
    "light": 232, "motorbike": 258, "mountain": 259, "mouse": 260, "person": 284, "plate": 295, "platform": 296,
    "pottedplant": 308, "road": 324, "rock": 326, "sheep": 347, "shelves": 349, "sidewalk": 354, "sign": 355,
    "sky": 360, "snow": 366, "sofa": 368, "table": 397, "track": 415, "train": 416, "tree": 420, "truck": 424,
    "tvmonitor": 427, "wall": 440, "water": 445, "window": 454, "wood": 458,
}  # fmt: skip
PASCAL_CLASS_NAMES = tuple(PASCAL_CATEGORIES)
PASCAL_PALETTE = ADE20K_PALETTE[1:60]  # OpenMMLab's palette, without its first colour, which is the background's

# Label 0 is the background, which is not one of the 59 classes; 255 is void already.
PASCAL_CLASS_OF_ID = {0: 255, 255: 255} | {index + 1: index for index in range(len(PASCAL_CLASS_NAMES))}
PASCAL_IMAGES = {"train": 4996, "val": 5104}  # of the release; the paper of 2014 counts two images and one image more
PASCAL_NESTED = ("VOC2010", "VOCdevkit/VOC2010")
PASCAL_PHOTOS = "JPEGImages"
PASCAL_LABELS = "SegmentationClassContext"
PASCAL_LISTS = "ImageSets/SegmentationContext"
PASCAL_RELEASE = "trainval_merged.json"
PASCAL_SOURCE = (
    "Get VOCtrainval_03-May-2010.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ and unpack it; put "
    f"{PASCAL_RELEASE} (linked from OpenMMLab's page on data set preparation) into VOCdevkit/VOC2010; then run "
    "`bpkd data convert VOCdevkit`."
)


def open_pascal_context(root: str | Path, split: str = "train") -> FileDataset:
    """Open ``root/JPEGImages`` with ``root/SegmentationClassContext``; the background, label 0, becomes void.

    The file ``root/ImageSets/SegmentationContext/<split>.txt`` lists the images of a split. `convert_pascal_context`
    writes the labels and these lists, as OpenMMLab's preparation does.

    Args:
        root: The folder VOC2010, or the folder that contains VOC2010 or VOCdevkit/VOC2010.
        split: "train" or "val".

    Raises:
        FileNotFoundError: If a folder or a list is missing; with where to get the data.
        ValueError: If the split is unknown, if the list is empty, or if images or labels are missing.
    """
    check_choice("split", split, PASCAL_IMAGES)
    names = f"{PASCAL_LISTS}/{split}.txt"
    top = find_root(root, (PASCAL_PHOTOS, PASCAL_LABELS, names), nested=PASCAL_NESTED, source=PASCAL_SOURCE)
    stems = (top / names).read_text().split()
    if not stems:
        raise ValueError(f"{top / names} lists no image. {PASCAL_SOURCE}")
    pairs = existing(Pair(top / PASCAL_PHOTOS / f"{stem}.jpg", top / PASCAL_LABELS / f"{stem}.png") for stem in stems)
    return FileDataset(f"pascal_context_59/{split}", pairs, PASCAL_CLASS_NAMES, PASCAL_PALETTE, ids=PASCAL_CLASS_OF_ID)


def existing(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs if all their files exist.

    Raises:
        ValueError: If images or label files are missing; the first of them are listed.
    """
    pairs = list(pairs)
    if missing := [pair.image for pair in pairs if not pair.image.is_file()]:
        raise ValueError(f"{len(missing)} of {len(pairs)} images are missing:\n{format_list(missing)}")
    unlabelled = [f"{pair.image} (expected {pair.label})" for pair in pairs if pair.label and not pair.label.is_file()]
    if unlabelled:
        raise ValueError(f"{len(unlabelled)} of {len(pairs)} images have no label:\n{format_list(unlabelled)}")
    return pairs


Record = dict[str, Any]


def convert_pascal_context(root: str | Path) -> Path:
    """Write the labels and lists that `open_dataset("pascal_context_59", root=root)` reads.

    Each file is written atomically, and existing label files are kept, so that a second run continues an interrupted
    conversion. The lists are written last.

    Args:
        root: The folder VOC2010 with JPEGImages and trainval_merged.json, or the folder that contains VOC2010 or
            VOCdevkit/VOC2010.

    Returns:
        Path of the folder VOC2010.

    Raises:
        FileNotFoundError: If images or the release file are missing; with where to get them.
        ValueError: If the release file is truncated, is another file, or contradicts itself.
        ImportError: If pycocotools is not installed.
    """
    top = find_root(root, (PASCAL_PHOTOS, PASCAL_RELEASE), nested=PASCAL_NESTED, source=PASCAL_SOURCE)
    images, masks = _read_release(top / PASCAL_RELEASE)
    for image in track(images, total=len(images), description="Writing labels"):
        path = top / PASCAL_LABELS / f"{Path(image['file_name']).stem}.png"
        if not path.exists():
            label = _draw_label(image, masks[image["image_id"]], top / PASCAL_RELEASE)
            write_atomically(path, cv2.imencode(".png", label)[1].tobytes())
    for split in PASCAL_IMAGES:
        stems = sorted(Path(image["file_name"]).stem for image in images if image["phase"] == split)
        write_atomically(top / PASCAL_LISTS / f"{split}.txt", "".join(f"{stem}\n" for stem in stems).encode())
    return top


def _read_release(file: Path) -> tuple[list[Record], dict[Any, list[Record]]]:
    """Return the images of both splits (the release file lists others, without masks), and the masks by image."""
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error} Download it again. {PASCAL_SOURCE}") from error
    masks = defaultdict(list)
    try:
        images = [image for image in content["images"] if image["phase"] in PASCAL_IMAGES]
        for mask in content["annos_segmentation"]:
            masks[mask["image_id"]].append(mask)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not the release of PASCAL in Detail (it lacks {error}). {PASCAL_SOURCE}"
        ) from error
    return images, masks


def _draw_label(image: Record, masks: list[Record], file: Path) -> np.ndarray:
    """Draw the masks of an image into a label map, uint8 (H, W), in their order."""
    coco = import_optional("pycocotools.mask")
    categories = np.zeros((image["height"], image["width"]), np.int64)
    for mask in masks:
        covered = coco.decode(mask["segmentation"]).astype(bool)
        if covered.shape != categories.shape:
            raise ValueError(
                f"{file}: a mask of {image['file_name']} is {covered.shape}, the image {categories.shape}."
            )
        categories[covered] = mask["category_id"]
    numbers = np.array([0, *PASCAL_CATEGORIES.values()])
    if unknown := set(np.unique(categories).tolist()) - set(numbers.tolist()):
        raise ValueError(f"{file}: {image['file_name']} has categories {sorted(unknown)}, which are not among the 59.")
    return np.searchsorted(numbers, categories).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# CamVid (Brostow et al., 2009): 11 classes, images of 480x360

CAMVID_CLASSES: dict[str, Color] = {
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
CAMVID_IMAGES = {"train": 367, "val": 101}


def open_camvid(root: str | Path, split: str = "train") -> FileDataset:
    """Open ``root/images/<split>`` with ``root/labels/<split>``: ids 0 to 10 in the order of the classes, 255 is void.

    Args:
        root: Folder of the data set.
        split: Name of the split.

    Raises:
        FileNotFoundError: If a folder is missing or empty.
        ValueError: If images lack labels.
    """
    root = Path(root)
    pairs = pair_files(root / "images" / split, root / "labels" / split)
    return FileDataset(f"camvid/{split}", pairs, tuple(CAMVID_CLASSES), tuple(CAMVID_CLASSES.values()))
