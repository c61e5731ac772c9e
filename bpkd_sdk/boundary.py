"""Trimaps and boundaries of label maps. `edge_masks` makes the soft trimap that BPKD and the metrics use.

The set of classes in a window is stored as a bit set, so that dilation minus erosion of all classes takes a dozen
integer passes over the label map. The average over the logits' grid is bit-sliced addition, so that no array with an
axis of classes exists before the small grid is reached. The result is exact.

All functions take torch tensors or numpy arrays, and return the kind that they get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any, Literal, get_args

import numpy as np
from array_api_compat import device

from bpkd_sdk.arrays import Array, array_namespace
from bpkd_sdk.errors import check_choice

Void = Literal["clear", "keep", "guard"]

_BYTES = 256  # number of values of a byte
_WORD_BITS = 32  # int32 needs half the memory traffic of int64, and 19 or 21 classes fit into one word


def edge_masks(
    labels: Array,
    num_classes: int,
    output_size: tuple[int, int],
    width: int = 7,
    ignore_index: int = 255,
    *,
    void: Void = "clear",
) -> Array:
    """Compute the soft trimap of each class at the resolution of the logits (BPKD, Liu et al., WACV 2024, section 3).

    The edge of class c is its dilation minus its erosion by a square of side `width`: the pixels whose window contains
    class c and another class. The mask is the mean of this binary map over the pixels of a logit cell. Edges of
    different classes overlap; the mask is not renormalised.

    A void pixel (`ignore_index`) belongs to no class, but counts as another class for its neighbours. Pixels outside
    the image do not count, so that the border of the image is not an edge.

    Args:
        labels: (N, H, W) integers in [0, num_classes) or `ignore_index`.
        num_classes: C, 1 to 256.
        output_size: (h, w) of the logits. If it does not divide (H, W), cell i covers the rows
            floor(i H / h) to ceil((i + 1) H / h) - 1, as in adaptive average pooling.
        width: Side of the window in pixels, odd; 7 in the paper.
        ignore_index: Label of void pixels, outside [0, num_classes).
        void: Treatment of edges near void. "clear": void pixels have no edge. "keep": the transition from a class
            to void is an edge on both sides. "guard": pixels whose window touches void have no edge.

    Returns:
        (N, C, h, w) float32 in [0, 1].

    Raises:
        TypeError: If `labels` is not an integer array.
        ValueError: If a shape, width, number of classes or label is out of range. Labels are checked on the CPU only:
            on an accelerator the check would stall the stream, and the assertion of cross_entropy reports them there.

    Examples:
        >>> import numpy as np
        >>> labels = np.array([[[0, 0, 0, 1]]])
        >>> edge_masks(labels, num_classes=2, output_size=(1, 2), width=3).tolist()
        [[[[0.0, 1.0]], [[0.0, 1.0]]]]
    """
    check_labels(labels, num_classes, ignore_index)
    check_choice("void", void, get_args(Void))
    if min(output_size) < 1:
        raise ValueError(f"Expected `output_size` to be two positive numbers, but got {tuple(output_size)}.")
    xp = array_namespace(labels)
    is_void = labels == ignore_index
    narrow = xp.astype(labels, xp.uint8 if num_classes < _BYTES else xp.int16)
    narrow[is_void] = num_classes
    allowed = contains_transition(narrow, width)
    if void == "clear":
        allowed &= ~is_void
    elif void == "guard":
        allowed &= ~over_window(is_void, width, xp.logical_or)
    bits = -xp.astype(allowed, xp.int32)  # all bits are set where an edge is allowed
    words = [over_window(word, width, xp.bitwise_or) & bits for word in class_sets(narrow, num_classes, num_classes)]
    masks: Array = _mean_over_cells(words, num_classes, output_size)
    return masks


def edge_band(labels: Array, width: int = 7, ignore_index: int = 255) -> Array:
    """Find the pixels near any boundary: the window around them contains more than one label.

    Void counts as a separate label in the window. Void pixels themselves are never in the band.

    Args:
        labels: (N, H, W) integers.
        width: Side of the window in pixels, odd.
        ignore_index: Label of void pixels.

    Returns:
        (N, H, W) bool.

    Examples:
        >>> import numpy as np
        >>> edge_band(np.array([[[0, 0, 0, 1]]]), width=3).tolist()
        [[[False, False, True, True]]]
    """
    band: Array = contains_transition(labels, width) & (labels != ignore_index)
    return band


def inner_boundary(labels: Array, distance: int) -> Array:
    """Compute each label's mask minus its erosion (Cheng et al., Boundary IoU, CVPR 2021), for all labels at once.

    A pixel is on the inner boundary of its mask if a pixel of another label, or the outside of the image, is within
    `distance` (a square of side 2 distance + 1). A mask therefore ends at the border of the image, as in the authors'
    code.

    Args:
        labels: (N, H, W) integers; void is treated as every other label.
        distance: Distance in pixels, at least 1.

    Returns:
        (N, H, W) bool.

    Examples:
        >>> import numpy as np
        >>> inner_boundary(np.zeros((1, 3, 3), np.uint8), distance=1).astype(int).tolist()
        [[[1, 1, 1], [1, 0, 1], [1, 1, 1]]]
    """
    inner = contains_transition(labels, 2 * distance + 1)
    height, width = labels.shape[1:]
    inner[:, :distance] = True
    inner[:, max(height - distance, 0) :] = True
    inner[:, :, :distance] = True
    inner[:, :, max(width - distance, 0) :] = True
    return inner


def class_contours(labels: Array, ignore_index: int = 255) -> Array:
    """Keep the labels of pixels that touch another class (8 neighbours), and set all other pixels to void.

    Void and the border of the image do not make a contour.

    Args:
        labels: (N, H, W) integers.
        ignore_index: Label of void pixels, in the range of the labels' dtype.

    Returns:
        (N, H, W) of the labels' dtype.

    Examples:
        >>> import numpy as np
        >>> class_contours(np.array([[[0, 0, 0, 1]]])).tolist()
        [[[255, 255, 0, 1]]]
    """
    xp = array_namespace(labels)
    is_void = labels == ignore_index
    limits = xp.iinfo(labels.dtype)
    highest, lowest = (
        over_window(_filled(labels, is_void, limit), 3, combine)
        for limit, combine in ((limits.min, xp.maximum), (limits.max, xp.minimum))
    )
    return _filled(labels, is_void | (highest == lowest), ignore_index)


def _filled(values: Array, flags: Array, value: int) -> Array:
    """Return a copy of values in which those with a flag are replaced; faster than `where`."""
    copied: Array = array_namespace(values).asarray(values, copy=True)
    copied[flags] = value
    return copied


def has_same_class_within(
    labels: Array, others: Array, distance: int, num_classes: int, ignore_index: int
) -> tuple[Array, Array]:
    """Find the pixels of each of two label maps that have a pixel of the same class nearby in the other one.

    Args:
        labels: (N, H, W) integers.
        others: (N, H, W) integers.
        distance: Half the side of the search window, in pixels; its side is 2 distance + 1.
        num_classes: C, 1 to 256.
        ignore_index: Label of void pixels.

    Returns:
        Flags of `labels` and of `others`, (N, H, W) bool; False for void pixels.
    """
    xp = array_namespace(labels)
    words, other_words = (class_sets(masks, num_classes, ignore_index) for masks in (labels, others))

    def found(own: list[Array], other: list[Array]) -> Array:
        near = (over_window(word, 2 * distance + 1, xp.bitwise_or) for word in other)
        flags: Array = reduce(xp.bitwise_or, [(a & b) != 0 for a, b in zip(own, near, strict=True)])
        return flags

    return found(words, other_words), found(other_words, words)


def contains_transition(labels: Array, width: int) -> Array:
    """Find the pixels whose window contains two different values: (N, H, W) integers to (N, H, W) bool."""
    xp = array_namespace(labels)
    found: Array = over_window(labels, width, xp.maximum) != over_window(labels, width, xp.minimum)
    return found


def class_sets(labels: Array, num_classes: int, ignore_index: int) -> list[Array]:
    """Convert a label map to bit sets: in word k, bit b is set where the label is 32 k + b.

    Args:
        labels: (N, H, W) integers in [0, num_classes) or `ignore_index`.
        num_classes: C, 1 to 256.
        ignore_index: Label of void pixels, whose sets are empty.

    Returns:
        ceil(C / 32) arrays (N, H, W) int32.
    """
    xp = array_namespace(labels)
    labels = xp.astype(labels, xp.int32)
    is_class = labels != ignore_index
    if num_classes <= _WORD_BITS:
        return [xp.astype(is_class, xp.int32) << labels]
    word_index, bit = labels // _WORD_BITS, labels & (_WORD_BITS - 1)
    words = range(-(-num_classes // _WORD_BITS))
    return [xp.astype(is_class & (word_index == word), xp.int32) << bit for word in words]


def over_window(x: Array, width: int, combine: Callable[[Array, Array], Array]) -> Array:
    """Combine all values in the window around each pixel; the window is clipped at the border of the image.

    The window is made by doubling with overlap, which takes log2(width) passes per axis instead of width. `combine`
    must therefore be idempotent (maximum, minimum, or).

    Args:
        x: (N, H, W) of any dtype.
        width: Side of the window in pixels, odd, at least 1.
        combine: Associative, commutative and idempotent function of two arrays.

    Returns:
        (N, H, W), in the dtype of `x`.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"Expected `width` to be an odd number of pixels, at least 1, but got {width}.")
    for axis in (-1, -2):
        x = _over_line(x, width, axis, combine)
    return x


