"""Tests of the interlaced attention against a slow implementation of the same equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bpkd_sdk.models.decoders import ISA_TILE, ISAHead, SelfAttentionBlock


def attend_within(relation: SelfAttentionBlock, x: Tensor, groups: list[list[tuple[int, int]]]) -> Tensor:
    """Apply self-attention to x (C, H, W), one group of pixels after the other."""
    out = torch.empty_like(x)
    for pixels in groups:
        rows, columns = (list(axis) for axis in zip(*pixels, strict=True))
        out[:, rows, columns] = relation(x[:, rows, columns][None, :, :, None])[0, :, :, 0]
    return out


@pytest.mark.parametrize("size", [(8, 8), (13, 17), (16, 9)], ids=str)
def test_interlaced_attention_is_global_then_local(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    head = ISAHead((4, 6), 5, 3).eval().double()
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    height, width = size
    top, left = -height % ISA_TILE // 2, -width % ISA_TILE // 2
    padded = torch.zeros(2, 5, height + -height % ISA_TILE, width + -width % ISA_TILE, dtype=torch.float64)
    padded[:, :, top : top + height, left : left + width] = x
    pixels = [(i, j) for i in range(padded.shape[2]) for j in range(padded.shape[3])]
    across: dict[tuple[int, int], list[tuple[int, int]]] = {}
    inside: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, j in pixels:
        across.setdefault((i % ISA_TILE, j % ISA_TILE), []).append((i, j))
        inside.setdefault((i // ISA_TILE, j // ISA_TILE), []).append((i, j))
    with torch.no_grad():
        slow = [
            attend_within(
                head.local_relation,
                attend_within(head.global_relation, image, list(across.values())),
                list(inside.values()),
            )
            for image in padded
        ]
        expected = torch.stack(slow)[:, :, top : top + height, left : left + width]
        torch.testing.assert_close(head._attend(x), expected)
