"""Draws masks over images, class boundaries, and the difference of two masks.

All arrays are uint8, because this is fast: a lookup table colours the mask, a weighted sum blends it with the image,
and boundaries are copied on top.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bpkd_sdk.colors import overlay_colors
from bpkd_sdk.evaluation.agreement import compare_masks
from bpkd_sdk.spec import Color

# Readers with a colour vision deficiency can distinguish orange and blue, and both are visible on grey.
EDGE_COLOR: Color = (255, 150, 20)
BODY_COLOR: Color = (70, 150, 255)
_LINE_COLOR: Color = (225, 225, 225)
_LEGEND_COLOR: Color = (24, 26, 32)
_TEXT_COLOR: Color = (232, 234, 238)


def draw_overlay(
    image: np.ndarray,
    mask: np.ndarray,
    palette: Sequence[Color],
    *,
    class_names: Sequence[str] = (),
    boundaries: bool = True,
    boundary_width: int = 1,
    boundary_color: Color = (255, 255, 255),
    alpha: float = 0.5,
    ignore_index: int = 255,
    legend: bool = False,
) -> np.ndarray:
    """Blend the colours of the classes over an image: (1 - alpha) image + alpha colour, rounded.

    Colours of the palette that are dark or hard to tell from others are replaced as `bpkd_sdk.colors.overlay_colors`
    states.

    Args:
        image: Image, uint8 (H, W, 3) RGB; it is not modified.
        mask: Class ids, integers (H, W): indices into `palette`, or `ignore_index`.
        palette: RGB colour (0..255) of each class; at most 256 classes.
        class_names: Names of the classes for the legend. The legend shows the id of a class without a name.
        boundaries: Whether to draw a line between two classes.
        boundary_width: Width of the lines in pixels, at least 1.
        boundary_color: RGB colour (0..255) of the lines.
        alpha: Opacity of the class colours, 0..1. With 0, the result shows the image alone; with 1, the colours.
        ignore_index: Id of void, where the result shows the image.
        legend: Whether to append a strip below the image with the names of the classes present.

    Returns:
        uint8 (H, W, 3) RGB, a new array. With a legend the height is larger than H, and the first H rows are the
        overlay.

    Raises:
        TypeError: If the image is not uint8, or the mask is not of an integer type.
        ValueError: If a shape is wrong, `alpha` or `boundary_width` is out of range, or an id has no colour.

    Examples:
        >>> image, mask = np.full((1, 2, 3), 100, np.uint8), np.array([[0, 1]])
        >>> draw_overlay(image, mask, [(0, 0, 0), (200, 100, 0)], boundaries=False)[0].tolist()
        [[102, 102, 102], [150, 100, 50]]
    """
    _check_image(image)
    _check_mask("mask", mask, image)
    if not 0 <= alpha <= 1:
        raise ValueError(f"Expected `alpha` to be between 0 and 1, but got {alpha}.")
    ids, void = _color_ids(mask, len(palette), ignore_index)
    colors = overlay_colors(palette)
    picture = _colorize(ids, colors)
    # Blended in place, because allocating a second array of this size takes longer than the sum.
    cv2.addWeighted(image, 1 - alpha, picture, alpha, 0, picture)
    if boundaries:
        _paint(picture, label_boundaries(mask, boundary_width, ignore_index), boundary_color)
    if void is not None:
        cv2.copyTo(image, void.view(np.uint8), picture)
    if not legend:
        return picture
    present = np.flatnonzero(np.bincount((ids if void is None else ids[~void]).ravel(), minlength=1)).tolist()
    entries = {
        class_id: class_names[class_id] if class_id < len(class_names) else str(class_id) for class_id in present
    }
    return np.vstack([picture, _legend_strip(entries, colors, image.shape[1])])


def label_boundaries(mask: np.ndarray, width: int = 1, ignore_index: int = 255) -> np.ndarray:
    """Return the pixels near the border between two classes, without borders to void.

    A border is between two pixels. A line of even width has the same number of pixels on both sides of the border; a
    line of odd width has one pixel more on the left or upper side. The line never contains void pixels.

    Args:
        mask: Class ids, integers (H, W).
        width: Width of the line in pixels, at least 1.
        ignore_index: Id of void.

    Returns:
        bool (H, W), True on the line.

    Raises:
        TypeError: If the mask is not of an integer type.
        ValueError: If the mask is not of shape (H, W), or if `width` is less than 1.

    Examples:
        >>> label_boundaries(np.array([[0, 0, 1, 1]])).tolist()
        [[False, True, False, False]]
        >>> label_boundaries(np.array([[0, 0, 1, 1]]), width=2).tolist()
        [[False, True, True, False]]
    """
    _check_mask("mask", mask)
    if width < 1:
        raise ValueError(f"Expected the width of a boundary to be at least 1 pixel, but got {width}.")
    valid = mask != ignore_index
    line = np.zeros(mask.shape, bool)
    line[:, :-1] = (mask[:, 1:] != mask[:, :-1]) & valid[:, 1:] & valid[:, :-1]
    line[:-1] |= (mask[1:] != mask[:-1]) & valid[1:] & valid[:-1]
    if width == 1:
        return line
    wide = np.asarray(cv2.dilate(line.view(np.uint8), np.ones((width, width), np.uint8)))
    return np.asarray(wide.view(bool) & valid)


@dataclass(frozen=True)
class Difference:
    """Shares of pixels where two masks differ, relative to all pixels that are void in no mask.

    Attributes:
        edge_share: Share (0..1) of pixels that differ and are in the edge band.
        body_share: Share (0..1) of pixels that differ and are outside of the edge band.
    """

    edge_share: float
    body_share: float

    @property
    def share(self) -> float:
        """Share (0..1) of all pixels that differ."""
        return self.edge_share + self.body_share


def draw_difference(
    image: np.ndarray,
    teacher: np.ndarray,
    student: np.ndarray,
    *,
    label: np.ndarray | None = None,
    edge_width: int = 7,
    ignore_index: int = 255,
) -> tuple[np.ndarray, Difference]:
    """Draw the pixels where a student differs from its teacher, on a dimmed grey image.

    Pixels in the edge band are orange, others blue. The edge band is that of the label, or without a label that of the
    teacher's mask. Thin lines show the class boundaries of the teacher. Pixels that are void in any of the masks are
    not compared.

    Args:
        image: Image, uint8 (H, W, 3) RGB; it is not modified.
        teacher: Class ids of the teacher, integers (H, W).
        student: Class ids of the student, integers (H, W).
        label: Ground-truth class ids, integers (H, W), or None.
        edge_width: Side in pixels of the square around each pixel, an odd number. A pixel is in the edge band if its
            square contains two classes.
        ignore_index: Id of void.

    Returns:
        The picture, uint8 (H, W, 3) RGB, a new array; and the shares of pixels that differ.

    Raises:
        TypeError: If the image is not uint8, or a mask is not of an integer type.
        ValueError: If the shapes differ, or `edge_width` is not odd.
    """
    _check_image(image)
    masks = {"teacher": teacher, "student": student, "label": teacher if label is None else label}
    for name, mask in masks.items():
        _check_mask(name, mask, image)
    reference, compared, boundaries = (mask[None] for mask in masks.values())
    same, edge, body = (
        flags[0]
        for flags in compare_masks(
            compared, reference, boundaries=boundaries, edge_width=edge_width, ignore_index=ignore_index
        )
    )
    in_edge, in_body = ~same & edge, ~same & body
    dim = cv2.convertScaleAbs(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), alpha=0.45, beta=20)
    picture = np.asarray(cv2.cvtColor(dim, cv2.COLOR_GRAY2RGB))
    _paint(picture, label_boundaries(teacher, ignore_index=ignore_index), _LINE_COLOR)
    _paint(picture, in_edge, EDGE_COLOR)
    _paint(picture, in_body, BODY_COLOR)
    total = max(1, int(np.count_nonzero(edge | body)))
    return picture, Difference(int(np.count_nonzero(in_edge)) / total, int(np.count_nonzero(in_body)) / total)


def picture_png(picture: np.ndarray) -> bytes:
    """Encode a picture, uint8 (H, W, 3) RGB, as a PNG file, with low compression for speed."""
    _, content = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return content.tobytes()


def encode_png(image: Image.Image) -> bytes:
    """Encode a PIL image as a PNG file, with low compression for speed; masks are small at every level."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _check_array(name: str, array: object) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"Expected `{name}` to be a numpy array, but got {type(array).__name__}. Convert a PIL image with "
            "np.asarray(image.convert('RGB')), and a tensor with tensor.cpu().numpy()."
        )


