"""BPKD: boundary-privileged knowledge distillation (Liu et al., WACV 2024, arXiv 2306.08075).

The edges and the bodies of objects are distilled by different losses. A soft trimap M (N, C, h, w), which
`bpkd_sdk.boundary.edge_masks` computes, splits the logits z of both networks into Z_E = z M and Z_B = z (1 - M). The
edge term compares, at each position, the distributions over classes. The body term compares, for each class, the
distributions over positions. The paper leaves some details open; each of them is an argument of `BPKDLoss`.
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
from bpkd_sdk.losses.method import OutputPair, WeightedLoss, check_positive

ClassReduction = Literal["mean", "sum", "pooled"]
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
    """Compute the edge term: L_E = mean over images of sum_c alpha_c / n_c sum_i phi_i M[c, i].

    phi_i = KL(softmax_c(Z_E^T / T) || softmax_c(Z_E^S / T)) at position i. The logits are multiplied by M before the
    softmax (pre-mask), and phi is multiplied by M of each class again (post-mask). These are equations (2) and (3) of
    docs/methods/bpkd.md. The term is not multiplied by T^2.

    Args:
        student: Logits (N, C, h, w), float32 or float64.
        teacher: Logits (N, C, h, w); they receive no gradient.
        masks: M, (N, C, h, w) in [0, 1].
        alpha: Weight of the classes, one number or (C,).
        temperature: T, above 0.
        class_reduction: "sum" over the classes; "mean" over the classes that have an edge in the image; or "pooled",
            the sum with one divisor for all classes, sum_c n_c instead of n_c.
        edge_count: Definition of n_c: the number of "positions" with M > 0, or their "mass" sum_i M; at least 1.

    Returns:
        Scalar, 0 or above; 0 with zero gradient if no image has an edge.

    Examples:
        >>> student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([2.0, 0.0, 0.0, 0.0]).view(1, 2, 1, 2)
        >>> round(bpkd_edge(student, teacher, torch.ones(1, 2, 1, 2)).item(), 4)
        0.3278
        >>> bpkd_edge(student, teacher, torch.zeros(1, 2, 1, 2)).item()
        0.0
    """
    z_student, z_teacher, m = (x.flatten(2) for x in (student, teacher, masks))
    divergence = masked_class_kl if masks.device.type == "cpu" else dense_class_kl
    phi = divergence(z_student, z_teacher, m, temperature)
    weight = post_mask(masks, alpha=alpha, class_reduction=class_reduction, edge_count=edge_count)
    return (phi * weight).sum() / len(student)


def dense_class_kl(student: Tensor, teacher: Tensor, masks: Tensor, temperature: float) -> Tensor:
    """Compute phi of `bpkd_edge` at every position, from all logits: (N, P).

    The arguments are those of `bpkd_edge`, with tensors (N, C, P). No operation waits for the device.
    """
    return softmax_kl(student, teacher, dim=1, temperature=temperature, mask=masks)


def masked_class_kl(student: Tensor, teacher: Tensor, masks: Tensor, temperature: float) -> Tensor:
    """Compute phi of `bpkd_edge` at every position, from the logits whose mask is above 0: (N, P).

    The arguments are those of `dense_class_kl`. A position has few classes with an edge. All others have the logit 0:
    together they add their number to the sum of exponentials, and have no gradient.
    """
    count, classes, positions = masks.shape
    entry = masks.flatten().nonzero().squeeze(1)
    position = entry // (classes * positions) * positions + entry % positions
    factor = masks.flatten()[entry] / temperature
    s, t = (logits.flatten()[entry] * factor for logits in (student, teacher.detach()))
    zeros = factor.new_zeros(count * positions)
    others = classes - zeros.index_add(0, position, torch.ones_like(factor))

    def log_sum(z: Tensor) -> Tensor:
        """Return log(sum of exp) over the classes of each position, relative to the largest logit."""
        lowest = zeros.masked_fill(others == 0, -torch.inf)  # the logit of the other classes, if there are any
        largest = lowest.scatter_reduce(0, position, z.detach(), "amax")
        total = zeros.index_add(0, position, (z - largest[position]).exp())
        return largest + (total + others * (-largest.clamp(min=0)).exp()).log()

    log_s, log_t = log_sum(s), log_sum(t)
    expected = zeros.index_add(0, position, (t - log_t[position]).exp() * (t - s))
    return (expected + log_s - log_t).view(count, positions)


def post_mask(
    masks: Tensor, *, alpha: Tensor | float, class_reduction: ClassReduction, edge_count: EdgeCount
) -> Tensor:
    """Compute the factor of phi at each position in the edge term: sum_c alpha_c / n_c M[c, i].

    The arguments are those of `bpkd_edge`.

    Returns:
        (N, h w), 0 or above.

    Examples:
        >>> masks = torch.tensor([[1.0, 0.5], [0.0, 0.0]]).view(1, 2, 1, 2)
        >>> post_mask(masks, alpha=2.0, class_reduction="mean", edge_count="positions").tolist()
        [[1.0, 0.5]]
    """
    positions = masks.ceil().sum((2, 3))  # three times as fast as the sum of `masks > 0`
    count = positions if edge_count == "positions" else masks.sum((2, 3))
    if class_reduction == "pooled":
        count = count.sum(1, keepdim=True).expand_as(count)
    class_weight = torch.as_tensor(alpha, dtype=masks.dtype, device=masks.device) / count.clamp(min=1)
    if class_reduction == "mean":
        class_weight = class_weight / (positions > 0).sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("nc,nci->ni", class_weight, masks.flatten(2))


def bpkd_body(student: Tensor, teacher: Tensor, masks: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the body term: L_B = T^2 / C sum_c KL(softmax_i(Z_B^T / T) || softmax_i(Z_B^S / T)), mean over images.

    This is equation (4) of docs/methods/bpkd.md. Edge positions take part in the softmax; their logits are scaled
    towards 0.

    Args:
        student: Logits (N, C, h, w), float32 or float64.
        teacher: Logits (N, C, h, w); they receive no gradient.
        masks: M, (N, C, h, w) in [0, 1].
        temperature: T, above 0.

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([2.0, 0.0]).view(1, 1, 1, 2)
        >>> round(bpkd_body(student, teacher, torch.zeros(1, 1, 1, 2)).item(), 4)
        0.3278
    """
    return channel_kl(student, teacher, temperature=temperature, mask=1 - masks)


