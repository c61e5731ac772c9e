"""Trimaps and boundaries of label maps. `edge_masks` makes the soft trimap that BPKD and the metrics use.

The set of classes in a window is stored as a bit set, so that dilation minus erosion of all classes takes a dozen
integer passes over the label map. The average over the logits' grid is bit-sliced addition, so that no tensor with an
axis of classes exists before the small grid is reached. The result is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.errors import check_choice

Void = Literal["clear", "keep", "guard"]

_WORD_BITS = 32  # int32 needs half the memory traffic of int64, and 19 or 21 classes fit into one word


def edge_masks(
    labels: Tensor,
    num_classes: int,
    output_size: tuple[int, int],
    width: int = 7,
    ignore_index: int = 255,
    *,
    void: Void = "clear",
) -> Tensor:
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
        TypeError: If `labels` is not an integer tensor.
        ValueError: If a shape, width, number of classes or label is out of range. Labels are checked on the CPU only:
            on an accelerator the check would stall the stream, and the assertion of cross_entropy reports them there.

    Example:
        >>> labels = torch.tensor([[[0, 0, 0, 1]]])
        >>> edge_masks(labels, num_classes=2, output_size=(1, 2), width=3).tolist()
        [[[[0.0, 1.0]], [[0.0, 1.0]]]]
    """
    check_labels(labels, num_classes, ignore_index)
    check_choice("void", void, get_args(Void))
    if min(output_size) < 1:
        raise ValueError(f"Expected `output_size` to be two positive numbers, but got {tuple(output_size)}.")
    is_void = labels == ignore_index
    allowed = contains_transition(labels.to(torch.int16).masked_fill(is_void, -1), width)
    if void == "clear":
        allowed &= ~is_void
    elif void == "guard":
        allowed &= ~over_window(is_void, width, torch.logical_or)
    words = [
        torch.where(allowed, over_window(word, width, torch.bitwise_or), 0)
        for word in class_sets(labels, num_classes, ignore_index)
    ]
    return _mean_over_cells(words, num_classes, output_size)


def edge_band(labels: Tensor, width: int = 7, ignore_index: int = 255) -> Tensor:
    """Find the pixels near any boundary: the window around them contains more than one label.

    Void counts as a separate label in the window. Void pixels themselves are never in the band.

    Args:
        labels: (N, H, W) integers.
        width: Side of the window in pixels, odd.
        ignore_index: Label of void pixels.

    Returns:
        (N, H, W) bool.

    Example:
        >>> edge_band(torch.tensor([[[0, 0, 0, 1]]]), width=3).tolist()
        [[[False, False, True, True]]]
    """
    return contains_transition(labels, width) & (labels != ignore_index)


def inner_boundary(labels: Tensor, distance: int) -> Tensor:
    """Compute each label's mask minus its erosion (Cheng et al., Boundary IoU, CVPR 2021), for all labels at once.

    A pixel is on the inner boundary of its mask if a pixel of another label, or the outside of the image, is within
    `distance` (a square of side 2 distance + 1). A mask therefore ends at the border of the image, as in the authors'
    code.

    Args:
        labels: (N, H, W) integers; void is treated as every other label.
        distance: Distance in pixels, at least 1.

    Returns:
        (N, H, W) bool.

    Example:
        >>> inner_boundary(torch.zeros(1, 3, 3, dtype=torch.uint8), distance=1).int().tolist()
        [[[1, 1, 1], [1, 0, 1], [1, 1, 1]]]
    """
    inner = contains_transition(labels, 2 * distance + 1)
    for axis in (1, 2):
        length = labels.shape[axis]
        inner.narrow(axis, 0, min(distance, length)).fill_(True)
        inner.narrow(axis, max(length - distance, 0), min(distance, length)).fill_(True)
    return inner


