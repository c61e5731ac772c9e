"""Losses on the similarities of all pairs of positions.

Each loss computes its gradient together with its value, from a few rows of the similarity matrix at a time, so that no
matrix is stored for the backward pass. `relation_kl` needs all row and column sums first and therefore stores the two
matrices of one pair of images until they are complete. The other losses never store more than a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 1 << 20  # elements of a matrix that are processed at a time on a CPU
MIN_TEMPERATURE = 0.025  # below it, exp(-2 / T) underflows float32 in `relation_kl`


def relation_kl(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Compute the KL between the similarity distributions of teacher and student, for all ordered pairs of images.

    The loss is the mean over images i and j and rows r of
    KL(softmax_k(t_ir . t_jk / T) || softmax_k(s_ir . s_jk / T)).

    Args:
        student: Unit vectors s, (N, R, D_S), float32 or float64.
        teacher: Unit vectors t, (N, R, D_T); they receive no gradient.
        temperature: T, at least `MIN_TEMPERATURE`.

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> student, teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.eye(2).unsqueeze(0)
        >>> round(relation_kl(student, teacher, temperature=1).item(), 4)
        0.1109
    """
    value: Tensor = _RelationKL.apply(student, teacher, temperature)
    return value


def contrast_kl(student: Tensor, teacher: Tensor, memory: Tensor, *, temperature: float) -> Tensor:
    """Compute the KL between the distributions of teacher and student over the similarities to a memory.

    The loss is the mean over rows r of KL(softmax_k(t_r . m_k / T) || softmax_k(s_r . m_k / T)).

    Args:
        student: Unit vectors s, (R, D), float32 or float64.
        teacher: Unit vectors t, (R, D); they receive no gradient.
        memory: Unit vectors m, (K, D); they receive no gradient.
        temperature: T, above 0.

    Returns:
        Scalar, 0 or above; 0 with zero gradient if R is 0.

    Examples:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2)
        >>> round(contrast_kl(student, teacher, student, temperature=1).item(), 4)
        0.0
        >>> round(contrast_kl(student, teacher, teacher, temperature=1).item(), 4)
        0.2311
    """
    value: Tensor = _ContrastKL.apply(student, teacher, memory, temperature)
    return value


def gram_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of the matrices of inner products: 1 / (N R^2) sum (S S^T - T T^T)^2.

    Args:
        student: S, (N, R, D_S), float32 or float64.
        teacher: T, (N, R, D_T); it receives no gradient.

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> gram_mse(torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[1.0], [0.0]]])).item()
        0.75
    """
    value: Tensor = _GramMSE.apply(student, teacher)
    return value


def _chunk(features: Tensor) -> int:
    """Return the number of elements per chunk: a CPU needs it to fit its cache, a GPU needs few kernel launches."""
    return _CHUNK if features.device.type == "cpu" else 8 * _CHUNK


class _RelationKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        images, nodes = student.shape[:2]
        gradient = torch.zeros_like(student)
        total = student.new_zeros(())
        for i in range(images):
            for j in range(i, images):
                total += _add_pair(student, teacher, i, j, temperature, gradient)
        count = images**2 * nodes
        ctx.save_for_backward(gradient.div_(count * temperature))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope, None, None


def _add_pair(student: Tensor, teacher: Tensor, i: int, j: int, temperature: float, gradient: Tensor) -> Tensor:
    """Return the sum of the KLs of images (i, j) and (j, i); add its gradient times the temperature to `gradient`.

    One similarity matrix serves both pairs: by rows and by columns. The matrix of an image with itself is symmetric, so
    that the part left of the diagonal is not computed.
    """
    nodes = student.shape[1]
    height = max(1, _chunk(student) // nodes)
    by_row = student.new_zeros(3, nodes)
    by_column = by_row if i == j else torch.zeros_like(by_row)
    # Subtracted before the exponential, which then cannot overflow: a cosine is at most 1.
    highest = student.new_full((), 1 / temperature)
    strips = []
    for begin in range(0, nodes, height):
        rows = slice(begin, begin + height)
        first, mirrored = (begin, begin + height) if i == j else (0, 0)
        q, p = (
            torch.addmm(highest, x[i, rows], x[j, first:].T, beta=-1, alpha=1 / temperature) for x in (student, teacher)
        )
        gap = p - q
        parts = (q.exp_(), p.exp_(), gap.mul_(p))
        for part, row_sum, column_sum in zip(parts, by_row, by_column, strict=True):
            row_sum[rows] += part.sum(1)
            column_sum[mirrored:] += part[:, mirrored - first :].sum(0)
        strips.append((rows, first, mirrored, q, p))
    for rows, first, mirrored, q, p in strips:
        weight_q, weight_p = (
            1 / row_sum[rows].unsqueeze(1) + 1 / column_sum[first:]
            for row_sum, column_sum in zip(by_row[:2], by_column[:2], strict=True)
        )
        slope = q.mul_(weight_q).addcmul_(p, weight_p, value=-1)
        gradient[i, rows].addmm_(slope, student[j, first:])
        gradient[j, mirrored:].addmm_(slope[:, mirrored - first :].T, student[i, rows])
    return _divergence(by_row) if i == j else _divergence(by_row) + _divergence(by_column)


def _divergence(sums: Tensor) -> Tensor:
    """Compute the sum of KL(p || q) over rows.

    Args:
        sums: (3, R), the sums over k of exp(q_k), of exp(p_k), and of exp(p_k) (p_k - q_k).
    """
    q, p, gap = sums
    total: Tensor = (gap / p - p.log() + q.log()).sum()
    return total


class _ContrastKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, memory: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(student)
        total = student.new_zeros(())
        height = max(1, _chunk(student) // len(memory))
        for begin in range(0, len(student), height):
            rows = slice(begin, begin + height)
            log_q, log_p = ((x[rows] @ memory.T).div_(temperature).log_softmax(1) for x in (student, teacher))
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            gradient[rows] = log_q.exp_().sub_(p) @ memory
        count = max(1, len(student))
        ctx.save_for_backward(gradient.div_(count * temperature))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope, None, None, None


class _GramMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        images, nodes = student.shape[:2]
        total = student.new_zeros(())
        gradient = torch.empty_like(student)
        rows = max(1, _chunk(student) // (images * nodes))
        for begin in range(0, nodes, rows):
            s, t = student[:, begin : begin + rows], teacher[:, begin : begin + rows]
            difference = torch.baddbmm(t @ teacher.mT, s, student.mT, beta=-1)
            total += difference.square().sum()
            gradient[:, begin : begin + rows] = difference @ student
        # The factor 4 is 2 from the square times 2 from the symmetric product.
        ctx.save_for_backward(gradient.mul_(4 / (images * nodes**2)))
        return total / (images * nodes**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope, None
