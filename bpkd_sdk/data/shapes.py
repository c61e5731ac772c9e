"""The generated data set "shapes": scenes of overlapping, textured objects with thin and thick parts.

Scenes are not stored: `render` is a pure function of a seed, a split and an index. Each class has a typical hue, but
neighbouring hues overlap and the ground may have any hue, so that a network must also learn outlines and shading.
Objects are drawn at twice the resolution as premultiplied RGBA. Averaged down, the alpha is the share of each pixel
that an object covers. The image is blended by this share, and the label is the object if the share is at least one
half, so that image and label agree to half a pixel.

Points are complex numbers x + iy in pixels, with y pointing down: addition moves, multiplication rotates and scales.
"""

from __future__ import annotations

import cmath
import colorsys
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

CLASS_NAMES: tuple[str, ...] = ("ground", "disc", "ring", "box", "star", "leaf", "pole", "wire", "fence")

# Okabe and Ito's colours, which colour-blind people can distinguish (https://jfly.uni-koeln.de/color/), and two greys.
PALETTE: tuple[tuple[int, int, int], ...] = (
    (52, 58, 70),
    (0, 114, 178),
    (86, 180, 233),
    (230, 159, 0),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (222, 222, 222),
)

_MIN_SIDE = 32
_FINE = 2  # canvas pixels per image pixel, in each direction
_FRACTION_BITS = 4  # of OpenCV's fixed-point coordinates; rounding to them also hides float differences of machines

_GROUND_SATURATION, _GROUND_VALUE = (0.05, 0.5), (0.3, 0.85)

_Points = NDArray[np.complexfloating]
_Floats = NDArray[np.float32]
_Bytes = NDArray[np.uint8]
_Color = tuple[float, float, float]


def render(seed: int, split: str, index: int, size: tuple[int, int] = (128, 128)) -> tuple[_Bytes, _Bytes]:
    """Draw one scene and its label.

    Args:
        seed: Seed of the data set, at least 0.
        split: Name of the split, such as "train" or "val". Splits have no scene in common.
        index: Index of the scene in the split, at least 0. The number of scenes is not limited.
        size: (height, width) in pixels, each at least 32. Objects grow with the shorter side; lines stay thin.

    Returns:
        The image, uint8 (H, W, 3) RGB, and the label, uint8 (H, W) with ids into `CLASS_NAMES`.

    Raises:
        ValueError: If a side is shorter than 32 pixels, or if `seed` or `index` is negative.

    Examples:
        >>> image, label = render(seed=0, split="train", index=0)
        >>> image.shape, label.shape
        ((128, 128, 3), (128, 128))
    """
    if min(size) < _MIN_SIDE:
        raise ValueError(f"Expected both sides of `size` to be at least {_MIN_SIDE} pixels, but got {size}.")
    if min(seed, index) < 0:
        raise ValueError(f"Expected `seed` and `index` to be 0 or more, but got {seed} and {index}.")
    rng = np.random.default_rng((seed, zlib.crc32(split.encode()), index))
    light = cmath.rect(1, rng.uniform(-0.85, -0.15) * math.pi)
    mottle = _mottle(rng, size)
    ground = _color(rng, rng.random(), _GROUND_SATURATION, _GROUND_VALUE)
    image = _paint_ground(rng, ground, mottle)
    label = np.zeros(size, np.uint8)
    for class_id in _draw_classes(rng):
        pen = _Pen(
            np.zeros((size[0] * _FINE, size[1] * _FINE, 4), np.uint8), _object_color(rng, class_id, ground), light
        )
        _DRAW[class_id](pen, rng)
        _paste(pen, image, label, class_id, np.roll(mottle, int(rng.integers(_MIN_SIDE)), axis=1))
    return _photograph(rng, image, light), label