class BPKDLoss(WeightedLoss):
    """Boundary-privileged distillation of logits: {"edge": ..., "body": ...}.

    The defaults are those that gave the best results on real images in short schedules (docs/results.md): the mean over
    the classes that are present, with weights 1 and 2. `BPKDLoss.paper` has the paper's weights and the one divisor of
    its figure; its terms start well above the cross-entropy. The sizes of the terms of all methods are in
    docs/methods/README.md.

    Args:
        num_classes: C, the number of classes, at most 256; None takes it from the first logits.
        width: k, side of the trimap's window in pixels of the labels, odd.
        edge_weight: lambda_E, weight of the edge term; 0 leaves the term out.
        body_weight: lambda_B, weight of the body term; 0 leaves the term out.
        alpha: Weight of each class in the edge term, one number or C numbers.
        temperature: T of both terms, above 0. The paper does not state it; the code base of its authors uses 1.
        class_reduction: "mean", "sum" or "pooled", see `bpkd_edge`. The paper's figure shows "pooled".
        edge_count: Definition of n_c, see `bpkd_edge`.
        void: Treatment of edges near void, see `bpkd_sdk.boundary.edge_masks`.
        ignore_index: Label of void pixels.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
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
            self.check_num_classes(num_classes)

    @classmethod
    def paper(cls, num_classes: int | None = None, *, ignore_index: int = 255) -> BPKDLoss:
        """Create the method with the paper's setting: lambda_E 50, lambda_B 20, alpha 2, k 7, pooled over classes."""
        return cls(num_classes, edge_weight=50, body_weight=20, class_reduction="pooled", ignore_index=ignore_index)

    def check_num_classes(self, num_classes: int) -> None:
        """Raise ValueError unless `alpha` is one number, or one number for each class."""
        if self.alpha.shape not in ((), (num_classes,)):
            raise ValueError(
                f"Expected `alpha` to be one number or {num_classes} numbers, one for each class, but got "
                f"{self.alpha.numel()} of them."
            )

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        """Compute both terms from one trimap, see `WeightedLoss.terms`."""
        student, teacher = outputs.logits
        size = (student.shape[2], student.shape[3])
        masks = edge_masks(labels, outputs.num_classes, size, self.width, self.ignore_index, void=self.void)
        masks = masks.to(student.dtype)
        terms = {}
        if self.weights["edge"]:
            terms["edge"] = bpkd_edge(
                student,
                teacher,
                masks,
                alpha=self.alpha,
                temperature=self.temperature,
                class_reduction=self.class_reduction,
                edge_count=self.edge_count,
            )
        if self.weights["body"]:
            terms["body"] = bpkd_body(student, teacher, masks, temperature=self.temperature)
        return terms
