"""Conversion of annotations and of coloured masks into a folder of id masks that `open_dataset` reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bpkd_sdk.data.annotations import AnnotatedImage, Annotations, read_annotations
from bpkd_sdk.data.annotations.classes import VOID_ID, ClassMap, choose_classes
from bpkd_sdk.data.annotations.images import check_sizes, locate_images
from bpkd_sdk.data.annotations.model import Regions
from bpkd_sdk.data.annotations.writing import check_folder, link, write_classes, write_labels
from bpkd_sdk.data.classes_file import CLASSES_FILE, VOID, read_classes
from bpkd_sdk.data.folder import FolderDataset, open_folder
from bpkd_sdk.data.pairs import list_files
from bpkd_sdk.errors import import_optional
from bpkd_sdk.files import file_sha256, write_json
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.progress import track


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion.

    Attributes:
        path: Folder of the data set.
        split: Name of the split.
        format: Name of the format that was converted.
        images: Number of images.
        background_only: Number of images without any annotated pixel.
        class_images: Number of images in which each class occurs, and "void".
        class_pixels: Number of pixels of each class, and of "void".
    """

    path: Path
    split: str
    format: str
    images: int
    background_only: int
    class_images: Mapping[str, int]
    class_pixels: Mapping[str, int]


def convert_annotations(
    source: str | Path,
    path: str | Path,
    *,
    split: str = "train",
    images: str | Path | None = None,
    class_map: ClassMap | None = None,
    background: str | None = None,
    skip_unlabelled: bool = False,
    skip_missing: bool = False,
    **selection: Any,
) -> ConversionReport:
    """Write annotations as id masks into a folder that `open_dataset` reads.

    Images become hard links, or copies on another disk. Labels are PNG files of class ids, 255 for void. The classes
    are written to ``classes.json``; if it exists, its classes, their order and its format of images are used. Every
    file is written atomically. ``conversion-<split>.json`` records the conversion: the same call continues an
    interrupted one, and files of others are never overwritten. If annotations cannot be drawn, the first of them are
    listed, and no label remains.

    - COCO instances: larger ones are drawn first; crowds are void. COCO panoptic files need the folder of their PNG
      files beside the JSON file. See `read_coco`.
    - LabelMe and CVAT: shapes are drawn in their order, in CVAT by ``z_order`` first. See `read_labelme`, `read_cvat`.
    - A folder of images and masks, as `open_folder` reads it: colours, palettes and other values become ids.

    Polygons, rectangles and ellipses are filled by pycocotools. Annotations apply to the upright image; a size that
    differs from the image's is refused.

    Args:
        source: COCO file, CVAT file, folder of LabelMe files, or folder of images and masks.
        path: Folder of the data set to write.
        split: Name of the split to write. For a folder of images and masks, also that of the split to read.
        images: Folder of the images; None: the folder of the annotations.
        class_map: Categories of each class, such as ``{"vehicle": ["car", "truck"], "void": "sky"}``, in the order of
            the classes; None: each category is a class. A category without a class is refused.
        background: Class of the pixels without an annotation, or "void"; None: "background", or "void" where all
            pixels are annotated (panoptic files, masks).
        skip_unlabelled: Whether images without an annotation are left out instead of refused.
        skip_missing: Whether annotations whose image is missing are left out instead of refused.
        **selection: `pattern`, `val_share` and `val_seed` of `open_folder`, for a folder of images and masks.

    Raises:
        ValueError: If annotations cannot be used, or do not fit the images; the first of them are listed.
        FileNotFoundError: If files are missing.
        FileExistsError: If the folder contains labels or images that another program or conversion wrote.
        ImportError: If pycocotools is not installed.
        KeyboardInterrupt: After Ctrl-C, with the number of written labels.
    """
    source, path = Path(source), Path(path)
    import_optional("pycocotools.mask")
    classes_file = path / CLASSES_FILE
    if source.is_dir() and images is None and (_given(selection) or (source / "images").is_dir()):
        if skip_missing:
            raise ValueError("skip_missing (--skip-missing) has no meaning for a folder of images and masks.")
        opened = _open_masks(source, split, skip_unlabelled, selection, classes_file)
    else:
        opened = _open_annotations(source, images, skip_unlabelled, skip_missing, selection, classes_file)
    annotations, located, folder = opened.annotations, opened.located, opened.folder
    if path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"Expected the data set to be written outside of the folder of the images, {folder}, but got {path}. Pass "
            "another folder."
        )
    choice = choose_classes(annotations, class_map, background, classes_file)
    sizes = check_sizes(located, opened.pixels)
    names = {image: image.relative_to(folder) for image in located}
    targets = {image: path / "labels" / split / name.with_suffix(".png") for image, name in names.items()}
    _check_names(names)
    record = {
        "format": annotations.format,
        "sha256": _digest(opened.inputs),
        "class_names": list(choice.names),
        "class_ids": dict(choice.ids),
        "background": choice.background,
        "images": len(located),
    }
    record_file = path / f"conversion-{split}.json"
    places = {image: path / "images" / split / name for image, name in names.items()}
    check_folder(path / "labels" / split, record_file, record, places)
    write_json(record_file, record)
    for image, place in places.items():
        link(image, place)
    jobs = [(targets[image], located[image], sizes[image]) for image in located]
    counts = write_labels(jobs, choice)
    write_classes(classes_file, choice, opened.pixels)
    class_of_value = dict(enumerate(choice.names)) | {VOID_ID: VOID}
    report = ConversionReport(
        path,
        split,
        annotations.format,
        images=len(counts),
        background_only=int((counts[:, choice.background] == counts.sum(1)).sum()),
        class_images={name: int((counts[:, value] > 0).sum()) for value, name in class_of_value.items()},
        class_pixels={name: int(counts[:, value].sum()) for value, name in class_of_value.items()},
    )
    write_json(record_file, record | {"class_images": report.class_images, "class_pixels": report.class_pixels})
    return report