@dataclass(frozen=True)
class _Pen:
    """A pen that draws one object in one colour, lit from one side, on a premultiplied RGBA canvas."""

    canvas: _Bytes
    color: _Color
    light: complex

    @property
    def extent(self) -> complex:
        """Lower right corner of the image."""
        height, width = self.canvas.shape[:2]
        return complex(width, height) / _FINE

    @property
    def unit(self) -> float:
        """Length that corresponds to one pixel of a scene with 128 pixels on its shorter side."""
        return min(self.extent.real, self.extent.imag) / 128

    def fill(self, outline: _Points, tone: float = 1.0) -> None:
        """Fill a polygon with the colour times `tone`."""
        cv2.fillPoly(self.canvas, [_fixed(outline)], self._ink(tone), shift=_FRACTION_BITS)

    def stroke(self, path: _Points, width: float, tone: float = 1.0, closed: bool = False) -> None:
        """Draw a line with round ends and joints, `width` image pixels wide, with the colour times `tone`."""
        thickness = max(1, round(width * _FINE))
        cv2.polylines(self.canvas, [_fixed(path)], closed, self._ink(tone), thickness, shift=_FRACTION_BITS)

    def tube(self, path: _Points, width: float, closed: bool = False) -> None:
        """Draw a line that looks like a tube: narrower and brighter strokes, each nearer to the light."""
        steps = max(2, round(width))
        for step in range(steps):
            progress = step / steps
            self.stroke(path + self.light * width * progress / 4, width * (1 - progress), 0.65 + 0.6 * progress, closed)

    def _ink(self, tone: float) -> tuple[float, ...]:
        return *(min(255.0, channel * tone) for channel in self.color), 255.0


def _fixed(points: _Points) -> NDArray[np.int32]:
    """Convert points to OpenCV's fixed-point coordinates on the canvas, where pixel centres are whole numbers."""
    fine = (points * _FINE - (0.5 + 0.5j)).view(np.float64).reshape(-1, 2)
    return np.asarray(np.rint(fine * 2**_FRACTION_BITS), np.int32)


def _circle(count: int, phase: float = 0.0) -> _Points:
    """Return `count` points on the unit circle."""
    return np.asarray(np.exp(1j * (phase + np.arange(count) * (2 * math.pi / count))))


def _draw_point(pen: _Pen, rng: np.random.Generator, margin: float = 0.08) -> complex:
    """Draw a point at a distance of at least `margin`, a share of the image, from its sides."""
    x, y = rng.uniform(margin, 1 - margin, 2)
    return complex(x * pen.extent.real, y * pen.extent.imag)


def _draw_rotation(rng: np.random.Generator, limit: float = math.pi) -> complex:
    """Draw a rotation by -`limit` to `limit` radians."""
    return cmath.rect(1, rng.uniform(-limit, limit))


def _disc(pen: _Pen, rng: np.random.Generator) -> None:
    center, radius = _draw_point(pen, rng), rng.uniform(11, 24) * pen.unit
    for step in np.arange(10) / 10:
        pen.fill(center + radius * (0.4 * step * pen.light + (1 - step) * _circle(48)), 0.6 + 0.65 * step)


def _ring(pen: _Pen, rng: np.random.Generator) -> None:
    radius = rng.uniform(12, 24) * pen.unit
    pen.tube(_draw_point(pen, rng) + radius * _circle(48), radius * rng.uniform(0.35, 0.55), closed=True)


def _box(pen: _Pen, rng: np.random.Generator) -> None:
    half = complex(*rng.uniform(9, 22, 2)) * pen.unit
    center, turn, corner = _draw_point(pen, rng), _draw_rotation(rng), 4 * pen.unit
    outline = center + turn * np.array([half, half.conjugate(), -half, -half.conjugate()])
    pen.fill(outline, 0.7)
    pen.stroke(outline, 2 * corner, 0.7, closed=True)
    pen.fill(outline)
    pen.stroke(outline, corner, closed=True)
    for x in np.arange(-half.real, half.real, rng.uniform(4, 7) * pen.unit):
        pen.stroke(center + turn * np.array([complex(x, -half.imag), complex(x, half.imag)]), 1.5 * pen.unit, 0.75)


def _star(pen: _Pen, rng: np.random.Generator) -> None:
    tips = int(rng.integers(5, 8))
    center, radius = _draw_point(pen, rng), rng.uniform(16, 28) * pen.unit
    corners = radius * _circle(2 * tips, rng.uniform(0, math.pi))
    corners[1::2] *= rng.uniform(0.42, 0.55)
    for start, end in zip(corners, np.roll(corners, -1), strict=True):
        normal = (end - start) * -1j / abs(end - start)
        pen.fill(center + np.array([0, start, end]), 0.9 + 0.35 * (normal * pen.light.conjugate()).real)


