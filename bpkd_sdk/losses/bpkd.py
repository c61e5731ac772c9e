"""BPKD: boundary-privileged knowledge distillation (Liu et al., WACV 2024, arXiv 2306.08075).

Edges and bodies of objects are distilled by different losses. A soft trimap M (N, C, h, w), see `bpkd_sdk.boundary`,
splits the logits z of both networks into Z_E = z M and Z_B = z (1 - M). Edges compare, at each position, the
distribution over classes; bodies compare, for each class, the distribution over positions.

The paper's text leaves some points open; each is an argument here, and its readings are listed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from bpkd_sdk.boundary import Void, edge_masks
from bpkd_sdk.errors import check_choice
from bpkd_sdk.losses.cwd import channel_kl
from bpkd_sdk.losses.method import DistillationLoss, check_not_negative, check_positive, paired_logits
from bpkd_sdk.output import SegmentationOutput

ClassReduction = Literal["mean", "sum"]
EdgeCount = Literal["positions", "mass"]


def bpkd_edge(
    student: Tensor,
    teacher: Tensor,
    masks: Tensor,
    *,
    alpha: Tensor | float = 2.0,
    temperature: float = 1.0,
    class_reduction: ClassReduction = "mean",
    edge_count: EdgeCount = "positions",
) -> Tensor:
    """The edge term: L_E = mean over images of sum_c alpha_c / n_c sum_i phi_i M[c, i].

    phi_i = KL(softmax_c(Z_E^T / T) || softmax_c(Z_E^S / T)) at position i, with both logits masked before the softmax
    (pre-mask) and phi masked again by each class (post-mask).

    Args:
        student: Logits (N, C, h, w), float32 or float64.
        teacher: Logits (N, C, h, w), constant.
        masks: M, (N, C, h, w) in [0, 1].
        alpha: Weight of a class, one number or (C,).
        temperature: T. The term is not multiplied by T^2.
        class_reduction: "sum" over classes, or "mean" over the classes that have an edge in the image.
        edge_count: n_c is the number of "positions" with M > 0, or their "mass" sum_i M, at least 1.

    Returns:
        Scalar; 0 with zero gradient where no image has an edge.
    """
    log_p_student = (student * masks / temperature).log_softmax(1)
    log_p_teacher = (teacher * masks / temperature).log_softmax(1)
    phi = (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(1)
    positions = (masks > 0).sum((2, 3))
    count = positions if edge_count == "positions" else masks.sum((2, 3))
    class_weight = torch.as_tensor(alpha, dtype=masks.dtype, device=masks.device) / count.clamp(min=1)
    if class_reduction == "mean":
        class_weight = class_weight / (positions > 0).sum(1, keepdim=True).clamp(min=1)
    position_weight = torch.einsum("nc,nchw->nhw", class_weight, masks)
    return (phi * position_weight).sum() / len(student)


def bpkd_body(student: Tensor, teacher: Tensor, masks: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The body term: L_B = T^2 / C sum_c KL(softmax_i(Z_B^T / T) || softmax_i(Z_B^S / T)), mean over images.

    Arguments as `bpkd_edge`. Edge positions stay in the softmax with their logits pulled towards 0.
    """
    body = 1 - masks
    return channel_kl(student * body, teacher * body, temperature=temperature)


class BPKDLoss(DistillationLoss):
    """Boundary-privileged distillation of logits: {"edge": ..., "body": ...}.

    The defaults are those that worked on real images: the mean over the classes present with weights 10 and 5 gives
    terms of the cross-entropy's size. `BPKDLoss.paper` has the paper's weights and sum, whose edge term starts two
    orders of magnitude above the cross-entropy.

    Args:
        num_classes: C, at most 256.
        width: k, side of the trimap's window in pixels of the label map, odd.
        edge_weight: lambda_E.
        body_weight: lambda_B.
        alpha: Weight of each class in the edge term, one number or C of them.
        temperature: T of both terms. The paper does not state it; its code base uses 1.
        class_reduction: See `bpkd_edge`. The paper's equation is the sum.
        edge_count: n_c, see `bpkd_edge`.
        void: What becomes of edges near void, see `bpkd_sdk.boundary.edge_masks`.
        ignore_index: The void label.

    Raises:
        ValueError: For a value out of its range.

    Example:
        >>> labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> labels[:, :, 4:] = 1
        >>> teacher = torch.stack([labels == 0, labels == 1], 1)[:, :, ::4, ::4].float()
        >>> terms = BPKDLoss(num_classes=2)(torch.zeros(1, 2, 2, 2), teacher, labels)
        >>> {name: round(term.item(), 4) for name, term in terms.items()}
        {'edge': 0.9849, 'body': 0.0388}
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 7,
        edge_weight: float = 10.0,
        body_weight: float = 5.0,
        alpha: float | Sequence[float] = 2.0,
        temperature: float = 1.0,
        class_reduction: ClassReduction = "mean",
        edge_count: EdgeCount = "positions",
        void: Void = "clear",
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_not_negative(edge_weight=edge_weight, body_weight=body_weight)
        check_positive(temperature=temperature)
        check_choice("class_reduction", class_reduction, get_args(ClassReduction))
        check_choice("edge_count", edge_count, get_args(EdgeCount))
        check_choice("void", void, get_args(Void))
        alphas = torch.as_tensor(alpha, dtype=torch.float32)
        if alphas.shape not in ((), (num_classes,)):
            raise ValueError(f"Expected `alpha` to be one number or {num_classes}, but got {alphas.numel()} of them.")
        self.num_classes = num_classes
        self.width = width
        self.edge_weight = edge_weight
        self.body_weight = body_weight
        self.temperature = temperature
        self.class_reduction: ClassReduction = class_reduction
        self.edge_count: EdgeCount = edge_count
        self.void: Void = void
        self.ignore_index = ignore_index
        self.alpha: Tensor
        self.register_buffer("alpha", alphas, persistent=False)

    @classmethod
    def paper(cls, num_classes: int, *, ignore_index: int = 255) -> BPKDLoss:
        """The paper's setting: lambda_E = 50, lambda_B = 20, alpha = 2, k = 7, sum over classes."""
        return cls(num_classes, edge_weight=50, body_weight=20, class_reduction="sum", ignore_index=ignore_index)

    def forward(
        self, student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """See `DistillationLoss.forward`; teacher logits of another stride are resized to the student's."""
        z_student, z_teacher = paired_logits(student, teacher)
        if z_student.shape[1] != self.num_classes:
            raise ValueError(f"Expected logits of {self.num_classes} classes, but got {z_student.shape[1]}.")
        if len(labels) != len(z_student):
            raise ValueError(f"Expected labels for {len(z_student)} images, but got {len(labels)}.")
        with torch.autocast(z_student.device.type, enabled=False):
            height, width = z_student.shape[2:]
            masks = edge_masks(
                labels, self.num_classes, (height, width), self.width, self.ignore_index, void=self.void
            ).to(z_student.dtype)
            edge = bpkd_edge(
                z_student,
                z_teacher,
                masks,
                alpha=self.alpha,
                temperature=self.temperature,
                class_reduction=self.class_reduction,
                edge_count=self.edge_count,
            )
            body = bpkd_body(z_student, z_teacher, masks, temperature=self.temperature)
        return {"edge": self.edge_weight * edge, "body": self.body_weight * body}
