"""Agreement of two masks: the share of pixels with the same class, of all pixels and on both sides of the edge band."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bpkd_sdk.boundary import edge_band

EDGE_WIDTH = 7  # side of the window that makes the edge band, in pixels, as in the paper


class MaskAgreement(NamedTuple):
    """Shares (0..1) of the pixels that have the same class in two masks; None for a share of no pixels.

    Attributes:
        whole: Share of all compared pixels.
        edge: Share of the compared pixels inside the edge band.
        body: Share of the compared pixels outside the edge band.
    """

    whole: float | None
    edge: float | None
    body: float | None


class MaskComparison(NamedTuple):
    """Two masks compared pixel by pixel.

    Attributes:
        same: Whether a pixel has the same class in both masks, bool (N, H, W).
        edge: Whether a pixel is compared and inside the edge band, bool (N, H, W).
        body: Whether a pixel is compared and outside the edge band, bool (N, H, W).
    """

    same: Tensor
    edge: Tensor
    body: Tensor


def mask_agreement(masks: Iterable[Tensor], references: Iterable[Tensor]) -> MaskAgreement:
    """Compute the agreement of masks with their references, over the pixels of all images together.

    Args:
        masks: Integer masks (H, W), one per image, or a batch (N, H, W).
        references: Integer masks (H, W) of the same sizes, whose boundaries make the edge band.

    Example:
        >>> mask_agreement(torch.tensor([[[0, 0, 1, 0]]]), torch.zeros(1, 1, 4, dtype=torch.uint8))
        MaskAgreement(whole=0.75, edge=None, body=0.75)
    """
    flags = [
        [same[region] for region in (edge | body, edge, body)]
        for same, edge, body in (
            compare_masks(mask[None], reference[None]) for mask, reference in zip(masks, references, strict=True)
        )
    ]
    if not flags:
        raise ValueError("Expected at least one mask, but got none.")
    return MaskAgreement(*(_share(torch.cat(parts)) for parts in zip(*flags, strict=True)))


def compare_masks(
    masks: Tensor,
    references: Tensor,
    *,
    boundaries: Tensor | None = None,
    edge_width: int = EDGE_WIDTH,
    ignore_index: int | None = None,
) -> MaskComparison:
    """Compare two batches of masks pixel by pixel, inside and outside the edge band.

    Args:
        masks: (N, H, W) integers.
        references: (N, H, W) integers.
        boundaries: Masks (N, H, W) whose boundaries make the edge band; None: those of `references`.
        edge_width: Side of the window that makes the edge band, in pixels, odd.
        ignore_index: Void label. A pixel that is void in any of the masks is not compared. None: all pixels are
            compared.
    """
    if boundaries is None:
        boundaries = references
    void = -1 if ignore_index is None else ignore_index
    given = [mask.int() for mask in (masks, references, boundaries)]  # in uint8, torch finds 255 equal to -1
    compared = torch.stack([mask != void for mask in given]).all(0)
    band = edge_band(given[2], edge_width, void)
    return MaskComparison(given[0] == given[1], compared & band, compared & ~band)


def _share(flags: Tensor) -> float | None:
    return flags.double().mean().item() if flags.numel() else None
