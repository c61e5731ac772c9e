"""Meaning of the labels in a folder, from ``classes.json`` and a sample of the label files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from bpkd_sdk.classes import MAX_CLASSES
from bpkd_sdk.data.classes_file import CLASSES_FILE, LABELMAP_FILE, VOID, FolderClasses, read_classes, read_labelmap
from bpkd_sdk.data.labels import distinct_pixel_colors, hex_color, palette_of, read_label
from bpkd_sdk.errors import warn
from bpkd_sdk.spec import Color

MAX_ADVISED_FILES = 8  # label files whose colours an error message lists
SAMPLED_FILES = 64  # label files, spread over all splits, that are inspected to determine the meaning of labels

_shown_warnings: set[str] = set()


def find_classes(root: Path, files: Sequence[Path]) -> FolderClasses:
    """Determine the classes and the meaning of the labels in a folder.

    The sources are ``classes.json``, or ``labelmap.txt`` of CVAT, and a sample of the label files.

    Args:
        root: Folder of the data set, with ``classes.json`` if there is one.
        files: Label files of all splits, so that all of them are read by the same rule.

    Raises:
        ValueError: If ``classes.json`` cannot be used, or if the classes are not known.
    """
    file = root / CLASSES_FILE
    classes = read_classes(file) if file.is_file() else None
    if classes is None and (root / LABELMAP_FILE).is_file():
        return read_labelmap(root / LABELMAP_FILE)
    if classes is not None and (classes.ids is not None or classes.colors is not None):
        return classes
    sample = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, SAMPLED_FILES).astype(int))] if files else []
    kinds = [_inspect(path) for path in sample]
    if classes is None:
        return _classes_of_palettes(root, kinds, sample)
    colored = sum(kind.has_colors for kind in kinds)
    if colored and 2 * colored >= len(kinds):
        return _map_colors(root, classes, kinds)
    if colored:
        _warn_once(
            f"{colored} of {len(kinds)} label files of {root} that were inspected have colours and the others are "
            f'grey. All are read by value, palettes by their index. To read them by colour, write "ids" in '
            f'{CLASSES_FILE}: {{"ids": {{"#ff0000": "{classes.names[0]}", ...}}}}.'
        )
    return _map_binary_masks(root, classes, sample)


@dataclass(frozen=True)
class _LabelKind:
    """The kind of pixels in a label file.

    Attributes:
        has_colors: Whether the pixels are colours: RGB that is not grey, or indices into a palette that is not grey.
        palette: Colours of this palette; empty without one.
    """

    has_colors: bool = False
    palette: tuple[Color, ...] = ()


def _inspect(file: Path) -> _LabelKind:
    """Determine the kind of a label file. A file that cannot be read has no colours; `check` reports it."""
    try:
        with Image.open(file) as image:
            palette = palette_of(image)
            pixels = np.asarray(image) if image.mode in ("RGB", "RGBA") else np.zeros((1, 1, 3))
    except Exception:  # Pillow's errors for damaged files have no common base class
        return _LabelKind()
    if (palette != palette[:, :1]).any():
        return _LabelKind(True, tuple((r, g, b) for r, g, b in palette.tolist()))
    return _LabelKind(bool((pixels[..., :3] != pixels[..., :1]).any()))


def _classes_of_palettes(root: Path, kinds: Sequence[_LabelKind], sample: Sequence[Path]) -> FolderClasses:
    """Make each colour in the palette of the label files a class."""
    colors = list(_common_palette([kind.palette for kind in kinds if kind.palette]))
    # Writers fill a palette up to 256 colours with black or with a ramp of greys; neither is a class.
    while len(colors) > 1 and (colors[-1] == (0, 0, 0) or colors[-1] == (len(colors) - 1,) * 3):
        colors.pop()
    if not 0 < len(colors) < 256:
        raise ValueError(
            f"The classes of {root} are not known: write {root / CLASSES_FILE} with a list of class names, for example "
            '["road", "car"], or use palette PNGs with one colour for each class as labels.'
            + _advice_on_colors(root, sample)
        )
    names = tuple(f"class {index}" for index in range(len(colors)))
    return FolderClasses(names, tuple(colors), colors=_class_of_color(colors))


def _advice_on_colors(root: Path, sample: Sequence[Path]) -> str:
    """Return a ``classes.json`` for the colours of some label files, to be completed; empty if they have no colours."""
    colors: set[Color] = set()
    for path in sample[:MAX_ADVISED_FILES]:
        with suppress(ValueError, OSError):
            colors.update(distinct_pixel_colors(path))
    if not 1 < len(colors) <= MAX_CLASSES:
        return ""
    ids = {hex_color(color): f"class {index}" for index, color in enumerate(sorted(colors))}
    return (
        f"\nThese are the colours of {min(len(sample), MAX_ADVISED_FILES)} label files. Write the class of each, or "
        f'"{VOID}", into {root / CLASSES_FILE}:\n  {json.dumps({"ids": ids})}'
    )


def _map_colors(root: Path, classes: FolderClasses, kinds: Sequence[_LabelKind]) -> FolderClasses:
    """Map the colours of a palette to the classes: the palette of classes.json, or that of the first label file."""
    if not classes.palette:
        return _map_first_palette(root, classes, [kind.palette for kind in kinds if kind.palette])
    if len(set(classes.palette)) < len(classes.palette):
        raise ValueError(f"{root / CLASSES_FILE} gives several classes one colour, and labels are read by colour.")
    return replace(classes, colors=_class_of_color(classes.palette))


def _map_first_palette(root: Path, classes: FolderClasses, palettes: Sequence[tuple[Color, ...]]) -> FolderClasses:
    """Map the colours of the first palette to the classes at their index.

    If its colours do not distinguish the classes, the indices stay the class ids.
    """
    palette = _common_palette(palettes)
    colors = palette[: len(classes.names)]
    differ = any(other != palette[: len(other)] for other in palettes)
    if len(set(colors)) < len(colors) and differ:
        raise ValueError(
            f"The label files of {root} have different palettes, and these give several classes one colour, so that "
            f'neither indices nor colours identify the classes. Write "palette" in {root / CLASSES_FILE}, the colour '
            "of each class, or save the labels in grey."
        )
    if not colors or len(set(colors)) < len(colors):
        return classes
    if differ:
        given = ", ".join(f"{name} {hex_color(color)}" for name, color in zip(classes.names, colors, strict=False))
        _warn_once(
            f"The label files of {root} have palettes of different orders. They are read by colour, in the order of "
            f'the first file: {given}. If that is not right, write "palette" in {CLASSES_FILE}.'
        )
    void = palette[classes.ignore_index] if 0 <= classes.ignore_index < len(palette) else None
    # White at index 255 is the end of the ramp of greys that writers fill palettes up with.
    void_colors = {void: classes.ignore_index} if void and void != (255, 255, 255) else {}
    return replace(
        classes,
        palette=colors if len(colors) == len(classes.names) else (),
        colors=void_colors | _class_of_color(colors),
    )


def _common_palette(palettes: Sequence[tuple[Color, ...]]) -> tuple[Color, ...]:
    """Return the longest palette if all others are its beginnings, otherwise the first."""
    longest = max(palettes, key=len, default=())
    return longest if all(longest[: len(palette)] == palette for palette in palettes) else palettes[0]


def _class_of_color(colors: Sequence[Color]) -> dict[Color, int]:
    """Map each colour to its position; of equal colours, to the first position."""
    return {color: index for index, color in reversed(list(enumerate(colors)))}


def _map_binary_masks(root: Path, classes: FolderClasses, sample: Sequence[Path]) -> FolderClasses:
    """Map 0 and 255 to two classes if the label files contain no other values; otherwise values are class ids."""
    if len(classes.names) != 2 or classes.ignore_index != 255:
        return classes
    zero, one = classes.names
    masks = _binary_masks(sample)
    if masks == "some":
        _warn_once(
            f"Some label files of {root} contain only 0 and 255, others 0 and 1: 255 is read as void. If it is "
            f'{one!r}, write "ids": {{"0": "{zero}", "1": "{one}", "255": "{one}"}} in {CLASSES_FILE}.'
        )
    if masks != "all":
        return classes
    _warn_once(
        f"The label files of {root} contain only 0 and 255, and there are two classes: 0 is read as {zero!r} and 255 "
        f'as {one!r}. If 255 is void, write "ids": {{"0": "{zero}", "1": "{one}", "255": "{VOID}"}} in {CLASSES_FILE}.'
    )
    return replace(classes, ids={0: 0, 255: 1})


def _binary_masks(files: Sequence[Path]) -> Literal["all", "some", "none"]:
    """Return whether all, some or none of the label files are masks of 0 and 255. Files with 1 bit do not count.

    "some" means that other files contain 1, and that no file contains both 1 and 255.
    """
    values_of_files = []
    for file in files:
        try:
            label = read_label(file)
        except ValueError:
            continue  # `check` reports it
        if label.dtype != np.bool_:
            values_of_files.append(set(np.unique(label).tolist()))
    with_255 = [values for values in values_of_files if 255 in values]
    if not with_255 or any(values - {0, 1, 255} for values in values_of_files) or any(1 in v for v in with_255):
        return "none"
    return "some" if any(1 in values for values in values_of_files) else "all"


def _warn_once(message: str) -> None:
    """Warn once per process, since a folder is opened once for each split."""
    if message not in _shown_warnings:
        _shown_warnings.add(message)
        warn(message)