@dataclass(frozen=True)
class _Source:
    """Opened annotations.

    Attributes:
        annotations: The annotations of all images.
        located: Path of each image, with its annotation.
        folder: Folder that contains the images; their paths in it are kept.
        inputs: Files of the annotations, by whose content a conversion is recognised when it continues.
        pixels: Format of the images.
    """

    annotations: Annotations
    located: dict[Path, AnnotatedImage]
    folder: Path
    inputs: Sequence[Path]
    pixels: PixelFormat


def _given(selection: Mapping[str, Any]) -> list[str]:
    return [name for name, value in selection.items() if value is not None and name != "val_seed"]


def _open_annotations(
    source: Path,
    images: str | Path | None,
    skip_unlabelled: bool,
    skip_missing: bool,
    selection: Mapping[str, Any],
    classes_file: Path,
) -> _Source:
    """Read annotations and find their images."""
    if given := _given(selection):
        raise ValueError(
            f"{given[0]} selects files of a folder of images and masks, but {source} contains annotations. Leave it "
            "out; a converted folder is divided by val_share when it is opened."
        )
    annotations = read_annotations(source)
    folder = Path(images) if images is not None else source if source.is_dir() else source.parent
    located = locate_images(annotations.images, folder, skip_unlabelled=skip_unlabelled, skip_missing=skip_missing)
    inputs = list_files(source, (".json",)) if source.is_dir() else [source]
    pixels = read_classes(classes_file).pixels if classes_file.is_file() else PixelFormat()
    return _Source(annotations, located, folder, inputs, pixels)


def _open_masks(
    source: Path, split: str, skip_unlabelled: bool, selection: Mapping[str, Any], classes_file: Path
) -> _Source:
    """Open the masks of a folder as annotations."""
    data = open_folder(source, split, skip_unlabelled=skip_unlabelled, **selection)
    if not data.has_labels:
        raise ValueError(f"{data.name} has no labels to convert.")
    data.check_classes()
    if classes_file.is_file() and (pixels := read_classes(classes_file).pixels) != data.pixels:
        raise ValueError(f"{classes_file} is for images of {pixels}, but {source} has images of {data.pixels}.")
    located = {
        pair.image: AnnotatedImage(pair.image.name, None, partial(_mask_regions, data, pair.label))
        for pair in data.pairs
        if pair.label is not None
    }
    colors = dict(zip(data.class_names, data.palette, strict=True))
    annotations = Annotations("masks", data.class_names, tuple(located.values()), is_complete=True, colors=colors)
    folder = Path(os.path.commonpath([image.parent for image in located]))
    return _Source(annotations, located, folder, [pair.label for pair in data.pairs if pair.label], data.pixels)


def _mask_regions(data: FolderDataset, file: Path, height: int, width: int) -> Regions:
    label = data.read_label(file)
    if label.shape != (height, width):
        raise ValueError(f"{file} is {label.shape}, the image is {(height, width)}")
    for value in np.unique(label).tolist():
        if value != data.ignore_index and not 0 <= value < data.num_classes:
            raise ValueError(f"{file}: label {value} is none of the classes 0..{data.num_classes - 1}")
        yield VOID if value == data.ignore_index else data.class_names[value], label == value


def _check_names(names: Mapping[Path, Path]) -> None:
    """Raise ValueError if the labels of two images would have the same path."""
    first: dict[Path, Path] = {}
    for image, name in names.items():
        if (other := first.setdefault(name.with_suffix(""), image)) != image:
            raise ValueError(f"{image} and {other} differ only in their suffix, so their labels would be one file.")


def _digest(files: Sequence[Path]) -> str:
    """Return a SHA-256 of the names and contents of files."""
    digest = hashlib.sha256()
    for file in track(files, total=len(files), description="Hashing annotations"):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()
