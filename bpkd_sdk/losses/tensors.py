"""Tensor functions that several methods share: labels at the logits' size, exchange between processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def downsample_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize labels by floor-nearest, as the authors' code does: row i of the result is row floor(i H / h).

    This is torch's mode "nearest", which is not centred on pixels. At a stride s that is a whole number, the chosen
    label lies (s - 1) / 2 label pixels above and to the left of the centre of its cell. The edges of these labels are
    therefore shifted by the same distance, below and to the right of the edges in resized logits: 3.5 pixels, or 0.44
    cells, at stride 8. If the stride is not a whole number, the offset is about half a cell. The test fixtures made
    with the authors' code require this rule.

    Args:
        labels: (N, H, W) integers.
        size: (h, w) of the result.

    Returns:
        (N, h, w) int64.

    Examples:
        >>> downsample_labels(torch.arange(8).view(1, 1, 8), (1, 2)).tolist()
        [[[0, 4]]]
    """
    rows, columns = (
        torch.arange(cells, device=labels.device) * length // cells
        for length, cells in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows.unsqueeze(1), columns].long()


def build_projection(student: Tensor, teacher: Tensor) -> nn.Conv2d:
    """Build a 1x1 convolution without bias from the student's channels to the teacher's.

    Args:
        student: Feature map (N, D_S, h, w); the convolution is created on its device.
        teacher: Feature map (N, D_T, h, w).
    """
    return nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False, device=student.device)


def process_count() -> int:
    """Return the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(x: Tensor) -> Tensor:
    """Average a tensor over all processes; its shape must be the same in each of them."""
    if process_count() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / process_count()


def gather_rows(x: Tensor) -> Tensor:
    """Concatenate the rows of all processes, in the order of their ranks.

    Args:
        x: (M, ...) tensor; M may differ between processes.

    Returns:
        (sum of all M, ...), the same on every process.
    """
    if process_count() == 1:
        return x
    lengths = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(process_count())]
    dist.all_gather(lengths, torch.tensor([len(x)], device=x.device))
    longest = max(int(length) for length in lengths)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])
