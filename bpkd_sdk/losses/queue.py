"""CIRKD's memory: for each class a ring of the teacher's latest features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClassQueue(nn.Module):
    """A ring of unit vectors for every class, random at first; all of it is in the state dict.

    The official code overwrites a ring's end and starts over when new entries do not fit before it; here a ring is
    written through the end, so that every entry grows equally old.

    Args:
        num_classes: C.
        size: Entries of a class.
        channels: D.
        device: Where it lies.

    Attributes:
        entries: (C, size, D) float32.
        pointer: (C,) int64, the slot that is overwritten next.

    Example:
        >>> queue = ClassQueue(num_classes=2, size=3, channels=4)
        >>> queue.push(torch.eye(4)[:2], torch.tensor([1, 1]))
        >>> queue.pointer.tolist(), queue.entries[1, :2].argmax(1).tolist()
        ([0, 2], [0, 1])
    """

    def __init__(self, num_classes: int, size: int, channels: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.entries: Tensor
        self.pointer: Tensor
        self.register_buffer("entries", F.normalize(torch.randn(num_classes, size, channels, device=device), dim=2))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.int64, device=device))

    def push(self, vectors: Tensor, classes: Tensor) -> None:
        """Add vectors (M, D) of classes (M,), in their order; the oldest go."""
        num_classes, size = self.entries.shape[:2]
        rank, count = rank_within(classes, num_classes)
        slot = (self.pointer[classes] + rank) % size
        newest = rank >= count[classes] - size
        self.entries[classes[newest], slot[newest]] = vectors[newest].to(self.entries.dtype)
        self.pointer.add_(count).remainder_(size)

    def sample(self, per_class: int) -> Tensor:
        """(C * per_class, D): the entries at the same random slots of every class; all if there are no more."""
        size = self.entries.shape[1]
        slots = torch.randperm(size, device=self.entries.device)[:per_class]
        return self.entries[:, slots].flatten(0, 1)


def rank_within(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """How many elements of the same group come before each.

    Args:
        group: (M,) int64 in [0, num_groups).
        num_groups: How many groups there may be.

    Returns:
        The ranks (M,), and the size of each group (num_groups,), int64.

    Example:
        >>> rank_within(torch.tensor([2, 0, 2, 2]), 3)[0].tolist()
        [0, 0, 1, 2]
    """
    order = group.argsort(stable=True)
    count = torch.bincount(group, minlength=num_groups)
    start = count.cumsum(0) - count
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - start[group[order]]
    return rank, count


def class_means(vectors: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The mean direction of each group that has a member.

    Args:
        vectors: (M, D).
        group: (M,) int64 in [0, num_groups).
        num_groups: How many groups there may be.

    Returns:
        Unit vectors (G, D), and their groups (G,) in ascending order.
    """
    sums = vectors.new_zeros(num_groups, vectors.shape[1]).index_add_(0, group, vectors)
    present = torch.bincount(group, minlength=num_groups).nonzero().squeeze(1)
    return F.normalize(sums[present]), present


def sample_positions(group: Tensor, per_group: int, num_groups: int) -> Tensor:
    """Up to `per_group` random members of each group.

    Args:
        group: (M,) int64 in [0, num_groups).
        per_group: At most so many.
        num_groups: How many groups there may be.

    Returns:
        Indices into `group`, ordered by group.
    """
    shuffled = torch.randperm(len(group), device=group.device)
    chosen = shuffled[rank_within(group[shuffled], num_groups)[0] < per_group]
    return chosen[group[chosen].argsort(stable=True)]
