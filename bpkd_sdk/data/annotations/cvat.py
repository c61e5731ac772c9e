"""Reader of "CVAT for images 1.1": one XML file for all images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from bpkd_sdk.data.annotations.model import (
    AnnotatedImage,
    Annotations,
    Regions,
    draw_polygons,
    ellipse,
    place_mask,
    rectangle,
)
from bpkd_sdk.data.labels import parse_hex_color
from bpkd_sdk.errors import format_list
from bpkd_sdk.spec import Color

SHAPES = ("polygon", "box", "ellipse", "mask")


def read_cvat(source: Path) -> Annotations:
    """Read a file of the format "CVAT for images 1.1".

    Shapes are drawn by ``z_order``, and those of one ``z_order`` in the order of the file, later ones on top. Tags,
    which describe whole images, are ignored.

    Args:
        source: Path of the XML file.

    Raises:
        ValueError: If the file is not of this format, or has shapes without an area, such as points and polylines.
    """
    try:
        root = ElementTree.parse(source).getroot()  # noqa: S314  (Expat limits the expansion of entities)
    except ElementTree.ParseError as error:
        raise ValueError(f"{source} is not XML ({error}). It may be cut short or damaged.") from error
    if root.tag != "annotations" or root.find("track") is not None:
        raise ValueError(
            f'{source} is not of the format "CVAT for images 1.1". Export the task of CVAT again in this format, '
            "also if it is a video."
        )
    labels = [label for label in root.iterfind("meta//labels/label") if label.find("parent") is None]
    images = root.findall("image")
    shapes = [(image, shape) for image in images for shape in image if shape.tag != "tag"]
    if unknown := [
        f"{image.get('name')}: {shape.tag} {shape.get('label')!r}" for image, shape in shapes if shape.tag not in SHAPES
    ]:
        raise ValueError(
            f"{len(unknown)} shapes in {source} are of a kind without an area; known are {', '.join(SHAPES)}. Redraw "
            f"or delete them:\n{format_list(unknown)}"
        )
    stated = [(label.findtext("name") or "").strip() for label in labels]
    used = sorted({(shape.get("label") or "").strip() for _, shape in shapes} - set(stated))
    if "" in (*stated, *used):
        raise ValueError(f"{source} has a label without a name.")
    colors = {
        name: color for name, label in zip(stated, labels, strict=True) if (color := _color(label.findtext("color")))
    }
    return Annotations(
        "CVAT for images",
        (*dict.fromkeys(stated), *used),
        tuple(_annotated(image, source) for image in images),
        colors=colors,
    )


def _annotated(image: Element, source: Path) -> AnnotatedImage:
    name = image.get("name")
    if not name:
        raise ValueError(f"{source} has an image without a name.")
    height, width = image.get("height"), image.get("width")
    shapes = sorted((shape for shape in image if shape.tag in SHAPES), key=lambda shape: int(shape.get("z_order", 0)))
    size = (int(height), int(width)) if height and width else None
    return AnnotatedImage(name.replace("\\", "/"), size, partial(_regions, shapes))


def _regions(shapes: Sequence[Element], height: int, width: int) -> Regions:
    for shape in shapes:
        label = (shape.get("label") or "").strip()
        try:
            yield label, _mask(shape, height, width)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{shape.tag} {label!r}: {error}") from error


def _mask(shape: Element, height: int, width: int) -> np.ndarray:
    values = shape.attrib
    if shape.tag == "mask":
        return _run_lengths(shape, height, width)
    if shape.tag == "polygon":
        points = [float(value) for point in values["points"].split(";") for value in point.split(",")]
    else:
        rotation = float(values.get("rotation", 0))
        keys = ("xtl", "ytl", "xbr", "ybr") if shape.tag == "box" else ("cx", "cy", "rx", "ry")
        a, b, c, d = (float(values[key]) for key in keys)
        points = (rectangle if shape.tag == "box" else ellipse)(a, b, c, d, rotation)
    return draw_polygons([points], height, width)


def _run_lengths(shape: Element, height: int, width: int) -> np.ndarray:
    """Decode the run lengths of a mask, row by row, beginning with the pixels that do not belong to it."""
    left, top, columns, rows = (int(float(shape.attrib[key])) for key in ("left", "top", "width", "height"))
    runs = np.array([int(run) for run in shape.attrib["rle"].split(",")])
    if runs.sum() != rows * columns:
        raise ValueError(f"run lengths have {runs.sum()} pixels, expected {columns} x {rows}")
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(rows, columns)
    return place_mask(inside, left, top, height, width)


def _color(text: str | None) -> Color | None:
    try:
        return parse_hex_color(text or "")
    except ValueError:
        return None
