import numpy as np
import pytest
import torch

from bpkd_sdk.boundary import edge_band
from bpkd_sdk.evaluation.agreement import compare_masks, mask_agreement

RANDOM = np.random.default_rng(0)


def blocks(*shape):
    """A mask of 8x8 blocks of four classes, the last of them 255."""
    ids = RANDOM.choice(np.array([0, 1, 2, 255], np.uint8), shape)
    return torch.from_numpy(ids.repeat(8, -1).repeat(8, -2))


def test_shares_are_those_of_all_pixels_together():
    references = [blocks(2, 3), blocks(4, 2)]
    masks = [torch.where(torch.rand(mask.shape) < 0.2, 1, mask) for mask in references]
    edges = [edge_band(mask.long()[None], ignore_index=-1)[0] for mask in references]
    same = torch.cat([(a == b).flatten() for a, b in zip(masks, references, strict=True)]).double()
    edge = torch.cat([band.flatten() for band in edges])
    found = mask_agreement(masks, references)
    assert found == pytest.approx([same.mean().item(), same[edge].mean().item(), same[~edge].mean().item()])


def test_a_share_of_no_pixels_is_none():
    flat = torch.zeros(1, 8, 8, dtype=torch.uint8)
    assert mask_agreement(flat, flat) == (1, None, 1)
    stripes = (torch.arange(8) % 2).expand(1, 8, 8)
    assert mask_agreement(flat, stripes) == (0.5, 0.5, None)


def test_void_in_any_mask_is_not_compared():
    mask, reference, label = (torch.zeros(1, 3, 40, dtype=torch.uint8) for _ in range(3))
    mask[..., 0], reference[..., 1], label[..., 2], label[..., 20:] = 255, 255, 255, 1
    found = compare_masks(mask, reference, boundaries=label, edge_width=3, ignore_index=255)
    assert not (found.edge | found.body)[..., :3].any()
    assert (found.edge | found.body)[..., 3:].all()
    assert found.edge[0, 0].nonzero().flatten().tolist() == [3, 19, 20]