def _over_line(x: Array, width: int, axis: int, combine: Callable[[Array, Array], Array]) -> Array:
    length, radius = x.shape[axis], width // 2
    # Repeating the border pixel equals clipping the window, because the window already contains that pixel.
    xp = array_namespace(x)
    border = (*x.shape[:axis], radius, *x.shape[x.ndim + axis + 1 :])
    first, last = (xp.broadcast_to(_slice(x, axis, start, 1), border) for start in (0, length - 1))
    x, reach = xp.concat([first, x, last], axis=x.ndim + axis), 1
    while reach < width:
        step = min(reach, width - reach)
        size = x.shape[axis] - step
        x, reach = combine(_slice(x, axis, 0, size), _slice(x, axis, step, size)), reach + step
    return x


def _slice(x: Array, axis: int, start: int, size: int) -> Array:
    """Return `size` positions of an array (N, H, W) along one of its last two axes, without a copy."""
    part = slice(start, start + size)
    view: Array = x[..., part] if axis == -1 else x[..., part, :]
    return view


def _mean_over_cells(words: list[Any], num_classes: int, output_size: tuple[int, int]) -> Any:
    """Compute, from bit sets (N, H, W), the share of each cell's pixels that have each class, (N, C, h, w) float32."""
    xp, place = array_namespace(words[0]), device(words[0])
    (rows, heights), (columns, widths) = (
        _cells(length, cells, xp, place) for length, cells in zip(words[0].shape[-2:], output_size, strict=True)
    )
    masks = []
    for k, word in enumerate(words):
        counts = _sum_within_cells(_sum_within_cells([word], 1, rows), 2, columns)
        masks.append(_unpack(counts, min(_WORD_BITS, num_classes - _WORD_BITS * k)))
    areas = xp.reshape(heights, (-1, 1)) * xp.reshape(widths, (1, -1))
    return xp.astype(xp.concat(masks, axis=1), xp.float32) / xp.astype(areas, xp.float32)