def _leaf(pen: _Pen, rng: np.random.Generator) -> None:
    center, turn, radius = _draw_point(pen, rng), _draw_rotation(rng), rng.uniform(16, 27) * pen.unit
    angle = np.arange(96) * (2 * math.pi / 96)
    wave = 1 + 0.09 * np.cos(angle * rng.integers(7, 12)) + 0.08 * np.cos(2 * angle + rng.uniform(0, 6))
    outline = radius * wave * (np.cos(angle) + 0.6j * np.sin(angle))
    pen.fill(center + turn * outline, 0.8)
    pen.fill(center + turn * outline[:49])
    for x in np.linspace(-0.6, 0.5, 5):
        ribs = radius * np.array([x + 0.22 + 0.35j, x, x + 0.22 - 0.35j])
        pen.stroke(center + turn * ribs, pen.unit, 1.25)
    pen.stroke(center + turn * radius * np.array([-0.85, 0.85]), 1.5 * pen.unit, 1.3)


def _pole(pen: _Pen, rng: np.random.Generator) -> None:
    foot = complex(rng.uniform(0.05, 0.95) * pen.extent.real, rng.uniform(0.7, 1.1) * pen.extent.imag)
    band, width = -1j * _draw_rotation(rng, 0.4) * rng.uniform(5, 7) * pen.unit, rng.uniform(2, 3.5)
    joints = foot + band * np.arange(int(rng.integers(10, 20)))
    pen.tube(joints[[0, -1]], width)
    for start in joints[:-1:2]:
        pen.stroke(start + band * np.array([0.2, 0.8]), width, 0.45)


def _wire(pen: _Pen, rng: np.random.Generator) -> None:
    reach = np.linspace(-0.5, 0.5, 40) * rng.uniform(80, 150)
    phases, heights = rng.uniform(0, 2 * math.pi, 2), rng.uniform(5, 12, 2)
    sway = heights[0] * np.sin(reach / 19 + phases[0]) + heights[1] * np.sin(reach / 11 + phases[1])
    pen.tube(_draw_point(pen, rng, 0.25) + _draw_rotation(rng) * (reach + 1j * sway) * pen.unit, rng.uniform(1.6, 2.2))


def _fence(pen: _Pen, rng: np.random.Generator) -> None:
    columns, rows = rng.integers(4, 7), rng.integers(3, 6)
    gap, width = max(8, rng.uniform(9, 13) * pen.unit), rng.uniform(1.6, 2.4)
    center, turn = _draw_point(pen, rng, 0.2), gap * _draw_rotation(rng, 0.35)
    for y in np.arange(rows) - (rows - 1) / 2:
        pen.tube(center + turn * (1j * y + np.array([-columns, columns]) / 2), width)
    for x in np.arange(columns) - (columns - 1) / 2:
        pen.tube(center + turn * (x + 0.5j * np.array([-rows, rows])), width)


_DRAW: dict[int, Callable[[_Pen, np.random.Generator], None]] = dict(
    enumerate((_disc, _ring, _box, _star, _leaf, _pole, _wire, _fence), start=1)
)
_THIN = tuple(CLASS_NAMES.index(name) for name in ("pole", "wire", "fence"))
# At most two objects of a class, and one fence: two fences on top of each other cannot be told apart.
_POOL = sorted({*_DRAW}) + sorted({*_DRAW} - {CLASS_NAMES.index("fence")})


def _draw_classes(rng: np.random.Generator) -> list[int]:
    """Draw the class ids of three to eight objects, back to front; thin objects tend to be in front."""
    ids = rng.permutation(_POOL)[: rng.integers(3, 9)]
    depth = rng.random(len(ids)) + np.isin(ids, _THIN) / 2
    return [int(class_id) for class_id in ids[np.argsort(depth)]]


def _color(rng: np.random.Generator, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> _Color:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value))
    return 255 * red, 255 * green, 255 * blue


