"""Adaptive average pooling whose sizes may stay unknown: exact, as a product with averaging matrices.

torch's ONNX exporter turns adaptive pooling into as many slices as there are cells, at the sizes it traced, and says
nothing; a file with dynamic height and width then computes other averages at any other size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def exact_pooling() -> Iterator[None]:
    """Let `average_over_cells` stand in for torch's adaptive average pooling, also inside `interpolate(mode="area")`.

    For tracing only: the function in `torch.nn.functional` is replaced for the whole process, and put back on leaving.
    """
    original = F.adaptive_avg_pool2d
    F.adaptive_avg_pool2d = average_over_cells
    try:
        yield
    finally:
        F.adaptive_avg_pool2d = original


def average_over_cells(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """What `torch.nn.functional.adaptive_avg_pool2d` computes, by operations that no size is baked into.

    Args:
        input: (..., H, W), floating point; named as in torch, whose callers may pass it by name.
        output_size: (h, w), or one number for both; None keeps that side.

    Returns:
        (..., h, w).

    Example:
        >>> average_over_cells(torch.arange(6.0).view(1, 2, 3), (1, 2))
        tensor([[[2., 3.]]])
    """
    rows, columns = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
    if rows == columns == 1:
        return input.mean((-2, -1), keepdim=True)
    if rows is not None:
        input = _averages(input.shape[-2], rows, input) @ input
    if columns is not None:
        input = input @ _averages(input.shape[-1], columns, input).transpose(0, 1)
    return input


def _averages(length: int, cells: int, like: Tensor) -> Tensor:
    """The matrix (cells, length) that averages a line over its cells.

    Cell i is [i length / cells, (i + 1) length / cells), and holds each position it overlaps, as in torch. Multiplied
    out, so that whole numbers decide.
    """
    position = torch.arange(length, device=like.device)
    cell = torch.arange(cells, device=like.device).view(-1, 1)
    inside = ((position + 1) * cells > cell * length) & (position * cells < (cell + 1) * length)
    weights = inside.float()
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)
