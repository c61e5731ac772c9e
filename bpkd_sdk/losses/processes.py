"""What methods share between the processes of a distributed run; with one process everything stays as it is."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor of the same shape on every process."""
    if process_count() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / process_count()


def rows_of_all_processes(x: Tensor) -> Tensor:
    """The rows of every process's (M, ...) one behind the other, by rank; M may differ."""
    if process_count() == 1:
        return x
    lengths = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(process_count())]
    dist.all_gather(lengths, torch.tensor([len(x)], device=x.device))
    longest = max(int(length) for length in lengths)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])