def _object_color(rng: np.random.Generator, class_id: int, ground: _Color) -> _Color:
    """Draw a colour near the hue of the class that differs clearly from the colour of the ground."""
    while True:
        hue = class_id / len(CLASS_NAMES) + rng.normal(0, 0.05)
        color = _color(rng, hue, saturation=(0.35, 0.9), value=(0.4, 0.95))
        if math.dist(color, ground) > 70:
            return color


def _mottle(rng: np.random.Generator, size: tuple[int, int]) -> _Floats:
    """Draw cloud-like noise around 1, float32 (H, W)."""
    large, small = (
        # The exact interpolation gives the same bytes on every processor.
        cv2.resize(rng.integers(0, 256, (cells, cells), np.uint8), size[::-1], interpolation=cv2.INTER_LINEAR_EXACT)
        for cells in (5, 14)
    )
    return np.float32(0.85) + (large.astype(np.float32) + 2 * small.astype(np.float32)) * np.float32(0.3 / 765)


def _paint_ground(rng: np.random.Generator, color: _Color, mottle: _Floats) -> _Floats:
    """Paint a mottled ground that fades from one colour to another, often with a pattern; float32 (3, H, W), 0..255."""
    height, width = mottle.shape
    grid = (np.arange(width) + 1j * np.arange(height)[:, None]) * _draw_rotation(rng)
    fade = np.asarray(0.5 * (grid.real - grid.real.min()) / np.ptp(grid.real), np.float32)
    end_color = _color(rng, rng.random(), _GROUND_SATURATION, _GROUND_VALUE)
    near, far = (np.array(end, np.float32)[:, None, None] for end in (color, end_color))
    strength = np.float32(rng.uniform(0.08, 0.2))
    return np.asarray((near + fade * (far - near)) * (mottle * (1 - strength * _pattern(rng, grid))))


def _pattern(rng: np.random.Generator, grid: _Points) -> NDArray[np.bool_]:
    """Draw the darker part of the ground: none, the joints of tiles, every second tile, or every second plank."""
    unit = min(grid.shape) / 128
    cell, kind = rng.uniform(9, 22) * unit, rng.integers(4)
    across, along = grid.real / cell, grid.imag / cell
    column, row = np.floor(across).astype(np.int32), np.floor(along).astype(np.int32)
    if kind == 0:
        return np.zeros(grid.shape, bool)
    if kind == 1:
        joint = 1.2 * unit / cell
        return np.asarray((across - column < joint) | (along - row < joint))
    return np.asarray((column ^ row if kind == 2 else column) & 1 == 1)


def _paste(pen: _Pen, image: _Floats, label: _Bytes, class_id: int, mottle: _Floats) -> None:
    """Blend a drawn object and its soft shadow into the image, and write its label, in place."""
    layer = cv2.resize(pen.canvas, label.shape[::-1], interpolation=cv2.INTER_AREA)
    *paint, coverage = cv2.split(layer)
    # A box blur with an off-centre anchor blurs and shifts at once.
    shadow = cv2.blur(coverage, (9, 9), anchor=(4 + round(3 * pen.light.real), 4 + round(3 * pen.light.imag)))
    image *= (1 - shadow * np.float32(0.5 / 255)) * (1 - coverage * np.float32(1 / 255))
    image += np.stack(paint) * mottle
    label[coverage >= 128] = class_id


def _photograph(rng: np.random.Generator, image: _Floats, light: complex) -> _Bytes:
    """Simulate a camera: light that falls off across the scene, slight blur, sensor noise; uint8 (H, W, 3)."""
    _, height, width = image.shape
    toward = np.linspace(-1, 1, width) * light.real + np.linspace(-1, 1, height)[:, None] * light.imag
    lit = np.rint(image * (1 + 0.15 * toward).astype(np.float32))
    sharp = np.clip(lit, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    blurred = cv2.GaussianBlur(np.ascontiguousarray(sharp), (3, 3), rng.uniform(0.4, 0.7))
    noise = rng.integers(-7, 8, blurred.shape, np.int8).astype(np.int16)
    return np.asarray(cv2.add(blurred, noise, dtype=cv2.CV_8U), np.uint8)
