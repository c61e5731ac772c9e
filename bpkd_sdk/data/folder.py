"""A folder of the user's own images: ``images/<split>``, ``labels/<split>`` and ``classes.json`` (or palette PNGs)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from bpkd_sdk.data.dataset import IMAGE_SUFFIXES, FileDataset, Finding, pair_files
from bpkd_sdk.data.labels import hex_color, palette_of, read_label
from bpkd_sdk.errors import did_you_mean, listed
from bpkd_sdk.files import read_json
from bpkd_sdk.models.spec import Color, distinct_colors

CLASSES_FILE = "classes.json"
VOID = "void"
KEYS = ("class_names", "palette", "ignore_index", "ids")
SAMPLED = 64  # label files, spread over all splits, that are looked at to find out what labels mean

_said: set[str] = set()  # warnings of this process


@dataclass(frozen=True)
class Classes:
    """Meaning of the labels in a folder.

    Attributes:
        names: One per class.
        palette: One RGB colour per class; empty where none is stated.
        ignore_index: The void label.
        ids: Class or void label of each id in the files; None where ids are the classes.
        colors: Class or void label of each colour in the files; None where files are read by id.
    """

    names: tuple[str, ...]
    palette: tuple[Color, ...] = ()
    ignore_index: int = 255
    ids: Mapping[int, int] | None = None
    colors: Mapping[Color, int] | None = None


class FolderDataset(FileDataset):
    """The data set that `open_folder` returns.

    Args:
        root: The folder.
        split: The split.
        pairs: Image and label files.
        classes: What the labels mean.
    """

    def __init__(self, root: Path, split: str, pairs: Sequence[Any], classes: Classes) -> None:
        super().__init__(
            f"{root.name}/{split}",
            pairs,
            classes.names,
            classes.palette or distinct_colors(len(classes.names)),
            classes.ignore_index,
            classes.ids,
            classes.colors,
        )
        self.classes_file = root / CLASSES_FILE

    def label_advice(self, findings: Sequence[Finding]) -> str:
        """Write out the mapping that would give the values found a meaning."""
        values = sorted({value for finding in findings for value in finding.labels} - {self.ignore_index})
        if self.colors is not None or set(values) <= set(range(self.num_classes)):
            return ""
        void = 1 if values[0] == 0 and len(values) == self.num_classes + 1 else 0
        meanings = [*[VOID] * void, *self.class_names, *[VOID] * len(values)]
        ids = {str(value): meaning for value, meaning in zip(values[:20], meanings, strict=False)}
        return (
            f"\nIf these values stand for classes, say in {self.classes_file} for which, for example:\n"
            f'  {{"class_names": {json.dumps(self.class_names[:20])}, "ids": {json.dumps(ids)}}}'
        )


def open_folder(root: str | Path, split: str = "train") -> FolderDataset:
    """Open ``root/images/<split>`` with ``root/labels/<split>``.

    Labels are PNGs with the images' names. ``classes.json`` is a list of class names, or an object of

    - ``class_names``: one per class, in the order of the ids;
    - ``palette``: one ``[r, g, b]`` per class;
    - ``ignore_index``: the void label, 255 by default;
    - ``ids``: the class of each value in the files, ``{"0": "void", "1": "road", "2": "car"}``, or of each colour,
      ``{"#000000": "void", "#ff0000": "car"}``; then `class_names` may be left out, and the classes have the order in
      which they first appear.

    Labels are read by id: grey values are class ids and 255 is void. They are read by colour where most files have
    colours (RGB, or a palette, that is not grey): the colours are those of ``ids`` or ``palette``, else those
    of the palette in the first label file, to which all others are held; where there is no ``classes.json`` either,
    each of its colours is a class. Where there are two classes and files hold only 0 and 255, these are the two
    classes. Where there is no folder ``root/labels`` at all, the labels are blank (`has_labels` is False) and only
    ``distill(..., labels="teacher")`` can use the data.

    Raises:
        FileNotFoundError: If a folder is missing or empty.
        ValueError: If images lack labels, ``classes.json`` cannot be used, or the classes are not known.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    images = root / "images" / split
    if not images.is_dir():
        splits = sorted(path.name for path in (root / "images").glob("*") if path.is_dir())
        raise FileNotFoundError(
            f"There is no folder {images}. Expected {root}/images/<split> and {root}/labels/<split>; "
            f"splits found: {splits or 'none'}."
        )
    labels = root / "labels"
    pairs = pair_files(images, labels / split if labels.is_dir() else None)
    known = {pair.label for pair in pairs}
    if orphans := [path for path in sorted((labels / split).rglob("*.png")) if path not in known]:
        warnings.warn(
            f"{len(orphans)} label files in {labels / split} have no image of their name in {images} with one of the "
            f"suffixes {', '.join(IMAGE_SUFFIXES)}; they are left out:\n{listed(orphans, limit=5)}",
            stacklevel=2,
        )
    return FolderDataset(root, split, pairs, find_classes(root))


