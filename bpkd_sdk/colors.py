"""Colours of classes: those of data sets without a palette, and those in which masks are drawn over images."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import count

import cv2
import numpy as np

from bpkd_sdk.spec import Color

_BACKGROUND = ("background", "bg")  # names of the class that `distinct_colors` paints black

# In CIELAB units. A street at night has a lightness of 10 to 30, and an overlay halves all differences.
_LIGHTEST, _DARKEST, _DISTANCE = 95, 44, 28
_STEP = 15  # between the values of a channel among which new colours are chosen


def distinct_colors(names: Sequence[str]) -> tuple[Color, ...]:
    """Return RGB colours (0..255) for classes without a palette.

    Background is black. The other colours have hues a golden angle apart, in three brightnesses.

    Args:
        names: Names of the classes.

    Examples:
        >>> distinct_colors(["background", "road"])
        ((0, 0, 0), (242, 109, 109))
        >>> distinct_colors(["road"])
        ((242, 109, 109),)
    """
    hues = count()
    return tuple((0, 0, 0) if name.strip("_ ").lower() in _BACKGROUND else _color(next(hues)) for name in names)


def _color(index: int) -> Color:
    hue, saturation, brightness = index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), (0.95, 0.75, 0.55)[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def overlay_colors(palette: Iterable[Sequence[int]]) -> tuple[Color, ...]:
    """Return the RGB colours (0..255) in which the classes of a palette are drawn over images and in legends.

    Palettes of data sets contain black, dark blue and nearly equal colours, which cannot be seen or told apart over a
    dark image. A colour is kept if its CIELAB lightness is at least 44 and its distance to each colour that was kept
    before is at least 28. Each other colour becomes the nearest one of lightness 44 to 95 that has this distance to all
    colours; if there is none because of the number of classes, the one that is farthest from the others.

    Args:
        palette: RGB colour of each class. Files of masks keep it.

    Examples:
        >>> overlay_colors([(0, 0, 0), (200, 100, 0), (200, 100, 1)])
        ((105, 105, 105), (200, 100, 0), (210, 150, 75))
    """
    return _overlay_colors(tuple((int(red), int(green), int(blue)) for red, green, blue in palette))


@lru_cache(maxsize=64)  # an overlay is drawn for every frame of a video
def _overlay_colors(palette: tuple[Color, ...]) -> tuple[Color, ...]:
    levels = np.arange(0, 256, _STEP)
    choices = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _to_lab(choices)
    is_visible = (lab[:, 0] >= _DARKEST) & (lab[:, 0] <= _LIGHTEST)
    choices, lab = choices[is_visible], lab[is_visible]
    colors, wanted = list(palette), _to_lab(palette)
    used = np.empty((0, 3), np.float32)
    replaced = []
    for index, color in enumerate(wanted):
        if color[0] >= _DARKEST and _distances(color, used).min(initial=_DISTANCE) >= _DISTANCE:
            used = np.vstack([used, color])
        else:
            replaced.append(index)
    nearest = np.min([np.full(len(lab), np.inf), *(_distances(color, lab) for color in used)], axis=0)
    for index in replaced:
        # The distance to the other colours decides; among choices that are far enough, the nearest to the palette.
        score = np.minimum(nearest, _DISTANCE) - _distances(wanted[index], lab) / 1000
        best = int(score.argmax())
        red, green, blue = choices[best].tolist()
        colors[index] = red, green, blue
        nearest = np.minimum(nearest, _distances(lab[best], lab))
    return tuple(colors)


def _to_lab(colors: Sequence[Color] | np.ndarray) -> np.ndarray:
    """Convert RGB colours (N, 3) to CIELAB, float32 (N, 3)."""
    rgb = np.asarray(colors, np.float32).reshape(-1, 1, 3) / 255
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB))[:, 0] if len(rgb) else rgb[:, 0]


def _distances(color: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the Euclidean distances of a colour (3,) to others (N, 3)."""
    return np.asarray(np.sqrt(((others - color) ** 2).sum(axis=1)))
