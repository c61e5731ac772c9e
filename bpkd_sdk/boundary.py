"""Trimaps and boundaries of label maps. `edge_masks` makes the soft trimap that BPKD and the metrics use.

The set of classes in a window is stored as a bit set, so that dilation minus erosion of all classes takes a dozen
integer passes over the label map. The average over the logits' grid is bit-sliced addition, so that no array with an
axis of classes exists before the small grid is reached. The result is exact. The passes are integer arithmetic only,
because a comparison takes four times as long on a CPU. On a CPU, the map is processed in pieces that fit into the
cache, with bits for the classes of a piece only. On a GPU no pass depends on the values of labels, so that nothing
waits for the device.

All functions take torch tensors or numpy arrays, and return the kind that they get.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, reduce
from typing import Any, Literal, get_args

import numpy as np
from array_api_compat import device

from bpkd_sdk.arrays import Array, array_namespace, contiguous, distinct_values, take, to_numpy
from bpkd_sdk.errors import check_choice

Void = Literal["clear", "keep", "guard"]

_WORD_BITS = 32  # int32 needs half the memory traffic of int64, and 19 or 21 classes fit into one word
_CLASS_BITS = 30  # number of classes in a word of the trimap
_OTHER_BIT, _VOID_BIT = 30, 31  # bits of the classes of other words, and of void, which is the sign
_OUTSIDE = 257  # code of pixels outside the image, above that of 256 classes and of void
_PART_PIXELS = 1 << 18  # label pixels in a part of the trimap on a CPU
_TILE_COLUMNS = 64  # approximate width of a tile in label pixels; a tile contains few of many classes


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
    _check_width(width)
    if min(output_size) < 1:
        raise ValueError(f"Expected `output_size` to be two positive numbers, but got {tuple(output_size)}.")
    xp, place, radius = array_namespace(labels), device(labels), width // 2
    count, height, columns = labels.shape
    codes = xp.full((count, height + 2 * radius, columns + 2 * radius), _OUTSIDE, dtype=xp.int32, device=place)
    inside = codes[:, radius : radius + height, radius : radius + columns]
    inside[...] = labels
    if not num_classes <= ignore_index < _OUTSIDE:  # the code of void is a position in a table
        inside[labels == ignore_index] = ignore_index = num_classes
    if str(place) != "cpu":
        tables = _class_tables(num_classes, ignore_index, xp, place)
        whole: Array = _masks_of_tiles(codes, tables, num_classes, output_size, width, void)
        return whole
    masks: Array = xp.zeros((count, num_classes, *output_size), dtype=xp.float32)
    pixels = _PART_PIXELS if num_classes <= _CLASS_BITS else _PART_PIXELS // 2  # tiles have more arrays
    for images, rows in _parts((count, height, columns), output_size[0], pixels):
        top, bottom = (row * height // output_size[0] for row in (rows.start, rows.stop))
        _fill_masks(
            masks[images, :, rows], codes[images, top : bottom + 2 * radius], num_classes, width, ignore_index, void
        )
    return masks


def _parts(shape: tuple[int, int, int], rows: int, pixels: int) -> Iterator[tuple[slice, slice]]:
    """Divide (N, H, W) labels into parts of about so many pixels: some images, or some rows of cells of one image.

    Yields:
        Images, and those of the `rows` rows of cells. Rows are divided only if all cells have the same height.
    """
    images = max(1, pixels // math.prod(shape[1:]))
    step = max(1, rows * pixels // math.prod(shape[1:])) if shape[1] % rows == 0 else rows
    for image in range(0, shape[0], images):
        for row in range(0, rows, step):
            yield slice(image, image + images), slice(row, min(row + step, rows))


def _fill_masks(masks: Any, codes: Any, num_classes: int, width: int, ignore_index: int, void: Void) -> None:
    """Write the masks of a part, whose arrays stay in a CPU's cache. Many classes are divided into those of tiles.

    Args:
        masks: (N, num_classes, h, w) zeros, which are replaced.
        codes: (N, H + width - 1, W + width - 1) labels and their surroundings.
        num_classes: C, 1 to 256.
        width: Side of the window in pixels, odd.
        ignore_index: Code of void pixels.
        void: Treatment of edges near void.
    """
    xp, place = array_namespace(codes), device(codes)
    height, cells = masks.shape[2:]
    if num_classes <= _CLASS_BITS:
        tables = _class_tables(num_classes, ignore_index, xp, place)
        masks[...] = _masks_of_tiles(codes, tables, num_classes, (height, cells), width, void)
        return
    columns = codes.shape[2] - width + 1
    least = min(cells, max(1, cells * _TILE_COLUMNS // columns))
    size = min(d for d in range(least, cells + 1) if cells % d == 0) if columns % cells == 0 else cells
    tiles = cells // size
    first = np.arange(tiles)[:, None] * (columns // tiles)
    positions = (first + np.arange(columns // tiles + width - 1)).ravel()
    codes = xp.reshape(take(codes, xp.asarray(positions), 2), (*codes.shape[:2], tiles, -1))
    codes = xp.reshape(contiguous(xp.moveaxis(codes, 2, 1)), (-1, codes.shape[1], codes.shape[3]))
    codes = codes + xp.reshape(xp.arange(len(codes), dtype=xp.int32) * (_OUTSIDE + 1), (-1, 1, 1))
    occurrences = xp.bincount(xp.reshape(codes, (-1,)), minlength=len(codes) * (_OUTSIDE + 1))
    present = to_numpy(occurrences).reshape(len(codes), _OUTSIDE + 1)[:, :num_classes] > 0
    tables = [xp.asarray(table) for table in _bit_tables(present, ignore_index)]
    own = _masks_of_tiles(codes, tables, int(present.sum(1).max()), (height, size), width, void)
    for tile, classes in enumerate(map(np.flatnonzero, present)):
        image, column = divmod(tile, tiles)
        masks[image, :, :, column * size : (column + 1) * size][xp.asarray(classes)] = own[tile, : len(classes)]


def _masks_of_tiles(
    codes: Any, tables: Sequence[Any], num_classes: int, output_size: tuple[int, int], width: int, void: Void
) -> Any:
    """Compute the masks of tiles.

    Args:
        codes: (N, H + width - 1, W + width - 1) integers: the pixels of tiles and their surroundings.
        tables: For each word of bit sets, the set of each code.
        num_classes: P, the number of classes in the tables.
        output_size: (h, w) of the masks.
        width: Side of the window in pixels, odd.
        void: Treatment of edges near void.

    Returns:
        (N, P, h, w) float32 in [0, 1].
    """
    xp, radius = array_namespace(codes), width // 2
    index = xp.reshape(codes, (-1,))
    sets = xp.stack([xp.reshape(take(table, index, 0), codes.shape) for table in tables], axis=1)
    own = sets[:, :, radius : codes.shape[1] - radius, radius : codes.shape[2] - radius]
    for axis in (-2, -1):
        sets = _over_line(sets, width, axis, xp.bitwise_or)
    others = sets ^ own
    if void == "clear":
        others &= ~(own >> _VOID_BIT)
    elif void == "guard":
        others &= ~(sets >> _VOID_BIT)
    # All bits where there is another label in the window: the shift copies the sign, which x | -x has unless x is 0.
    return _mean_over_cells(sets & ((others | -others) >> _VOID_BIT), num_classes, output_size)


@lru_cache(maxsize=64)
def _class_tables(num_classes: int, ignore_index: int, xp: Any, place: Any) -> list[Any]:
    """Return the tables of one tile that has all classes, which are kept because each copy would wait for a GPU."""
    return [xp.asarray(table, device=place) for table in _bit_tables(np.ones((1, num_classes), bool), ignore_index)]


def _bit_tables(present: np.ndarray, ignore_index: int) -> np.ndarray:
    """Compute the bit sets of all codes of tiles. A class is numbered among those of its tile.

    Args:
        present: Whether each tile has each class, (T, C) bool.
        ignore_index: Code of void pixels.

    Returns:
        (words, T * (_OUTSIDE + 1)) int32: code x of tile t is at t * (_OUTSIDE + 1) + x.
    """
    rank = np.cumsum(present, 1) - 1
    words = int(rank.max(initial=0)) // _CLASS_BITS + 1
    tables = np.full((words, len(present), _OUTSIDE + 1), 1 << _OTHER_BIT, np.int32)
    tile, label = np.nonzero(present)
    rank = rank[tile, label]
    tables[rank // _CLASS_BITS, tile, label] = 1 << rank % _CLASS_BITS
    tables[:, :, ignore_index] = np.iinfo(np.int32).min
    tables[:, :, _OUTSIDE] = 0  # the empty set does not change a union
    return tables.reshape(words, -1)


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
    _check_width(width)
    xp, radius = array_namespace(x), width // 2
    axis: int
    for axis in (-1, -2):
        # Repeating the border pixel equals clipping the window, because the window already contains that pixel.
        border = (*x.shape[:axis], radius, *x.shape[x.ndim + axis + 1 :])
        first, last = (xp.broadcast_to(_slice(x, axis, start, 1), border) for start in (0, x.shape[axis] - 1))
        x = _over_line(xp.concat([first, x, last], axis=x.ndim + axis), width, axis, combine)
    return x


def _check_width(width: int) -> None:
    if width < 1 or width % 2 == 0:
        raise ValueError(f"Expected `width` to be an odd number of pixels, at least 1, but got {width}.")


def _over_line(x: Any, width: int, axis: int, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine the values at each position and the `width` - 1 following ones of an axis, which becomes shorter."""
    reach = 1
    while reach < width:
        step = min(reach, width - reach)
        size = x.shape[axis] - step
        x, reach = combine(_slice(x, axis, 0, size), _slice(x, axis, step, size)), reach + step
    return x