def find_classes(root: Path) -> Classes:
    """Find out what the labels below ``root/labels`` mean, from ``classes.json`` and from the label files.

    All splits are looked at together, so that they are read by one rule.

    Raises:
        ValueError: If ``classes.json`` cannot be used, or the classes are not known.
    """
    file = root / CLASSES_FILE
    classes = _read_classes(file) if file.is_file() else None
    files = sorted((root / "labels").rglob("*.png"))
    sampled = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, SAMPLED).astype(int))] if files else []
    if classes is not None and classes.ids is None and classes.colors is None:
        return _found_in_labels(root, classes, sampled)
    if classes is not None:
        return classes
    colors = _class_colors(_shared_palette([look.palette for look in map(_look, sampled) if look.palette]))
    if not colors:
        raise ValueError(
            f"The classes of {root} are not known: write {file} with a list of class names, for example "
            '["road", "car"], or use palette PNGs with one colour for each class as labels.'
        )
    names = tuple(f"class {index}" for index in range(len(colors)))
    return Classes(names, tuple(colors), colors=_by_color(colors))


def _found_in_labels(root: Path, classes: Classes, sampled: Sequence[Path]) -> Classes:
    """Complete the classes of a classes.json without ``ids`` from the label files."""
    looks = [_look(file) for file in sampled]
    colored = sum(look.has_colors for look in looks)
    if not colored or 2 * colored < len(looks):
        if colored:
            _warn_once(
                f"{colored} of {len(looks)} label files of {root} that were looked at have colours and the others are "
                f'grey. All are read by id, palettes by their index. To read them by colour, write "ids" in '
                f'{CLASSES_FILE}: {{"ids": {{"#ff0000": "{classes.names[0]}", ...}}}}.'
            )
        return _read_by_id(root, classes, sampled)
    if not classes.palette:
        return _read_by_first_palette(root, classes, [look.palette for look in looks if look.palette])
    if len(set(classes.palette)) < len(classes.palette):
        raise ValueError(f"{root / CLASSES_FILE} gives several classes one colour, and labels are read by colour.")
    return replace(classes, colors=_by_color(classes.palette))


