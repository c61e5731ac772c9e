"""Readers of ``classes.json`` and ``labelmap.txt``, which state the classes and the meaning of labels in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bpkd_sdk.data.labels import parse_hex_color
from bpkd_sdk.errors import did_you_mean
from bpkd_sdk.files import read_json
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.spec import Color

CLASSES_FILE = "classes.json"
LABELMAP_FILE = "labelmap.txt"  # CVAT writes it beside the masks that it exports
VOID = "void"
PIXEL_KEYS = ("channels", "value_range", "bands")
KEYS = ("class_names", "palette", "ignore_index", "ids", *PIXEL_KEYS)


@dataclass(frozen=True)
class FolderClasses:
    """The classes of a folder, and the meaning of the pixels in its label files.

    Attributes:
        names: Names of the classes, in the order of their ids.
        palette: RGB colour of each class; empty if no colours are stated.
        ignore_index: Label value of void pixels.
        ids: Class id, or `ignore_index`, of each value in the label files; None if the values are the class ids.
        colors: Class id, or `ignore_index`, of each colour in the label files; None if the files are read by value.
        pixels: Format of the images.
    """

    names: tuple[str, ...]
    palette: tuple[Color, ...] = ()
    ignore_index: int = 255
    ids: Mapping[int, int] | None = None
    colors: Mapping[Color, int] | None = None
    pixels: PixelFormat = field(default_factory=PixelFormat)


def read_classes(file: Path) -> FolderClasses:
    """Read a ``classes.json``; `open_folder` describes its keys.

    Raises:
        ValueError: If the file is not JSON or contains a key twice, or if a key or a value is not allowed.
    """
    content: Any = read_json(file, unique_keys=True)
    values: Any = {"class_names": content} if isinstance(content, list) else content
    if not isinstance(values, dict) or not values.keys() & {"class_names", "ids"}:
        raise ValueError(f'Expected {file} to contain a list of class names, or {{"class_names": [...]}}.')
    if unknown := sorted(values.keys() - set(KEYS)):
        raise ValueError(
            f"{file} has unknown keys {unknown}; known are {', '.join(KEYS)}.{did_you_mean(unknown[0], KEYS)}"
        )
    mapping = values.get("ids", {})
    is_mapping = isinstance(mapping, dict) and all(isinstance(name, str) for name in mapping.values())
    if not is_mapping or ("ids" in values and not mapping):
        raise ValueError(f'Expected "ids" in {file} to map values to class names: {{"0": "{VOID}", "1": "road"}}.')
    names = values.get("class_names", [name for name in dict.fromkeys(mapping.values()) if name.lower() != VOID])
    if not (isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names)):
        raise ValueError(f'Expected {file} to contain a list of class names, or {{"class_names": [...]}}.')
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file} names a class twice: {', '.join(repeated)}.")
    ignore_index = values.get("ignore_index", 255)
    if type(ignore_index) is not int:
        raise ValueError(f'Expected "ignore_index" in {file} to be a whole number, but got {ignore_index!r}.')
    palette = _parse_palette(file, values.get("palette", []))
    if palette and len(palette) != len(names):
        raise ValueError(f"{file} has {len(names)} class names but {len(palette)} colours.")
    pixels = _parse_pixels(file, {key: values[key] for key in PIXEL_KEYS if key in values})
    classes = FolderClasses(tuple(names), palette, ignore_index, pixels=pixels)
    return _add_mapping(file, classes, mapping) if mapping else classes


def read_labelmap(file: Path) -> FolderClasses:
    """Read a ``labelmap.txt``, as CVAT writes beside its masks: lines of a class and its colour, ``car:200,0,0::``.

    Raises:
        ValueError: If a line has no colour, or if classes share a name or a colour.
    """
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    colors: dict[Color, str] = {}
    for line in filter(None, lines):
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([^:]+):(\d+),(\d+),(\d+)(:.*)?", line)
        color = tuple(int(value) for value in match.groups()[1:4]) if match else ()
        if match is None or max(color) > 255 or color in colors or match[1] in colors.values():
            raise ValueError(
                f"Expected lines of {file} to be a class and a colour of its own, such as car:200,0,0::, but got "
                f"{line!r}. To state the classes otherwise, write {file.with_name(CLASSES_FILE)}."
            )
        colors[color[0], color[1], color[2]] = match[1]
    names = tuple(name for name in colors.values() if name.lower() != VOID)
    targets = {color: names.index(name) if name in names else 255 for color, name in colors.items()}
    return _add_colors(FolderClasses(names), targets)


def _add_mapping(file: Path, classes: FolderClasses, mapping: Mapping[str, str]) -> FolderClasses:
    """Add the mapping of the key ``ids``, whose keys are all values or all colours."""
    names = classes.names
    if unknown := sorted({name for name in mapping.values() if name not in names and name.lower() != VOID}):
        raise ValueError(
            f'"ids" in {file} names {", ".join(map(repr, unknown))}, which are not classes; the classes are '
            f"{', '.join(names)}, and {VOID!r}.{did_you_mean(unknown[0], names)}"
        )
    targets = {key: names.index(name) if name in names else classes.ignore_index for key, name in mapping.items()}
    if all(key.startswith("#") for key in targets):
        return _add_colors(classes, {_parse_color(file, key): target for key, target in targets.items()})
    ids = {classes.ignore_index: classes.ignore_index} if classes.ignore_index >= 0 else {}
    for key, target in targets.items():
        if not (key.isascii() and key.isdigit() and int(key) <= 65535):
            raise ValueError(
                f'Expected the keys of "ids" in {file} to be all values 0 to 65535, or all colours like "#ff0000", but '
                f"got {key!r}."
            )
        ids[int(key)] = target
    return replace(classes, ids=ids)


def _add_colors(classes: FolderClasses, colors: dict[Color, int]) -> FolderClasses:
    """Add a mapping by colour. Without a palette, the first colour of each class becomes its palette."""
    palette = classes.palette
    if not palette and set(range(len(classes.names))) <= set(colors.values()):
        first = {target: color for color, target in reversed(colors.items())}
        palette = tuple(first[index] for index in range(len(classes.names)))
    return replace(
        classes, palette=palette, colors={color: index for index, color in enumerate(classes.palette)} | colors
    )


def _parse_pixels(file: Path, values: Mapping[str, Any]) -> PixelFormat:
    example = '{"channels": 4, "value_range": [0, 65535], "bands": [2, 1, 0]}'
    try:
        return PixelFormat(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected {file} to describe images as in {example}, but got {dict(values)}. {error}"
        ) from error


def _parse_palette(file: Path, values: Any) -> tuple[Color, ...]:
    try:
        palette = tuple((r, g, b) for r, g, b in values)
        if not all(type(channel) is int and 0 <= channel <= 255 for color in palette for channel in color):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f'Expected "palette" in {file} to be a list of [r, g, b], each 0 to 255.') from None
    return palette


def _parse_color(file: Path, text: str) -> Color:
    try:
        return parse_hex_color(text)
    except ValueError:
        raise ValueError(f'Expected a colour like "#ff0000" in "ids" of {file}, but got {text!r}.') from None
