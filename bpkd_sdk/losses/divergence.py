"""KL divergence of two softmaxes, which every term on logits is computed from.

The gradient is computed together with the value, a few distributions at a time. Autograd would keep several tensors of
the logits' size for its backward pass, which for 150 classes is most of the memory that such a loss needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 1 << 19  # elements that are processed at a time


def pixel_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute T^2 / (N h w) sum KL(softmax_c(t / T) || softmax_c(s / T)) over images and positions.

    This is equation (1) of docs/methods/canonical.md. Other code normalises differently: the sum over positions and
    mean over images is h w times larger (mmrazor's "batchmean"), the sum over images and mean over positions is N
    times larger (SKD), and the mean over all elements is C times smaller (IFVD).

    Args:
        student: Logits (N, C, h, w), float32 or float64.
        teacher: Logits (N, C, h, w); they receive no gradient.
        temperature: T, above 0.

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> import torch
        >>> round(pixel_kl(torch.zeros(1, 2, 1, 1), torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)).item(), 4)
        0.3278
    """
    divergence = softmax_kl(student.flatten(2), teacher.flatten(2), dim=1, temperature=temperature)
    return temperature**2 * divergence.mean()


def softmax_kl(
    student: Tensor, teacher: Tensor, *, dim: int, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Compute KL(softmax(t / T) || softmax(s / T)) of every distribution along one dimension, without the factor T^2.

    Args:
        student: s, (A, B, P), float32 or float64.
        teacher: t, (A, B, P); it receives no gradient.
        dim: Dimension of the softmax, 1 or 2.
        temperature: T, above 0.
        mask: Factor (A, B, P) that s and t are multiplied by before the softmax, without gradient; None is 1.

    Returns:
        (A, P) for dim=1, (A, B) for dim=2; 0 or above.

    Examples:
        >>> softmax_kl(torch.zeros(1, 2, 2), torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]), dim=2)
        tensor([[0.0000, 0.3278]])
    """
    value: Tensor = _SoftmaxKL.apply(student, teacher, dim, temperature, mask)
    return value


class _SoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, dim: int, temperature: float, mask: Tensor | None
    ) -> Tensor:
        own = dim - 3
        gradient = torch.empty_like(student)
        value = student.new_empty(len(student), student.shape[3 - dim])
        for s, t, slope, divergence, m in _chunks(student, teacher, gradient, value, mask, dim):
            factor = 1 / temperature if m is None else m / temperature
            log_q, log_p = ((x * factor).log_softmax(own) for x in (s, t))
            p = log_p.exp()
            torch.sum(log_p.sub_(log_q).mul_(p), own, out=divergence)
            slope.copy_(log_q.exp_().sub_(p).mul_(factor))
        ctx.save_for_backward(gradient)
        ctx.dim = dim
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope.unsqueeze(ctx.dim), None, None, None, None


def _chunks(
    student: Tensor, teacher: Tensor, gradient: Tensor, value: Tensor, mask: Tensor | None, dim: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
    """Divide the tensors of `_SoftmaxKL` into views of a few distributions of one image, which a CPU's cache holds.

    On other devices there is one chunk, because the number of operations determines the time.
    """
    if not student.is_cpu:
        yield student, teacher, gradient, value, mask
        return
    size = max(1, _CHUNK // student.shape[dim])
    for image in range(len(student)):
        for first in range(0, value.shape[1], size):
            part = slice(first, first + size)
            inside = (image, slice(None), part) if dim == 1 else (image, part)
            masks = None if mask is None else mask[inside]
            yield student[inside], teacher[inside], gradient[inside], value[image, part], masks