def _read_by_first_palette(root: Path, classes: Classes, palettes: Sequence[list[Color]]) -> Classes:
    """Give each class the colour at its index in the first palette; ids remain ids where that cannot tell classes."""
    palette = _shared_palette(palettes)
    colors = palette[: len(classes.names)]
    differ = any(other != palette[: len(other)] for other in palettes)
    if len(set(colors)) < len(colors) and differ:
        raise ValueError(
            f"The label files of {root} have palettes that differ, and that give several classes one colour, so that "
            f'neither indices nor colours tell the classes. Write "palette" in {root / CLASSES_FILE}, the colour of '
            "each class, or save the labels in grey."
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
    # White at index 255 is the end of a grey ramp, with which writers fill palettes up.
    known = {void: classes.ignore_index} if void and void != (255, 255, 255) else {}
    stated = tuple(colors) if len(colors) == len(classes.names) else ()
    return replace(classes, palette=stated, colors=known | _by_color(colors))


def _read_by_id(root: Path, classes: Classes, sampled: Sequence[Path]) -> Classes:
    """Take ids as the classes; 0 and 255 as two classes where label files hold nothing else."""
    if len(classes.names) != 2 or classes.ignore_index != 255:
        return classes
    zero, one = classes.names
    masks = _masks_of_0_and_255(sampled)
    if masks == "some":
        _warn_once(
            f"Some label files of {root} hold only 0 and 255, others 0 and 1: 255 is read as void. If it is {one!r}, "
            f'write "ids": {{"0": "{zero}", "1": "{one}", "255": "{one}"}} in {CLASSES_FILE}.'
        )
    if masks != "all":
        return classes
    _warn_once(
        f"The label files of {root} hold only 0 and 255, and there are two classes: 0 is read as {zero!r} and 255 as "
        f'{one!r}. If 255 is void, write "ids": {{"0": "{zero}", "1": "{one}", "255": "{VOID}"}} in {CLASSES_FILE}.'
    )
    return replace(classes, ids={0: 0, 255: 1})


def _warn_once(message: str) -> None:
    """Warn of what a folder means; it is opened once for each split."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=2)


def _read_classes(file: Path) -> Classes:
    content: Any = read_json(file)
    facts: Any = {"class_names": content} if isinstance(content, list) else content
    if not isinstance(facts, dict) or not facts.keys() & {"class_names", "ids"}:
        raise ValueError(f'Expected {file} to hold a list of class names, or {{"class_names": [...]}}.')
    if unknown := sorted(facts.keys() - set(KEYS)):
        raise ValueError(
            f"{file} has unknown keys {unknown}; known are {', '.join(KEYS)}.{did_you_mean(unknown[0], KEYS)}"
        )
    meanings = facts.get("ids", {})
    strings = isinstance(meanings, dict) and all(isinstance(name, str) for name in meanings.values())
    if not strings or ("ids" in facts and not meanings):
        raise ValueError(f'Expected "ids" in {file} to map values to class names: {{"0": "{VOID}", "1": "road"}}.')
    names = facts.get("class_names", [name for name in dict.fromkeys(meanings.values()) if name.lower() != VOID])
    if not (isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names)):
        raise ValueError(f'Expected {file} to hold a list of class names, or {{"class_names": [...]}}.')
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file} names a class twice: {', '.join(repeated)}.")
    ignore_index = facts.get("ignore_index", 255)
    if type(ignore_index) is not int:
        raise ValueError(f'Expected "ignore_index" in {file} to be a whole number, but got {ignore_index!r}.')
    palette = _read_palette(file, facts.get("palette", []))
    if palette and len(palette) != len(names):
        raise ValueError(f"{file} has {len(names)} class names but {len(palette)} colours.")
    classes = Classes(tuple(names), palette, ignore_index)
    return _with_meanings(file, classes, meanings) if "ids" in facts else classes


def _with_meanings(file: Path, classes: Classes, meanings: Mapping[str, str]) -> Classes:
    """The classes with the mapping of ``ids``, by id or by colour."""
    names = classes.names
    if strange := sorted({name for name in meanings.values() if name not in names and name.lower() != VOID}):
        raise ValueError(
            f'"ids" in {file} names {", ".join(map(repr, strange))}, which are no class; classes are '
            f"{', '.join(names)}, and {VOID!r}.{did_you_mean(strange[0], names)}"
        )
    targets = {key: names.index(name) if name in names else classes.ignore_index for key, name in meanings.items()}
    if all(key.startswith("#") for key in targets):
        colors = {_parse_hex(file, key): target for key, target in targets.items()}
        stated = {color: index for index, color in enumerate(classes.palette)}
        shown = [next((c for c, target in colors.items() if target == index), None) for index in range(len(names))]
        palette = classes.palette or tuple(color for color in shown if color is not None)
        return replace(classes, palette=palette if len(palette) == len(names) else (), colors=stated | colors)
    ids = {classes.ignore_index: classes.ignore_index} if classes.ignore_index >= 0 else {}
    for key, target in targets.items():
        if not (key.isascii() and key.isdigit() and int(key) <= 65535):
            raise ValueError(
                f'Expected the keys of "ids" in {file} to be all values 0 to 65535, or all colours like "#ff0000", but '
                f"got {key!r}."
            )
        ids[int(key)] = target
    return replace(classes, ids=ids)


def _read_palette(file: Path, values: Any) -> tuple[Color, ...]:
    try:
        palette = tuple((r, g, b) for r, g, b in values)
        if not all(type(channel) is int and 0 <= channel <= 255 for color in palette for channel in color):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f'Expected "palette" in {file} to be a list of [r, g, b], each 0 to 255.') from None
    return palette


def _parse_hex(file: Path, text: str) -> Color:
    try:
        red, green, blue = bytes.fromhex(text.removeprefix("#"))
    except ValueError:
        raise ValueError(f'Expected a colour like "#ff0000" in "ids" of {file}, but got {text!r}.') from None
    return red, green, blue


def _shared_palette(palettes: Sequence[list[Color]]) -> list[Color]:
    """The first of several palettes; the longest, where all agree as far as they go."""
    longest = max(palettes, key=len, default=[])
    return longest if all(longest[: len(palette)] == palette for palette in palettes) else palettes[0]


@dataclass(frozen=True)
class _Look:
    """Kind of pixels in a label file.

    Attributes:
        has_colors: Whether its pixels are colours: RGB that is not grey, or a palette that is not.
        palette: The colours of such a palette.
    """

    has_colors: bool = False
    palette: list[Color] = field(default_factory=list)


def _look(file: Path) -> _Look:
    """Look at a label file; one that cannot be read has no colours, and `check` names it together with all others."""
    try:
        with Image.open(file) as image:
            palette = palette_of(image)
            pixels = np.asarray(image) if image.mode in ("RGB", "RGBA") else np.zeros((1, 1, 3))
    except Exception:  # what Pillow's readers raise for a damaged file has no base class
        return _Look()
    has_palette = bool((palette != palette[:, :1]).any())  # greys are ids
    has_colors = has_palette or bool((pixels[..., :3] != pixels[..., :1]).any())
    return _Look(has_colors, [(r, g, b) for r, g, b in palette.tolist()] if has_palette else [])


def _class_colors(palette: Sequence[Color]) -> list[Color]:
    """The colours of a palette that are classes; none of a full one of 256 colours."""
    colors = list(palette)
    # Writers fill a palette up to 256 entries with black, or with the grey ramp; neither is a class.
    while len(colors) > 1 and (colors[-1] == (0, 0, 0) or colors[-1] == (len(colors) - 1,) * 3):
        colors.pop()
    return colors if len(colors) < 256 else []


def _by_color(colors: Sequence[Color]) -> dict[Color, int]:
    """Position of each colour; the first of equal ones."""
    return {color: index for index, color in reversed(list(enumerate(colors)))}


def _masks_of_0_and_255(files: Sequence[Path]) -> Literal["all", "some", "none"]:
    """Return whether all, some or none of the label files are masks of 0 and 255; files of one bit do not count.

    "some" means that other files have 1 and no file has both 1 and 255.
    """
    found = []
    for file in files:
        try:
            label = read_label(file)
        except ValueError:
            continue  # `check` names it together with all others
        if label.dtype != np.bool_:
            found.append(set(np.unique(label).tolist()))
    with_255 = [values for values in found if 255 in values]
    if not with_255 or any(values - {0, 1, 255} for values in found) or any(1 in values for values in with_255):
        return "none"
    return "some" if any(1 in values for values in found) else "all"
