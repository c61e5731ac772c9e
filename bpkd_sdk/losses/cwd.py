"""CWD: channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256)."""

from __future__ import annotations

from torch import Tensor


def channel_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL between the spatial distributions of each channel: T^2 / (N C) sum_{n,c} KL(softmax_i(t/T) || softmax_i(s/T)).

    Args:
        student: (N, C, h, w), float32 or float64.
        teacher: (N, C, h, w), constant.
        temperature: T, above 0.

    Returns:
        Scalar, 0 or above.
    """
    log_p_student = (student.flatten(2) / temperature).log_softmax(2)
    log_p_teacher = (teacher.flatten(2) / temperature).log_softmax(2)
    divergence = (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(2)
    return temperature**2 * divergence.mean()
