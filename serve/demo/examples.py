"""Images to start with: those of a folder, or generated scenes for networks that were trained on them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from bpkd_sdk.classes import class_order, reorder_labels
from bpkd_sdk.data import shapes
from bpkd_sdk.data.dataset import Pair, pair_files
from bpkd_sdk.data.folder import CLASSES_FILE, FolderDataset, find_classes
from bpkd_sdk.images import read_image
from bpkd_sdk.models.spec import NetworkSpec

MOST = 12
_THUMBNAIL = 192  # pixels of the longer side


def find_examples(folder: Path) -> list[Pair]:
    """At most `MOST` images, evenly spread over a folder.

    Args:
        folder: Of images; or with ``images`` and ``labels`` (PNGs of the same names) below it.

    Raises:
        FileNotFoundError: If there is no such folder, or no image in it.
        ValueError: If an image has no label where there are labels.
    """
    images, labels = folder / "images", folder / "labels"
    pairs = pair_files(images, labels if labels.is_dir() else None) if images.is_dir() else pair_files(folder, None)
    return pairs[:: -(-len(pairs) // MOST)]


def read_labels(pairs: list[Pair], folder: Path, network: NetworkSpec, target: Path) -> list[Pair]:
    """Write the labels of examples as PNGs of the network's class ids, as ``classes.json`` defines them.

    Args:
        pairs: Images and labels below the folder.
        folder: The folder with ``classes.json``; without that file, labels are ids of the network's classes already.
        network: Classes of the networks on show.
        target: Folder to write to.

    Returns:
        The images with the labels that were written; 255 is void.

    Raises:
        ValueError: If a label cannot be read, or the classes are not the network's.
    """
    if not (folder / CLASSES_FILE).is_file() or any(pair.label is None for pair in pairs):
        return pairs
    data = FolderDataset(folder, "examples", pairs, find_classes(folder))
    data.check_classes()
    order = class_order(network, data, network_name="the network", data_name=str(folder))
    written = []
    for index, pair in enumerate(pairs):
        label = reorder_labels(data[index][1].long(), order, data.ignore_index).numpy()
        path = target / f"{index}_label.png"
        cv2.imwrite(str(path), np.where(label == data.ignore_index, 255, label).astype(np.uint8))
        written.append(Pair(pair.image, path))
    return written


def generate_examples(folder: Path) -> list[Pair]:
    """Scenes of the embedded data set, with labels, written into a folder."""
    pairs = []
    for index in range(MOST):
        pair = Pair(folder / f"scene_{index + 1}.png", folder / f"scene_{index + 1}_label.png")
        image, label = shapes.render(0, "val", index)
        cv2.imwrite(str(pair.image), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        cv2.imwrite(str(pair.label), label)
        pairs.append(pair)
    return pairs


def write_thumbnail(path: Path, folder: Path) -> str:
    """Write a small picture of an image into a folder, and return its path."""
    image = read_image(path)
    scale = _THUMBNAIL / max(image.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=way)
    target = folder / f"{path.stem}.thumbnail.jpg"
    cv2.imwrite(str(target), cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
    return str(target)
