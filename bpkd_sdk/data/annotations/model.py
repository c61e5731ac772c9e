"""Annotated images as all formats give them, and masks of their shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import cos, radians, sin
from typing import Any

import numpy as np

from bpkd_sdk.errors import import_optional
from bpkd_sdk.spec import Color

Regions = Iterable[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class AnnotatedImage:
    """The annotation of one image.

    Attributes:
        name: Path of the image as the annotation states it, with "/" between folders.
        size: (height, width) that the annotation states; None if it states none.
        regions: Function of height and width that returns pairs of a category and its mask, bool (H, W), in the order
            in which they are drawn. The category "void" marks pixels to ignore.
    """

    name: str
    size: tuple[int, int] | None
    regions: Callable[[int, int], Regions]


@dataclass(frozen=True)
class Annotations:
    """The content of an annotation file, or of a folder of them.

    Attributes:
        format: Name of the format, for reports.
        categories: Names of the categories, in their order.
        images: The annotated images.
        is_complete: Whether every pixel belongs to a category, so that pixels without one are void.
        colors: RGB colours that the annotation states for categories.
    """

    format: str
    categories: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]
    is_complete: bool = False
    colors: Mapping[str, Color] = field(default_factory=dict)


def draw_polygons(parts: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Return the mask, bool (H, W), of `polygon_runs`."""
    return np.asarray(import_optional("pycocotools.mask").decode(polygon_runs(parts, height, width)), bool)


def polygon_runs(parts: Sequence[Sequence[float]], height: int, width: int) -> dict[str, Any]:
    """Return the run lengths of one object, as pycocotools draws it: the union of polygons.

    Args:
        parts: Polygons, each a flat list x, y, x, y, ... in pixels. Those of fewer than 3 points have no area.
        height: Height of the image.
        width: Width of the image.

    Raises:
        ValueError: If a coordinate is not finite, lies far outside the image, or is a share of its size.
    """
    polygons = [list(map(float, part)) for part in parts if len(part) >= 6]
    for polygon in polygons:
        _check_coordinates(polygon, height, width)
    coco = import_optional("pycocotools.mask")
    drawn = coco.frPyObjects(polygons, height, width) if polygons else []
    empty = coco.encode(np.zeros((height, width), np.uint8, order="F"))
    runs: dict[str, Any] = coco.merge([empty, *drawn])
    return runs


def _check_coordinates(polygon: Sequence[float], height: int, width: int) -> None:
    points = np.array(polygon)
    if len(points) % 2:
        raise ValueError(f"a polygon has {len(points)} coordinates, expected pairs x, y")
    if not np.isfinite(points).all():
        raise ValueError("a polygon has coordinates that are not finite numbers")
    (left, top), (right, bottom) = points.reshape(-1, 2).min(0), points.reshape(-1, 2).max(0)
    extent = f"a polygon goes from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) in an image of {width} x {height}"
    if min(left, top) >= 0 and max(right, bottom) <= 1 and max(height, width) > 8:
        raise ValueError(f"{extent}: these are shares of its size, expected pixels. Multiply them by width and height")
    if left < -width or top < -height or right > 2 * width or bottom > 2 * height:
        raise ValueError(f"{extent}, far outside of it. Was it drawn on an image of another size?")


def rectangle(left: float, top: float, right: float, bottom: float, rotation: float = 0) -> list[float]:
    """Return the polygon x, y, x, y, ... of a rectangle that is turned around its centre by degrees, clockwise."""
    x, y, angle = (left + right) / 2, (top + bottom) / 2, radians(rotation)
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    turned = (
        (x + cos(angle) * (a - x) - sin(angle) * (b - y), y + sin(angle) * (a - x) + cos(angle) * (b - y))
        for a, b in corners
    )
    return [value for point in turned for value in point]


def ellipse(x: float, y: float, radius_x: float, radius_y: float, rotation: float = 0) -> list[float]:
    """Return a polygon x, y, x, y, ... of 360 points on an ellipse, turned around its centre by degrees, clockwise."""
    angles, turn = np.radians(np.arange(360)), radians(rotation)
    a, b = radius_x * np.cos(angles), radius_y * np.sin(angles)
    points = np.stack([x + cos(turn) * a - sin(turn) * b, y + sin(turn) * a + cos(turn) * b], axis=1)
    return [float(value) for value in points.flatten()]


def place_mask(mask: np.ndarray, left: int, top: int, height: int, width: int) -> np.ndarray:
    """Return a mask of an image, bool (H, W), with a smaller mask at a position; parts outside are cut off."""
    whole = np.zeros((height, width), bool)
    rows, columns = (
        slice(max(start, 0), max(min(start + length, limit), 0))
        for start, length, limit in ((top, mask.shape[0], height), (left, mask.shape[1], width))
    )
    whole[rows, columns] = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return whole


@contextmanager
def reading(source: object, expected: str) -> Iterator[None]:
    """Turn errors about missing or wrong entries of an annotation into a ValueError that names its source.

    Args:
        source: File, or place in a file, for the error message.
        expected: Name of the format.
    """
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{source} is not an annotation in the format of {expected}: {reason}.") from error
