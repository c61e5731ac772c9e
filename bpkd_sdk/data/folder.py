"""A folder of your own images: ``images/<split>``, ``labels/<split>`` and ``classes.json`` (or palette PNGs)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from bpkd_sdk.data.dataset import FileDataset, Pair, pair_files
from bpkd_sdk.models.spec import Color, distinct_colors

CLASSES_FILE = "classes.json"


def open_folder(root: str | Path, split: str = "train") -> FileDataset:
    """Open ``root/images/<split>`` with ``root/labels/<split>``.

    Labels are PNGs of class ids with the images' names; 255 is void. ``classes.json`` is a list of class names, or
    ``{"class_names": [...], "palette": [[r, g, b], ...], "ignore_index": 255}`` of which only the names are required.
    Without that file the labels must be palette PNGs with fewer than 256 colours, each of which is then a class. Where
    there is no folder ``root/labels`` at all, the labels are blank (``has_labels`` is False) and only
    ``distill(..., labels="teacher")`` can use the data.

    Raises:
        FileNotFoundError: If a folder is missing or empty.
        ValueError: If images lack labels, or the classes cannot be told.
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
    names, palette, ignore_index = _classes(root, pairs)
    return FileDataset(f"{root.name}/{split}", pairs, names, palette, ignore_index)


def _classes(root: Path, pairs: list[Pair]) -> tuple[list[str], list[Color], int]:
    file = root / CLASSES_FILE
    if file.is_file():
        return _read_classes(file)
    label = pairs[0].label
    if label is not None and (palette := _png_palette(label)):
        return [f"class {i}" for i in range(len(palette))], palette, 255
    raise ValueError(
        f"The classes of {root} cannot be told: write {file} with a list of class names, for example "
        '["road", "car"], or use palette PNGs with one colour for each class as labels.'
    )


def _read_classes(file: Path) -> tuple[list[str], list[Color], int]:
    try:
        content: Any = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}).") from error
    facts: Any = {"class_names": content} if isinstance(content, list) else content
    names = facts.get("class_names") if isinstance(facts, dict) else None
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise ValueError(f'Expected {file} to hold a list of class names, or {{"class_names": [...]}}.')
    if unknown := facts.keys() - {"class_names", "palette", "ignore_index"}:
        raise ValueError(f"{file} has unknown keys {sorted(unknown)}; known are class_names, palette, ignore_index.")
    palette = [(int(r), int(g), int(b)) for r, g, b in facts.get("palette", [])] or [*distinct_colors(len(names))]
    if len(palette) != len(names):
        raise ValueError(f"{file} has {len(names)} class names but {len(palette)} colours.")
    return names, palette, int(facts.get("ignore_index", 255))


def _png_palette(label: Path) -> list[Color]:
    with Image.open(label) as image:
        flat = image.getpalette() if image.mode == "P" else None
    colors = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat) - 2, 3)] if flat else []
    # Writers fill a palette up to 256 entries with black, or with the grey ramp; neither is a class.
    while len(colors) > 1 and (colors[-1] == (0, 0, 0) or colors[-1] == (len(colors) - 1,) * 3):
        colors.pop()
    return colors if len(colors) < 256 else []