@lru_cache(maxsize=64)
def _cells(length: int, cells: int, xp: Any, place: Any) -> tuple[Any, Any]:
    """Compute the positions of a line that each cell averages.

    Args:
        length: Number of positions of the line.
        cells: Number of cells.
        xp: Namespace of the result's kind of array.
        place: Device of the result.

    Returns:
        Positions (k, cells), where k is a power of two and a cell of fewer positions is padded with `length`, which is
        one past the end; and the number of positions of each cell, (cells,).
    """
    cell = np.arange(cells)
    first = cell * length // cells
    count = -((cell + 1) * -length // cells) - first
    step = np.arange(1 << (int(count.max()) - 1).bit_length())[:, None]
    positions = np.where(step < count, first + step, length)
    return xp.asarray(positions, device=place), xp.asarray(count, device=place)


def _sum_within_cells(planes: list[Any], axis: int, positions: Any) -> list[Any]:
    """Sum, for each class, the numbers at all positions of a cell along one axis of (N, H, W).

    Numbers are bit-sliced: bit c of plane k is bit k of the number of class c.
    """
    xp = array_namespace(positions)
    flat = xp.reshape(positions, (-1,))
    before, after = planes[0].shape[:axis], planes[0].shape[axis + 1 :]
    end = xp.zeros((*before, 1, *after), dtype=planes[0].dtype, device=device(positions))
    shape = (*before, *positions.shape, *after)
    planes = [xp.reshape(xp.take(xp.concat([plane, end], axis=axis), flat, axis=axis), shape) for plane in planes]
    while (count := planes[0].shape[axis]) > 1:
        first, second = (
            [plane[:, part] if axis == 1 else plane[:, :, part] for plane in planes]
            for part in (slice(count // 2), slice(count // 2, None))
        )
        planes = _add(first, second)
    return [xp.squeeze(plane, axis=axis) for plane in planes]


def _add(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """Add two bit-sliced numbers by a ripple-carry adder of bitwise operations, for all classes of a word at once."""
    total, carry = [a[0] ^ b[0]], a[0] & b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        half = x ^ y
        total.append(half ^ carry)
        carry = (x & y) | (half & carry)
    return [*total, carry]


def _unpack(planes: list[Any], num_classes: int) -> Any:
    """Convert bit-sliced numbers (N, h, w) to (N, num_classes, h, w) int32."""
    xp, place = array_namespace(planes[0]), device(planes[0])
    bit = xp.reshape(xp.arange(num_classes, device=place, dtype=xp.int32), (1, -1, 1, 1))
    count = xp.zeros((), device=place, dtype=xp.int32)
    for k, plane in enumerate(planes):
        count = count + ((plane[:, None] >> bit & 1) << k)
    return count


def check_labels(labels: Array, num_classes: int, ignore_index: int, *, wait: bool = False) -> None:
    """Raise TypeError or ValueError unless `labels` are (N, H, W) integers in [0, num_classes) or `ignore_index`.

    Args:
        labels: Labels to check.
        num_classes: Number of classes.
        ignore_index: Label of void pixels.
        wait: Whether values are checked on an accelerator too, which waits for it; on the CPU they always are.
    """
    xp = array_namespace(labels)
    if not xp.isdtype(labels.dtype, "integral"):
        raise TypeError(f"Expected integer labels, but got {labels.dtype}.")
    if labels.ndim != 3:
        raise ValueError(f"Expected labels of shape (N, H, W), but got {tuple(labels.shape)}.")
    if not 1 <= num_classes <= 256:
        raise ValueError(f"Expected `num_classes` to be 1 to 256, but got {num_classes}.")
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"Expected `ignore_index` to be outside the {num_classes} classes, but got {ignore_index}. Pass another "
            "label, such as -1."
        )
    if wait or str(device(labels)) == "cpu":
        invalid = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
        if invalid.any():
            raise ValueError(
                f"Expected labels in [0, {num_classes}) or ignore_index={ignore_index}, but got "
                f"{sorted(set(labels[invalid].tolist()))[:10]}. Map them to classes, or to ignore_index."
            )
