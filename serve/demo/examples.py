"""The example images of the demo: their selection, their labels and their thumbnails."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from bpkd_sdk.classes import check_data_classes, class_order, reorder_labels
from bpkd_sdk.colors import distinct_colors
from bpkd_sdk.data import shapes
from bpkd_sdk.data.classes_file import CLASSES_FILE
from bpkd_sdk.data.folder_classes import find_classes
from bpkd_sdk.data.labels import read_class_ids
from bpkd_sdk.data.pairs import Pair, pair_files
from bpkd_sdk.images import read_pixels
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.serve.networks import ModelSet
from bpkd_sdk.spec import NetworkSpec

MAX_EXAMPLES = 12
_THUMBNAIL_SIDE = 192  # pixels of the longer side


def collect_examples(models: ModelSet, source: str | Path | None, path: Path) -> list[Pair]:
    """Return the example images, with labels where they exist.

    Args:
        models: Networks of the demo. Their classes decide how labels are read.
        source: Folder of examples; None generates scenes if a network was trained on them.
        path: Folder for the files that are written.
    """
    if source is not None:
        pairs = find_examples(Path(source))
        specs = [model.predictor.runtime.spec for model in models.available]
        return convert_labels(pairs, Path(source), specs[0], path) if specs else pairs
    if any(model.predictor.class_names == shapes.CLASS_NAMES for model in models.available):
        return generate_examples(path)
    return []


def find_examples(source: Path) -> list[Pair]:
    """Return at most `MAX_EXAMPLES` images, evenly spread over a folder.

    Args:
        source: Folder of images, or folder that contains ``images`` and ``labels`` (PNG files with the same names).

    Raises:
        FileNotFoundError: If the folder does not exist or contains no image.
        ValueError: If the folder contains labels, but an image has none.
    """
    images, labels = source / "images", source / "labels"
    pairs = pair_files(images, labels if labels.is_dir() else None) if images.is_dir() else pair_files(source, None)
    return pairs[:: -(-len(pairs) // MAX_EXAMPLES)]


def convert_labels(pairs: list[Pair], source: Path, network: NetworkSpec, path: Path) -> list[Pair]:
    """Write the labels of examples as PNG files of the network's class ids, using the classes of ``classes.json``.

    Args:
        pairs: Images and labels in the folder `source`.
        source: Folder with ``classes.json``. Without this file, labels are already ids of the network's classes.
        network: Spec of a network of the demo.
        path: Folder for the PNG files.

    Returns:
        The images with the converted labels, in which 255 is void.

    Raises:
        ValueError: If a label cannot be read, or the classes differ from those of the network.
    """
    if not (source / CLASSES_FILE).is_file() or any(pair.label is None for pair in pairs):
        return pairs
    labels, name = [pair.label for pair in pairs if pair.label], str(source)
    classes = find_classes(source, labels)
    names, void = classes.names, classes.ignore_index
    palette = classes.palette or distinct_colors(names)
    check_data_classes(name, names, palette, void)
    data = NetworkSpec(None, len(names), class_names=names, palette=palette)
    order = class_order(network, data, network_name="the network", data_name=name)
    converted = []
    for index, (pair, label_file) in enumerate(zip(pairs, labels, strict=True)):
        ids = read_class_ids(label_file, classes.ids, classes.colors, void, name)
        label = reorder_labels(ids.astype(np.int64), order, void)
        label_path = path / f"{index}_label.png"
        cv2.imwrite(str(label_path), np.where(label == void, 255, label).astype(np.uint8))
        converted.append(Pair(pair.image, label_path))
    return converted


def generate_examples(path: Path) -> list[Pair]:
    """Write scenes of the embedded data set `shapes`, with labels, into a folder."""
    pairs = []
    for index in range(MAX_EXAMPLES):
        pair = Pair(path / f"scene_{index + 1}.png", path / f"scene_{index + 1}_label.png")
        image, label = shapes.render(0, "val", index)
        cv2.imwrite(str(pair.image), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        cv2.imwrite(str(pair.label), label)
        pairs.append(pair)
    return pairs


def write_thumbnail(source: Path, path: Path, pixels: PixelFormat) -> str:
    """Write a small version of the image `source` into the folder `path`, and return its path."""
    image = pixels.picture(read_pixels(source, pixels))
    scale = _THUMBNAIL_SIDE / max(image.shape[:2])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    thumbnail = cv2.resize(image, None, fx=scale, fy=scale, interpolation=interpolation)
    thumbnail_path = path / f"{source.stem}.thumbnail.jpg"
    cv2.imwrite(str(thumbnail_path), cv2.cvtColor(thumbnail, cv2.COLOR_RGB2BGR))
    return str(thumbnail_path)