def _slice(x: Any, axis: int, start: int, size: int) -> Any:
    """Return `size` positions of an array along one of its last two axes, without a copy."""
    part = slice(start, start + size)
    return x[..., part] if axis == -1 else x[..., part, :]


def _mean_over_cells(sets: Any, num_classes: int, output_size: tuple[int, int]) -> Any:
    """Compute, from bit sets (N, words, H, W), the share of each cell's pixels that have each class.

    Returns:
        (N, num_classes, h, w) float32.
    """
    xp, place = array_namespace(sets), device(sets)
    planes, counts = [sets], []
    for axis, cells in zip((-2, -1), output_size, strict=True):
        positions, count = _cells(sets.shape[axis], cells, xp, place)
        planes = _sum_within_cells(planes, axis, positions)
        counts.append(count)
    areas = xp.reshape(counts[0], (-1, 1)) * xp.reshape(counts[1], (1, -1))
    return xp.astype(_unpack(planes, num_classes), xp.float32) / xp.astype(areas, xp.float32)


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
    """Sum, for each class, the numbers at all positions of a cell along one of the last two axes of (N, words, H, W).

    Numbers are bit-sliced: bit c of plane k is bit k of the number of class c.
    """
    planes = [_divide(plane, axis, positions) for plane in planes]
    while (count := planes[0].shape[2]) > 1:
        first, second = (
            [plane[:, :, part] for plane in planes] for part in (slice(count // 2), slice(count // 2, None))
        )
        planes = _add(first, second)
    return [plane[:, :, 0] for plane in planes]


def _divide(plane: Any, axis: int, positions: Any) -> Any:
    """Divide one of the last two axes of (N, words, H, W) into cells of k positions.

    Returns:
        (N, words, k, h, W) for axis -2, (N, words, k, H, w) for axis -1.
    """
    xp = array_namespace(plane)
    before, after = plane.shape[:axis], plane.shape[axis:][1:]
    size, cells = positions.shape
    if size * cells == plane.shape[axis]:  # all cells have the same number of positions
        divided = xp.moveaxis(xp.reshape(plane, (*before, cells, size, *after)), axis, 2)
        return divided if axis == -2 else contiguous(divided)
    end = xp.zeros((*before, 1, *after), dtype=plane.dtype, device=device(plane))
    padded = take(xp.concat([plane, end], axis=axis), xp.reshape(positions, (-1,)), plane.ndim + axis)
    return xp.moveaxis(xp.reshape(padded, (*before, size, cells, *after)), axis - 1, 2)


def _add(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """Add two bit-sliced numbers by a ripple-carry adder of bitwise operations, for all classes of a word at once."""
    total, carry = [a[0] ^ b[0]], a[0] & b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        half = x ^ y
        total.append(half ^ carry)
        carry = (x & y) | (half & carry)
    return [*total, carry]


def _unpack(planes: list[Any], num_classes: int) -> Any:
    """Convert bit-sliced numbers (N, words, h, w) to (N, num_classes, h, w) int32."""
    xp, place = array_namespace(planes[0]), device(planes[0])
    count, words, *size = planes[0].shape
    bit = xp.arange(min(_CLASS_BITS, num_classes), device=place, dtype=xp.int32)
    bit = xp.reshape(bit, (1, 1, -1, 1, 1))
    numbers = xp.zeros((), device=place, dtype=xp.int32)
    for plane in reversed(planes):
        numbers = numbers * 2 + (plane[:, :, None] >> bit & 1)
    return xp.reshape(numbers, (count, words * bit.shape[2], *size))[:, :num_classes]


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
        invalid = [x for x in distinct_values(labels) if x != ignore_index and not 0 <= x < num_classes]
        if invalid:
            raise ValueError(
                f"Expected labels in [0, {num_classes}) or ignore_index={ignore_index}, but got "
                f"{invalid[:10]}. Map them to classes, or to ignore_index."
            )
