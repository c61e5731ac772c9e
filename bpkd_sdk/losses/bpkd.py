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
from bpkd_sdk.losses.divergence import softmax_kl
from bpkd_sdk.losses.method import Outputs, Terms, WeightedTerms, check_positive

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
    z_student, z_teacher, m = (x.flatten(2) for x in (student, teacher, masks))
    phi = softmax_kl(z_student, z_teacher, dim=1, temperature=temperature, mask=m)
    weight = post_mask(masks, alpha=alpha, class_reduction=class_reduction, edge_count=edge_count)
    return (phi * weight).sum() / len(student)


def post_mask(
    masks: Tensor, *, alpha: Tensor | float, class_reduction: ClassReduction, edge_count: EdgeCount
) -> Tensor:
    """What phi is multiplied with at each position: (N, h w), sum_c alpha_c / n_c M[c, i]. Arguments as `bpkd_edge`."""
    positions = (masks > 0).sum((2, 3))
    count = positions if edge_count == "positions" else masks.sum((2, 3))
    class_weight = torch.as_tensor(alpha, dtype=masks.dtype, device=masks.device) / count.clamp(min=1)
    if class_reduction == "mean":
        class_weight = class_weight / (positions > 0).sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("nc,nci->ni", class_weight, masks.flatten(2))


def bpkd_body(student: Tensor, teacher: Tensor, masks: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The body term: L_B = T^2 / C sum_c KL(softmax_i(Z_B^T / T) || softmax_i(Z_B^S / T)), mean over images.

    Arguments as `bpkd_edge`. Edge positions stay in the softmax with their logits pulled towards 0.
    """
    return channel_kl(student, teacher, temperature=temperature, mask=1 - masks)


class BPKDLoss(WeightedTerms):
    """Boundary-privileged distillation of logits: {"edge": ..., "body": ...}.

    The defaults are those that won on real images in short schedules (docs/results.md): the mean over the classes
    present, with weights 1 and 2. `BPKDLoss.paper` has the paper's weights and sum, whose edge term starts two orders
    of magnitude above the cross-entropy. What terms the defaults of all methods make is in docs/methods/README.md.

    Args:
        num_classes: C, at most 256; None: that of the first logits.
        width: k, side of the trimap's window in pixels of the label map, odd.
        edge_weight: lambda_E; a weight of 0 leaves a term out.
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
        {'edge': 0.0985, 'body': 0.0155}
    """

    name = "bpkd"

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        width: int = 7,
        edge_weight: float = 1.0,
        body_weight: float = 2.0,
        alpha: float | Sequence[float] = 2.0,
        temperature: float = 1.0,
        class_reduction: ClassReduction = "mean",
        edge_count: EdgeCount = "positions",
        void: Void = "clear",
        ignore_index: int = 255,
    ) -> None:
        super().__init__(num_classes, ignore_index, {"edge": edge_weight, "body": body_weight})
        check_positive(temperature=temperature)
        check_choice("class_reduction", class_reduction, get_args(ClassReduction))
        check_choice("edge_count", edge_count, get_args(EdgeCount))
        check_choice("void", void, get_args(Void))
        self.width = width
        self.temperature = temperature
        self.class_reduction: ClassReduction = class_reduction
        self.edge_count: EdgeCount = edge_count
        self.void: Void = void
        self.alpha: Tensor
        self.register_buffer("alpha", torch.as_tensor(alpha, dtype=torch.float32), persistent=False)
        if num_classes is not None:
            self.check_classes(num_classes)

    @classmethod
    def paper(cls, num_classes: int | None = None, *, ignore_index: int = 255) -> BPKDLoss:
        """The paper's setting: lambda_E = 50, lambda_B = 20, alpha = 2, k = 7, sum over classes."""
        return cls(num_classes, edge_weight=50, body_weight=20, class_reduction="sum", ignore_index=ignore_index)

    def check_classes(self, num_classes: int) -> None:
        """`alpha` is one number, or one for each class."""
        if self.alpha.shape not in ((), (num_classes,)):
            raise ValueError(
                f"Expected `alpha` to be one number or {num_classes}, but got {self.alpha.numel()} of them."
            )

    def terms(self, outputs: Outputs, labels: Tensor) -> Terms:
        """See `WeightedTerms.terms`; one trimap for both."""
        student, teacher = outputs.logits
        size = (student.shape[2], student.shape[3])
        masks = edge_masks(labels, outputs.num_classes, size, self.width, self.ignore_index, void=self.void)
        masks = masks.to(student.dtype)
        return {
            "edge": lambda: bpkd_edge(
                student,
                teacher,
                masks,
                alpha=self.alpha,
                temperature=self.temperature,
                class_reduction=self.class_reduction,
                edge_count=self.edge_count,
            ),
            "body": lambda: bpkd_body(student, teacher, masks, temperature=self.temperature),
        }
