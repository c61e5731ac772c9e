"""Pixel-wise distillation: at each position, the student's distribution over classes against the teacher's."""

from __future__ import annotations

from torch import Tensor

from bpkd_sdk.losses.divergence import softmax_kl


def pixel_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The mean over images and positions: T^2 / (N h w) sum KL(softmax_c(t / T) || softmax_c(s / T)).

    Other normalisations in circulation: the sum over positions and mean over images (h w times larger, mmrazor's
    "batchmean"), the sum over images and mean over positions (N times, SKD), the mean over all elements (C times
    smaller, IFVD).

    Args:
        student: Logits (N, C, h, w), float32 or float64.
        teacher: Logits (N, C, h, w), constant.
        temperature: T, above 0.

    Returns:
        Scalar, 0 or above.

    Example:
        >>> import torch
        >>> round(pixel_kl(torch.zeros(1, 2, 1, 1), torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)).item(), 4)
        0.3278
    """
    divergence = softmax_kl(student.flatten(2), teacher.flatten(2), dim=1, temperature=temperature)
    return temperature**2 * divergence.mean()