def class_contours(labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Keep the labels of pixels that touch another class (8 neighbours), and set all other pixels to void.

    Void and the border of the image do not make a contour.

    Args:
        labels: (N, H, W) integers.
        ignore_index: Label of void pixels.

    Returns:
        (N, H, W) int64.

    Example:
        >>> class_contours(torch.tensor([[[0, 0, 0, 1]]])).tolist()
        [[[255, 255, 0, 1]]]
    """
    labels = labels.long()
    is_void = labels == ignore_index
    limits = torch.iinfo(torch.int64)
    highest = over_window(labels.masked_fill(is_void, limits.min), 3, torch.maximum)
    lowest = over_window(labels.masked_fill(is_void, limits.max), 3, torch.minimum)
    return labels.masked_fill(is_void | (highest == lowest), ignore_index)


def has_same_class_within(labels: Tensor, others: Tensor, distance: int, num_classes: int, ignore_index: int) -> Tensor:
    """Find the pixels that have a pixel of the same class nearby in `others`.

    Args:
        labels: (N, H, W) integers.
        others: (N, H, W) integers.
        distance: Half the side of the search window, in pixels; its side is 2 distance + 1.
        num_classes: C, 1 to 256.
        ignore_index: Label of void pixels.

    Returns:
        (N, H, W) bool; False for void pixels.
    """
    own = class_sets(labels, num_classes, ignore_index)
    near = (
        over_window(word, 2 * distance + 1, torch.bitwise_or) for word in class_sets(others, num_classes, ignore_index)
    )
    return torch.stack([(a & b) != 0 for a, b in zip(own, near, strict=True)]).any(0)


def contains_transition(labels: Tensor, width: int) -> Tensor:
    """Find the pixels whose window contains two different values: (N, H, W) integers to (N, H, W) bool."""
    return over_window(labels, width, torch.maximum) != over_window(labels, width, torch.minimum)


def class_sets(labels: Tensor, num_classes: int, ignore_index: int) -> list[Tensor]:
    """Convert a label map to bit sets: in word k, bit b is set where the label is 32 k + b.

    Args:
        labels: (N, H, W) integers in [0, num_classes) or `ignore_index`.
        num_classes: C, 1 to 256.
        ignore_index: Label of void pixels, whose sets are empty.

    Returns:
        ceil(C / 32) tensors (N, H, W) int32.
    """
    labels = labels.to(torch.int32)
    bits = torch.where(
        labels == ignore_index, 0, torch.bitwise_left_shift(torch.ones_like(labels), labels % _WORD_BITS)
    )
    if num_classes <= _WORD_BITS:
        return [bits]
    word_index = labels // _WORD_BITS
    return [torch.where(word_index == word, bits, 0) for word in range(-(-num_classes // _WORD_BITS))]


def over_window(x: Tensor, width: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine all values in the window around each pixel; the window is clipped at the border of the image.

    The window is made by doubling with overlap, which takes log2(width) passes per axis instead of width. `combine`
    must therefore be idempotent (maximum, minimum, or).

    Args:
        x: (N, H, W) tensor of any dtype.
        width: Side of the window in pixels, odd, at least 1.
        combine: Associative, commutative and idempotent function of two tensors.

    Returns:
        (N, H, W), in the dtype of `x`.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"Expected `width` to be an odd number of pixels, at least 1, but got {width}.")
    for axis in (-1, -2):
        x = _over_line(x, width, axis, combine)
    return x


def _over_line(x: Tensor, width: int, axis: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    length, radius = x.shape[axis], width // 2
    # Repeating the border pixel equals clipping the window, because the window already contains that pixel.
    positions = torch.arange(-radius, length + radius, device=x.device).clamp_(0, length - 1)
    x, reach = x.index_select(x.ndim + axis, positions), 1
    while reach < width:
        step = min(reach, width - reach)
        size = x.shape[axis] - step
        x, reach = combine(x.narrow(axis, 0, size), x.narrow(axis, step, size)), reach + step
    return x


def _mean_over_cells(words: list[Tensor], num_classes: int, output_size: tuple[int, int]) -> Tensor:
    """Compute, from bit sets (N, H, W), the share of each cell's pixels that have each class, (N, C, h, w) float32."""
    (rows, heights), (columns, widths) = (
        _cells(length, cells, words[0].device) for length, cells in zip(words[0].shape[-2:], output_size, strict=True)
    )
    masks = []
    for k, word in enumerate(words):
        counts = _sum_within_cells(_sum_within_cells([word], 1, rows), 2, columns)
        masks.append(_unpack(counts, min(_WORD_BITS, num_classes - _WORD_BITS * k)))
    return torch.cat(masks, 1) / (heights.view(-1, 1) * widths.view(1, -1))


@lru_cache(maxsize=64)
def _cells(length: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the positions of a line that each cell averages.

    Args:
        length: Number of positions of the line.
        cells: Number of cells.
        device: Device of the result.

    Returns:
        Positions (k, cells), where k is a power of two and a cell of fewer positions is padded with `length`, which is
        one past the end; and the number of positions of each cell, (cells,).
    """
    cell = torch.arange(cells)
    first = cell * length // cells
    count = -((cell + 1) * -length // cells) - first
    step = torch.arange(1 << (int(count.max()) - 1).bit_length()).view(-1, 1)
    return torch.where(step < count, first + step, length).to(device), count.to(device)


def _sum_within_cells(planes: list[Tensor], axis: int, positions: Tensor) -> list[Tensor]:
    """Sum, for each class, the numbers at all positions of a cell along one axis of (N, H, W).

    Numbers are bit-sliced: bit c of plane k is bit k of the number of class c.
    """
    end = (0, 1) if axis == 2 else (0, 0, 0, 1)
    flat = positions.flatten()
    shape = [*planes[0].shape[:axis], *positions.shape, *planes[0].shape[axis + 1 :]]
    planes = [F.pad(plane, end).index_select(axis, flat).view(shape) for plane in planes]
    while planes[0].shape[axis] > 1:
        planes = _add(*zip(*(plane.chunk(2, axis) for plane in planes), strict=True))
    return [plane.squeeze(axis) for plane in planes]


def _add(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Add two bit-sliced numbers by a ripple-carry adder of bitwise operations, for all classes of a word at once."""
    total, carry = [a[0] ^ b[0]], a[0] & b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        half = x ^ y
        total.append(half ^ carry)
        carry = (x & y) | (half & carry)
    return [*total, carry]


def _unpack(planes: list[Tensor], num_classes: int) -> Tensor:
    """Convert bit-sliced numbers (N, h, w) to (N, num_classes, h, w) int32."""
    bit = torch.arange(num_classes, device=planes[0].device, dtype=torch.int32).view(1, -1, 1, 1)
    count = torch.zeros((), device=planes[0].device, dtype=torch.int32)
    for k, plane in enumerate(planes):
        count = count + ((plane.unsqueeze(1) >> bit & 1) << k)
    return count


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise TypeError or ValueError unless `labels` are (N, H, W) integers in [0, num_classes) or `ignore_index`."""
    if labels.dtype.is_floating_point or labels.dtype is torch.bool:
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
    if labels.device.type == "cpu" and labels.numel():
        invalid = labels[(labels != ignore_index) & ((labels < 0) | (labels >= num_classes))]
        if invalid.numel():
            raise ValueError(
                f"Expected labels in [0, {num_classes}) or ignore_index={ignore_index}, but got "
                f"{sorted(set(invalid.tolist()))[:10]}. Map them to classes, or to ignore_index."
            )
