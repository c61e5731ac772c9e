"""Files that a conversion writes: links to the images, labels, and ``classes.json``."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bpkd_sdk.data.annotations.classes import ClassChoice
from bpkd_sdk.data.annotations.model import AnnotatedImage
from bpkd_sdk.data.labels import read_label
from bpkd_sdk.data.pairs import list_files
from bpkd_sdk.errors import format_list, list_differences, warn
from bpkd_sdk.files import read_json, write_atomically, write_json
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.progress import track


def check_folder(labels: Path, record_file: Path, record: Mapping[str, Any], places: Mapping[Path, Path]) -> None:
    """Raise FileExistsError if the folder contains files of others, or the same annotations as another split."""
    for other in sorted(record_file.parent.glob("conversion-*.json")):
        if other != record_file and _read_record(other).get("sha256") == record["sha256"]:
            raise FileExistsError(
                f"{other} records a conversion of the same annotations, so two splits would have the same images. Pass "
                "the annotations of this split, or convert once and divide the images by val_share (--val-share)."
            )
    found = list_files(labels, ("",))
    if found and record_file.is_file():
        before = _read_record(record_file)
        if changed := list_differences({key: before.get(key) for key in record}, record):
            raise FileExistsError(
                f"{record_file} describes another conversion:\n{format_list(changed)}\nTo convert again, delete it and "
                f"{labels}; otherwise choose another folder or split."
            )
    elif found:
        raise FileExistsError(
            f"{labels} contains {len(found)} files that no conversion recorded:\n{format_list(found, limit=5)}\nChoose "
            "another folder or split, or move them away."
        )
    others = [
        place
        for image, place in places.items()
        if place.exists() and not (place.samefile(image) or filecmp.cmp(image, place, shallow=False))
    ]
    if others:
        raise FileExistsError(
            f"{len(others)} images exist with another content:\n{format_list(others)}\nChoose another folder or split."
        )


def _read_record(file: Path) -> dict[str, Any]:
    record = read_json(file)
    if not isinstance(record, dict):
        raise ValueError(f"{file} does not describe a conversion. Restore it, or choose another folder.")
    return record


def write_classes(file: Path, choice: ClassChoice, pixels: PixelFormat) -> None:
    """Write a ``classes.json`` with the classes and the format of the images, unless it exists."""
    if not file.exists():
        palette = {"palette": choice.palette} if choice.palette else {}
        facts = asdict(pixels) if pixels != PixelFormat() else {}
        write_json(file, {"class_names": choice.names} | palette | facts)


def link(source: Path, path: Path) -> None:
    """Make a file appear at a path as a hard link, or as a copy on another disk, unless it exists."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), path)
    except OSError:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(path)


def write_labels(jobs: Sequence[tuple[Path, AnnotatedImage, tuple[int, int]]], choice: ClassChoice) -> np.ndarray:
    """Draw and write the labels that do not exist yet.

    Args:
        jobs: For each image, the path of its label, its annotation, and its (height, width).
        choice: Classes of the labels.

    Returns:
        Number of pixels of each label value in each image, int64 (N, 256).

    Raises:
        ValueError: If annotations cannot be drawn; the first of them are listed, and no label that was written remains.
        KeyboardInterrupt: After Ctrl-C, with the number of written labels.
    """
    counts: list[np.ndarray] = []
    written: list[Path] = []
    problems: list[str] = []
    empty: list[str] = []
    try:
        for target, image, size in track(jobs, total=len(jobs), description="Writing labels"):
            try:
                if target.exists():
                    label = read_label(target)
                else:
                    label = _draw(image, size, choice, empty)
                    write_atomically(target, cv2.imencode(".png", label)[1].tobytes())
                    written.append(target)
            except ValueError as error:
                problems.append(f"{image.name}: {error}")
                continue
            counts.append(np.bincount(label.ravel(), minlength=256))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(counts)} of {len(jobs)} labels are written; repeat the command to continue"
        ) from None
    if problems:
        for target in written:
            target.unlink()
        raise ValueError(f"{len(problems)} of {len(jobs)} labels cannot be made:\n{format_list(problems)}")
    if empty:
        warn(f"{len(empty)} shapes cover no pixel, and are not in the labels:\n{format_list(empty, limit=5)}")
    return np.array(counts)


def _draw(image: AnnotatedImage, size: tuple[int, int], choice: ClassChoice, empty: list[str]) -> np.ndarray:
    """Draw the label map of an image, uint8 (H, W); append the shapes that cover no pixel to `empty`."""
    label = np.full(size, choice.background, np.uint8)
    for category, mask in image.regions(*size):
        label[mask] = choice.ids[category]
        if not mask.any():
            empty.append(f"{image.name}: {category}")
    return label
