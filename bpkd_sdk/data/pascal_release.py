"""PASCAL Context from its release file: run-length masks in one JSON to a label PNG for each image, and the lists.

The rule is that of the release's own `detail` package with OpenMMLab's preparation on top: the masks of an image are
painted in the order of the file, later over earlier, and the categories become 1 to 59 by ascending number; what no
mask covers is 0, the background.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bpkd_sdk.data.layout import find_root
from bpkd_sdk.data.pascal_context import CATEGORIES, FOLDERS, IMAGES, LABELS, LISTS, RELEASE, SOURCE, SPLITS
from bpkd_sdk.errors import import_optional
from bpkd_sdk.models.checkpoint import write_atomically
from bpkd_sdk.progress import track

Record = dict[str, Any]


def convert_pascal_context(root: str | Path) -> Path:
    """Write the labels and lists that `open_dataset("pascal_context_59", root)` reads.

    Files are written one by one and whole, and those that are there already are kept: an interrupted conversion goes
    on where it stopped. The lists come last.

    Args:
        root: The folder VOC2010 with JPEGImages and trainval_merged.json in it, or one that holds VOCdevkit/VOC2010.

    Returns:
        The folder VOC2010.

    Raises:
        FileNotFoundError: If images or the release file are missing; with where to get them.
        ValueError: If the release file is cut short, is of another kind, or contradicts itself.
        ImportError: If pycocotools is missing.
    """
    top = find_root(root, (IMAGES, RELEASE), nested=FOLDERS, source=SOURCE)
    images, masks = _read_release(top / RELEASE)
    for image in track(images, total=len(images), description="Writing labels"):
        target = top / LABELS / f"{Path(image['file_name']).stem}.png"
        if not target.exists():
            label = _paint(image, masks[image["image_id"]], top / RELEASE)
            write_atomically(target, cv2.imencode(".png", label)[1].tobytes())
    for split in SPLITS:
        stems = sorted(Path(image["file_name"]).stem for image in images if image["phase"] == split)
        write_atomically(top / LISTS / f"{split}.txt", "".join(f"{stem}\n" for stem in stems).encode())
    return top


def _read_release(file: Path) -> tuple[list[Record], dict[Any, list[Record]]]:
    """The images of training and validation (there are others, without masks), and the masks by image."""
    try:
        content = json.loads(file.read_bytes())
        images = [image for image in content["images"] if image["phase"] in SPLITS]
        masks = defaultdict(list)
        for mask in content["annos_segmentation"]:
            masks[mask["image_id"]].append(mask)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not whole ({error}). Fetch it again. {SOURCE}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the release of PASCAL in Detail (it lacks {error}). {SOURCE}") from error
    return images, masks


def _paint(image: Record, masks: list[Record], file: Path) -> np.ndarray:
    """uint8 (H, W) label of one image."""
    coco = import_optional("pycocotools.mask", "data")
    categories = np.zeros((image["height"], image["width"]), np.int64)
    for mask in masks:
        covered = coco.decode(mask["segmentation"]).astype(bool)
        if covered.shape != categories.shape:
            raise ValueError(
                f"{file}: a mask of {image['file_name']} is {covered.shape}, the image {categories.shape}."
            )
        categories[covered] = mask["category_id"]
    numbers = np.array([0, *CATEGORIES.values()])
    if strange := set(np.unique(categories).tolist()) - set(numbers.tolist()):
        raise ValueError(f"{file}: {image['file_name']} has categories {sorted(strange)}, which are not among the 59.")
    return np.searchsorted(numbers, categories).astype(np.uint8)
