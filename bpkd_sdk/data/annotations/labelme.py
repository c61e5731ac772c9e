"""Reader of LabelMe: one JSON file for each image."""

from __future__ import annotations

import base64
import io
import math
import posixpath
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bpkd_sdk.data.annotations.model import (
    AnnotatedImage,
    Annotations,
    Regions,
    draw_polygons,
    ellipse,
    place_mask,
    reading,
    rectangle,
)
from bpkd_sdk.data.classes_file import CLASSES_FILE, VOID
from bpkd_sdk.data.pairs import list_files
from bpkd_sdk.errors import format_list
from bpkd_sdk.files import read_json
from bpkd_sdk.progress import track

Shape = Mapping[str, Any]

SHAPES = ("polygon", "rectangle", "oriented_rectangle", "circle", "mask")
IGNORE, BACKGROUND = "__ignore__", "_background_"  # LabelMe's own names


def read_labelme(folder: Path) -> Annotations:
    """Read the LabelMe files in a folder and its sub-folders.

    Shapes are drawn in the order of the file, later ones on top, as LabelMe itself does. A hole is a shape of another
    category on top, for example ``_background_``. The label ``__ignore__`` is void. Categories are sorted by name,
    since the files have no list of them.

    Args:
        folder: Folder of the JSON files.

    Raises:
        ValueError: If a file is not of LabelMe, or has shapes without an area, such as lines and points.
    """
    files = [file for file in list_files(folder, (".json",)) if file.name != CLASSES_FILE]
    images, categories, unknown = [], set(), []
    for file in track(files, total=len(files), description="Reading LabelMe files"):
        content = read_json(file)
        with reading(file, "LabelMe"):
            shapes = [
                {key: shape.get(key) for key in ("label", "points", "shape_type", "mask")}
                for shape in content["shapes"]
            ]
            for index, shape in enumerate(shapes):
                shape["label"] = VOID if shape["label"] == IGNORE else str(shape["label"]).strip()
                if (shape["shape_type"] or "polygon") not in SHAPES:
                    unknown.append(f"{file}: shape {index + 1}, {shape['label']!r}, is a {shape['shape_type']}")
            categories |= {shape["label"] for shape in shapes}
            stated = str(content["imagePath"]).replace("\\", "/")
            name = posixpath.normpath(posixpath.join(file.parent.relative_to(folder).as_posix(), stated))
            height, width = content.get("imageHeight"), content.get("imageWidth")
            size = (int(height), int(width)) if height and width else None
            images.append(AnnotatedImage(name, size, partial(_regions, shapes)))
    if unknown:
        raise ValueError(
            f"{len(unknown)} shapes are of a kind without an area; known are {', '.join(SHAPES)}. Redraw or delete "
            f"them:\n{format_list(unknown)}"
        )
    names = sorted(categories - {VOID, BACKGROUND})
    return Annotations("LabelMe", ((BACKGROUND,) if BACKGROUND in categories else ()) + tuple(names), tuple(images))


def _regions(shapes: Sequence[Shape], height: int, width: int) -> Regions:
    for index, shape in enumerate(shapes):
        place = f"shape {index + 1}, {shape['label']!r}"
        try:
            with reading(place, "LabelMe"):
                yield shape["label"], _mask(shape, height, width)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _mask(shape: Shape, height: int, width: int) -> np.ndarray:
    kind, points = shape["shape_type"] or "polygon", shape["points"]
    if kind in ("rectangle", "circle", "mask"):
        (x, y), (to_x, to_y) = points
        if kind == "mask":
            with Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=["PNG"]) as image:
                return place_mask(np.asarray(image).astype(bool), round(x), round(y), height, width)
        radius = math.dist((x, y), (to_x, to_y))
        return draw_polygons(
            [rectangle(x, y, to_x, to_y) if kind == "rectangle" else ellipse(x, y, radius, radius)], height, width
        )
    return draw_polygons([[value for x, y in points for value in (x, y)]], height, width)
