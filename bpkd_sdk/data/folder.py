"""A folder of the user's own images: by default ``images/<split>``, ``labels/<split>`` and ``classes.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpkd_sdk.colors import distinct_colors
from bpkd_sdk.data.classes_file import CLASSES_FILE, VOID, FolderClasses
from bpkd_sdk.data.dataset import FileDataset
from bpkd_sdk.data.folder_classes import find_classes
from bpkd_sdk.data.layout import VAL_ADVICE, VAL_NAMES, Layout, describe_missing, find_layout
from bpkd_sdk.data.pairs import (
    IMAGE_SUFFIXES,
    Pair,
    find_labels,
    match_files,
    require_labels,
    shared_name,
)
from bpkd_sdk.errors import format_list, warn


class FolderDataset(FileDataset):
    """The data set that `open_folder` returns.

    Args:
        root: Path of the folder.
        split: Name of the split.
        pairs: Paths of the images and their label files.
        classes: Classes, and meaning of the labels.
        selection: Options that selected the files, for the record of a run; empty for a whole split.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        pairs: Sequence[Pair],
        classes: FolderClasses,
        selection: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            f"{root.absolute().name}/{split}",
            pairs,
            classes.names,
            classes.palette or distinct_colors(classes.names),
            classes.ignore_index,
            classes.ids,
            classes.colors,
            classes.pixels,
        )
        self.classes_file = root / CLASSES_FILE
        self.selection = dict(selection or {})

    def label_advice(self, labels: Iterable[int]) -> str:
        """Return a ``classes.json`` that maps these label values to the classes, in ascending order."""
        values = sorted(set(labels) - {self.ignore_index})
        if self.colors is not None or set(values) <= set(range(self.num_classes)):
            return ""
        is_zero_void = values[0] == 0 and len(values) == self.num_classes + 1
        names = [*([VOID] if is_zero_void else []), *self.class_names, *[VOID] * len(values)]
        ids = {str(value): name for value, name in zip(values[:20], names, strict=False)}
        return (
            f"\nIf these values stand for classes, state in {self.classes_file} for which, for example:\n"
            f'  {{"class_names": {json.dumps(self.class_names[:20])}, "ids": {json.dumps(ids)}}}'
        )