def _check_image(image: np.ndarray) -> None:
    _check_array("image", image)
    if image.dtype != np.uint8:
        raise TypeError(f"Expected `image` to be uint8 in 0..255, but got {image.dtype}.")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"Expected `image` of shape (H, W, 3), but got {image.shape}.")


def _check_mask(name: str, mask: np.ndarray, image: np.ndarray | None = None) -> None:
    _check_array(name, mask)
    if not np.issubdtype(mask.dtype, np.integer):
        raise TypeError(f"Expected `{name}` to contain integer class ids, but got {mask.dtype}.")
    if mask.ndim != 2:
        raise ValueError(f"Expected `{name}` of shape (H, W), but got {mask.shape}.")
    if image is not None and mask.shape != image.shape[:2]:
        raise ValueError(
            f"Expected `{name}` to have the size of the image, {image.shape[:2]}, but got {mask.shape}. "
            f"Resize it with cv2.INTER_NEAREST_EXACT, which adds no new ids and keeps pixel centres aligned."
        )


def _color_ids(mask: np.ndarray, num_colors: int, ignore_index: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert ids to uint8 for the lookup table.

    Args:
        mask: Class ids, integers (H, W).
        num_colors: Number of colours in the palette.
        ignore_index: Id of void.

    Returns:
        Ids, uint8 (H, W), 0 for void; and the void pixels, bool (H, W), or None if the mask contains no void.

    Raises:
        ValueError: If an id has no colour.
    """
    if num_colors > 256:
        raise ValueError(f"Expected `palette` to contain at most 256 colours, but got {num_colors}.")
    if not 0 <= ignore_index < num_colors and _within(mask, num_colors):
        return mask.astype(np.uint8, copy=False), None
    void = mask == ignore_index
    ids = np.where(void, 0, mask)
    if not _within(ids, num_colors):
        invalid = [class_id for class_id in np.unique(ids).tolist() if not 0 <= class_id < num_colors]
        raise ValueError(
            f"The mask contains the ids {invalid[:10]}, but `palette` has {num_colors} colours, for ids from 0. "
            f"Add their colours, or pass the id of void as `ignore_index`."
        )
    return ids.astype(np.uint8, copy=False), void


def _within(ids: np.ndarray, num_colors: int) -> bool:
    return ids.size == 0 or bool(ids.max() < num_colors and (ids.dtype.kind == "u" or ids.min() >= 0))


def _colorize(ids: np.ndarray, palette: Sequence[Color]) -> np.ndarray:
    """Return the colour of each id: uint8 (H, W) -> uint8 (H, W, 3)."""
    table = np.zeros((256, 1, 3), np.uint8)
    table[: len(palette), 0] = palette
    return np.asarray(cv2.applyColorMap(ids, table))


def _paint(picture: np.ndarray, region: np.ndarray, color: Color) -> None:
    """Set the pixels of `region`, bool (H, W), to one colour, in place."""
    # A filled rectangle and a masked copy take a tenth of the time of picture[region] = color.
    filled = np.empty_like(picture)
    cv2.rectangle(filled, (0, 0), picture.shape[1::-1], color, cv2.FILLED)
    cv2.copyTo(filled, region.view(np.uint8), picture)


def _legend_strip(entries: Mapping[int, str], palette: Sequence[Color], width: int) -> np.ndarray:
    """Draw a swatch and a name for each class, in as many rows as necessary: uint8 (h, width, 3)."""
    size = min(24, max(12, width // 60))
    font = ImageFont.load_default(size)
    row_height, gap = round(1.6 * size), size // 2
    positions, x, y = [], gap, gap
    for class_id, name in entries.items():
        step = size + gap + round(font.getlength(name)) + 2 * gap
        if x > gap and x + step - gap > width:
            x, y = gap, y + row_height
        positions.append((class_id, name, x, y))
        x += step
    strip = Image.new("RGB", (width, y + size + gap), _LEGEND_COLOR)
    draw = ImageDraw.Draw(strip)
    for class_id, name, left, top in positions:
        draw.rounded_rectangle((left, top, left + size, top + size), size // 5, fill=tuple(palette[class_id]))
        draw.text((left + size + gap, top + size // 2), name, fill=_TEXT_COLOR, font=font, anchor="lm")
    return np.asarray(strip)
