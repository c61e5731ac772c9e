"""Files of a data set: the images in a folder, and the label file of each, matched by name."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from bpkd_sdk.errors import format_list, warn

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".npy")
LOSSLESS_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
LABEL_SUFFIXES = (*LOSSLESS_SUFFIXES, ".jpg", ".jpeg")  # read_label states why JPEG files cannot be used

SAME_NAMES = "{}.*:{}.*"

_JUNK_FOLDERS = ("__MACOSX", "@eaDir")  # copies of names that macOS and Synology write


@dataclass(frozen=True)
class Pair:
    """Paths of an image and of its label map; `label` is None in data without labels."""

    image: Path
    label: Path | None


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files in a folder and its sub-folders that end in one of the suffixes, in any case, sorted.

    The list is empty if the folder does not exist.

    Hidden files and folders are left out: ``._a.png`` of macOS, ``.ipynb_checkpoints``, ``__MACOSX``. Links to folders
    are followed; a folder that is reached twice is listed once.

    Args:
        folder: Folder to search.
        suffixes: Suffixes in lower case, for example ".png".

    Raises:
        OSError: If a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    if not folder.is_dir():
        return []
    files: list[Path] = []
    seen = set()
    for current, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(current)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _JUNK_FOLDERS)
        files += [
            Path(current, name) for name in names if not name.startswith(".") and name.lower().endswith(tuple(suffixes))
        ]
    return sorted(files)


def pair_files(images: Path, labels: Path | None, names: str = SAME_NAMES) -> list[Pair]:
    """Match the images in a folder with the label files in another folder by name, sub-folders included.

    Args:
        images: Folder of the images.
        labels: Folder of the label files; None for data without labels. It may be the folder of the images.
        names: File names of an image and its label file, separated by a colon, with ``{}`` for the part that is the
            same in both: ``"{}_leftImg8bit.png:{}_gt.png"``. The suffix ``.*`` stands for every suffix of images, or of
            label files; suffixes match in upper and lower case.

    Raises:
        FileNotFoundError: If the folder of images is missing, or no file in it matches.
        ValueError: If an image has no label file or several, or if two images share one; the first of them are listed.
    """
    if labels is None:
        return match_files(images, None, names)
    return require_labels(match_files(images, find_labels(labels, names), names), labels, names)


def match_files(images: Path, labels: Mapping[str, Sequence[Path]] | None, names: str) -> list[Pair]:
    """Match images with label files as `pair_files` does; the label of an image that has none is None.

    Args:
        images: Folder of the images.
        labels: Label files that `find_labels` returned; None for data without labels.
        names: File names of an image and its label file, as `pair_files` accepts them.
    """
    image_name, _ = parse_names(names)
    if not images.is_dir():
        raise FileNotFoundError(f"There is no folder {images}.")
    label_files = labels or {}
    all_labels = {path for paths in label_files.values() for path in paths}
    candidates = [path for path in list_files(images, IMAGE_SUFFIXES) if path not in all_labels]
    keys = {path: key for path in candidates if (key := _key(path, images, image_name, IMAGE_SUFFIXES))}
    if not keys:
        found = f"; it contains, for example:\n{format_list(candidates, limit=3)}" if candidates else "."
        if candidates:
            raise FileNotFoundError(f"No image in {images} has a name like {image_name}{found}")
        raise FileNotFoundError(f"The folder {images} contains no image ({', '.join(IMAGE_SUFFIXES)}).")
    if others := [path for path in candidates if path not in keys]:
        warn(
            f"{len(others)} images in {images} have no name like {image_name}; they are ignored:\n"
            f"{format_list(others, limit=5)}"
        )
    if labels is None:
        return [Pair(path, None) for path in keys]
    of_key = defaultdict(list)
    for path, key in keys.items():
        of_key[key].append(path)
    if repeated := [path for paths in of_key.values() if len(paths) > 1 for path in paths[1:]]:
        raise ValueError(
            f"{len(repeated)} images share the name, and so the label file, of another image:\n{format_list(repeated)}"
        )
    if several := [" and ".join(map(str, label_files[key])) for key in of_key if len(label_files.get(key, ())) > 1]:
        raise ValueError(
            f"{len(several)} images have several label files. Keep one of each, or name its suffix in a pattern:\n"
            f"{format_list(several)}"
        )
    return [Pair(path, label_files[key][0] if key in label_files else None) for path, key in keys.items()]


def find_labels(labels: Path, names: str) -> dict[str, list[Path]]:
    """Find the label files in a folder, by the name that they share with their image.

    Args:
        labels: Folder of the label files.
        names: File names of an image and its label file, as `pair_files` accepts them.

    Returns:
        The paths of each shared name. A JPEG file is left out if the name has a file without loss, and so is a file
        that fits the name of images if that is the longer one, for images and labels in one folder.
    """
    image_name, label_name = parse_names(names)
    found = defaultdict(list)
    for path in list_files(labels, LABEL_SUFFIXES):
        if len(image_name) > len(label_name) and _key(path, labels, image_name, IMAGE_SUFFIXES):
            continue
        if key := _key(path, labels, label_name, LABEL_SUFFIXES):
            found[key].append(path)
    return {
        key: [path for path in paths if path.suffix.lower() in LOSSLESS_SUFFIXES] or paths
        for key, paths in found.items()
    }


def require_labels(pairs: list[Pair], labels: Path, names: str, advice: str = "") -> list[Pair]:
    """Return the pairs if all have a label file.

    Args:
        pairs: Pairs that `match_files` returned.
        labels: Folder of the label files, for the error message.
        names: File names of an image and its label file, for the error message.
        advice: Sentence for the end of the error message.

    Raises:
        ValueError: If images have no label; the first of them are listed.
    """
    if unlabelled := [pair.image for pair in pairs if pair.label is None]:
        name = parse_names(names)[1]
        folder = labels if labels.is_dir() else labels.parent
        found = list_files(folder, (*LABEL_SUFFIXES, ".json", ".xml", ".txt", ".npy"))
        raise ValueError(
            f"{len(unlabelled)} of {len(pairs)} images have no label (expected {labels / name}):\n"
            f"{format_list(unlabelled)}"
            + (
                f"\nFiles in {folder}, for example:\n{format_list(found, limit=3)}"
                if found
                else "\nThere are no labels."
            )
            + advice
        )
    return pairs


def parse_names(names: str) -> tuple[str, str]:
    """Split the file names of images and label files, such as ``"{}_img.png:{}_gt.png"``, and check them.

    Raises:
        ValueError: If there are not two names with one ``{}`` and a suffix each.
    """
    sides = names.split(":")
    if len(sides) != 2 or not all(re.fullmatch(r"[^{}*]*\{\}[^{}*]*\.(\w+|\*)", side) for side in sides):
        raise ValueError(
            f"Expected the names of an image and its label, separated by a colon, with one {{}} for the part that is "
            f"the same in both, and a suffix (.* for any): '{{}}_img.png:{{}}_gt.png', but got {names!r}."
        )
    return sides[0], sides[1]


def shared_name(path: Path, folder: Path) -> str:
    """Return the path of a file within a folder, without its suffix, in the same spelling on all systems."""
    return normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())


def _key(path: Path, folder: Path, name: str, suffixes: Sequence[str]) -> str | None:
    """Return the part of a path that stands for ``{}``, with the sub-folders before it; None if it does not match."""
    stem, _, suffix = name.rpartition(".")
    head, tail = (normalize("NFC", part) for part in stem.split("{}"))
    if path.suffix.lower() not in (suffixes if suffix == "*" else (f".{suffix.lower()}",)):
        return None
    match = re.fullmatch(f"{re.escape(head)}(.+){re.escape(tail)}", normalize("NFC", path.stem))
    return shared_name(path, folder)[: -len(normalize("NFC", path.stem))] + match[1] if match else None