def open_folder(
    root: str | Path,
    split: str = "train",
    *,
    pattern: str | None = None,
    val_share: float | None = None,
    val_seed: int = 0,
    skip_unlabelled: bool = False,
) -> FolderDataset:
    """Open ``root/images/<split>`` with ``root/labels/<split>``, or the folders that `pattern` states.

    Label files have the names of the images, and a suffix of a lossless format: ``.png``, ``.tif``, ``.tiff``, ``.bmp``
    or ``.gif``. Suffixes match in upper and lower case. Hidden files, such as ``._a.png``, are ignored. If the folder
    ``root/labels`` does not exist, all labels are blank (`has_labels` is False), and only
    ``distill(..., labels="teacher")`` can use the data.

    ``classes.json`` is a list of class names, or an object with these keys:

    - ``class_names``: names of the classes, in the order of their ids;
    - ``palette``: an ``[r, g, b]`` for each class;
    - ``ignore_index``: the void label, 255 by default;
    - ``ids``: the class of each value in the label files, ``{"0": "void", "1": "road", "2": "car"}``, or of each
      colour, ``{"#000000": "void", "#ff0000": "car"}``. ``class_names`` is then optional: the default is the names in
      the order of their first appearance;
    - ``channels``, ``value_range`` and ``bands``: the number of channels, the lowest and the highest value, and the
      channels shown as red, green and blue, for images that are not 8-bit RGB: ``{"channels": 4, "value_range": [0,
      65535], "bands": [2, 1, 0]}``. Such images are TIFF, NPY or PNG files and keep their values.

    By default, labels are read by value: grey values are class ids, and 255 is void. If most label files have colours
    (RGB that is not grey, or a palette that is not grey), labels are read by colour:

    - The colours are those of ``ids`` or ``palette``, otherwise those of the palette in the first label file. Other
      files are refused if they contain other colours.
    - Without a ``classes.json``, the classes and colours are those of ``labelmap.txt``, which CVAT writes beside its
      masks; without both, each colour of the palette is a class.

    If there are two classes and the label files contain only 0 and 255, these values are the two classes.

    Args:
        root: Path of the folder.
        split: Name of the split.
        pattern: Paths of an image and its label in `root`, separated by a colon. ``{}`` stands for the part of the file
            name that is the same in both, ``{split}`` for the split, ``.*`` for any suffix:
            ``"photos/{split}/{}.jpg:masks/{split}/{}_mask.png"``. Sub-folders of the stated folders are searched too. A
            side without a folder is in ``images/{split}`` or ``labels/{split}``: ``"{}_leftImg8bit.png:{}_gt.png"``.
        val_share: Share of the training images, between 0 and 1, that becomes the split "val", for a folder without
            one. An image is in "val" if the SHA-256 of ``"<val_seed>/<its path in the folder, without suffix>"``, as a
            fraction of its largest value, is below `val_share`. So an image stays in its split when others are added,
            and no image is in both splits; the number of images is close to the share, not equal to it. Without a
            folder ``images/train``, all of ``images`` is divided.
        val_seed: Seed of this division. It does not depend on the seed of the training.
        skip_unlabelled: Whether images without a label file are left out, with a warning, instead of refused.

    Raises:
        FileNotFoundError: If a folder is missing or empty.
        ValueError: If images lack labels, if ``classes.json`` or an option cannot be used, or if the classes are not
            known.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    if val_share is not None:
        _check_val_share(val_share, val_seed)
    divided = val_share is not None and split in ("train", "val")
    layout = find_layout(root, pattern, divided)
    if divided and (found := [name for name in layout.splits(root) if name in VAL_NAMES]):
        raise ValueError(
            f"{layout.images_of(root, found[0])} exists, and val_share={val_share} would divide the training images as "
            "well. Leave out val_share (--val-share), or rename the folder, for example to test."
        )
    if not divided and not layout.has_splits:
        raise ValueError(
            f"The pattern {pattern!r} has no {{split}}, so all splits would be the same images. Add {{split}} to a "
            f"folder, or divide the images: {VAL_ADVICE}."
        )
    source = "train" if divided else split
    images = layout.images_of(root, source)
    if not images.is_dir():
        raise FileNotFoundError(describe_missing(root, layout, source))
    labels = layout.labels_of(root, source)
    folders = layout.label_folders(root) | ({labels} if labels is not None else set())
    label_files = {folder: find_labels(folder, layout.names) for folder in folders}
    pairs = match_files(images, label_files[labels] if labels is not None else None, layout.names)
    selection: dict[str, Any] = {} if pattern is None else {"pattern": pattern}
    if skip_unlabelled:
        labelled = _labelled(root, pairs)
        selection |= {"skip_unlabelled": len(pairs) - len(labelled)}
        pairs = labelled
    elif labels is not None:
        advice = "\nPass skip_unlabelled=True (--skip-unlabelled) to leave these images out."
        pairs = require_labels(pairs, labels, layout.names, advice)
    if labels is not None:
        _warn_of_unused_labels(layout, images, labels, label_files[labels], pairs)
    if val_share is not None and divided:
        chosen = _divide(pairs, images, val_share, val_seed)
        pairs = [pair for pair in pairs if (pair in chosen) == (split == "val")]
        selection |= {"val_share": val_share, "val_seed": val_seed}
        if split == "val":
            selection["val_images"] = [shared_name(pair.image, images) for pair in pairs]
    files = sorted(path for found in label_files.values() for paths in found.values() for path in paths)
    return FolderDataset(root, split, pairs, find_classes(root, files), selection)


def _labelled(root: Path, pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs with a label, and warn of the others; raise ValueError if there are none."""
    labelled = [pair for pair in pairs if pair.label is not None]
    if not labelled:
        raise ValueError(
            f"None of the {len(pairs)} images in {root} has a label, so skip_unlabelled would leave out all of them. "
            "To learn from a teacher without labels, use distill(..., labels='teacher') and leave out skip_unlabelled."
        )
    if left_out := [pair.image for pair in pairs if pair.label is None]:
        warn(
            f"{len(left_out)} of {len(pairs)} images in {root} have no label and are left out:\n"
            f"{format_list(left_out, limit=5)}"
        )
    return labelled


def _warn_of_unused_labels(
    layout: Layout, images: Path, labels: Path, found: Mapping[str, Sequence[Path]], pairs: Sequence[Pair]
) -> None:
    """Warn of label files without an image, unless the folder also contains the labels of other splits."""
    if layout.labels is not None and "{split}" in layout.images and "{split}" not in layout.labels:
        return
    used = {path for pair in pairs for path in (pair.image, pair.label)}
    if unused := [path for paths in found.values() for path in paths if path not in used]:
        warn(
            f"{len(unused)} label files in {labels} have no image of the same name in {images} with one of the "
            f"suffixes {', '.join(IMAGE_SUFFIXES)}; they are ignored:\n{format_list(unused, limit=5)}"
        )


def _check_val_share(val_share: float, val_seed: int) -> None:
    if isinstance(val_share, bool) or not isinstance(val_share, (int, float)) or not 0 < val_share < 1:
        raise ValueError(f"Expected `val_share` to be a share between 0 and 1, such as 0.1, but got {val_share!r}.")
    if type(val_seed) is not int:
        raise ValueError(f"Expected `val_seed` to be a whole number, but got {val_seed!r}.")


def _divide(pairs: Sequence[Pair], images: Path, val_share: float, val_seed: int) -> set[Pair]:
    """Return the pairs of the split "val"; raise ValueError if it would have no image, or all."""
    places = {pair: _place(shared_name(pair.image, images), val_seed) for pair in pairs}
    chosen = {pair for pair, place in places.items() if place < val_share}
    if not 0 < len(chosen) < len(pairs):
        raise ValueError(
            f"val_share={val_share} of the {len(pairs)} images in {images} selects {len(chosen)} for validation with "
            f"val_seed={val_seed}. Pass a val_share above {min(places.values()):.3f} and up to "
            f"{max(places.values()):.3f}, or another val_seed."
        )
    return chosen


def _place(name: str, val_seed: int) -> float:
    """Return the place of an image in [0, 1), by the SHA-256 of the seed and its name."""
    digest = hashlib.sha256(f"{val_seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
