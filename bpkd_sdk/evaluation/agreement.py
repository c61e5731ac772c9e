"""Agreement of two masks: the share of pixels with the same class, of all pixels and on both sides of the edge band.

Masks are torch tensors or numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, NamedTuple

from bpkd_sdk.arrays import Array, array_namespace
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


class MaskComparison(NamedTuple, Generic[Array]):
    """Two masks compared pixel by pixel.

    Attributes:
        same: Whether a pixel has the same class in both masks, bool (N, H, W).
        edge: Whether a pixel is compared and inside the edge band, bool (N, H, W).
        body: Whether a pixel is compared and outside the edge band, bool (N, H, W).
    """

    same: Array
    edge: Array
    body: Array


def mask_agreement(masks: Iterable[Array], references: Iterable[Array]) -> MaskAgreement:
    """Compute the agreement of masks with their references, over the pixels of all images together.

    Args:
        masks: Integer masks (H, W), one per image, or a batch (N, H, W).
        references: Integer masks (H, W) of the same sizes, whose boundaries make the edge band.

    Examples:
        >>> import numpy as np
        >>> mask_agreement(np.array([[[0, 0, 1, 0]]]), np.zeros((1, 1, 4), np.uint8))
        MaskAgreement(whole=0.75, edge=None, body=0.75)
    """
    counts = [
        [(_count(same & region), _count(region)) for region in (edge | body, edge, body)]
        for same, edge, body in (
            compare_masks(mask[None], reference[None]) for mask, reference in zip(masks, references, strict=True)
        )
    ]
    if not counts:
        raise ValueError("Expected at least one mask, but got none.")
    return MaskAgreement(*(_share(parts) for parts in zip(*counts, strict=True)))


def compare_masks(
    masks: Array,
    references: Array,
    *,
    boundaries: Array | None = None,
    edge_width: int = EDGE_WIDTH,
    ignore_index: int | None = None,
) -> MaskComparison[Array]:
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
    xp = array_namespace(masks, references, boundaries)
    given = [xp.astype(mask, xp.int32) for mask in (masks, references, boundaries)]  # in uint8, 255 equals -1 in torch
    compared = (given[0] != void) & (given[1] != void) & (given[2] != void)
    band = edge_band(given[2], edge_width, void)
    return MaskComparison(given[0] == given[1], compared & band, compared & ~band)


def _count(flags: Any) -> int:
    return int(flags.sum())


def _share(counts: Iterable[tuple[int, int]]) -> float | None:
    """Return the ratio of two sums of counts; None for a share of no pixels."""
    found, total = map(sum, zip(*counts, strict=True))
    return found / total if total else None
