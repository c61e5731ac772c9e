"""DIST: distillation of relations by Pearson's correlation (Huang et al., NeurIPS 2022, arXiv 2205.10536).

The student need not match the teacher's probabilities, only their relations: at each position between the classes, and
for each class between the positions. A correlation does not change when the probabilities are shifted, or scaled about
their mean. The terms have no parameters and are between 0 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bpkd_sdk.losses.method import OutputPair, WeightedLoss, check_positive

_EPS = 1e-8  # added to each product of norms, as in the authors' code


def inter_class_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 minus the correlation over classes at each position, mean over positions and images.

    This is equation (2) of docs/methods/dist.md.

    Args:
        student: Probabilities (N, C, h, w), float32 or float64.
        teacher: Probabilities (N, C, h, w); they receive no gradient.

    Returns:
        Scalar in [0, 2]. With two classes a correlation over classes is 1 or -1, so that the gradient is 0.

    Examples:
        >>> student, teacher = (torch.tensor(p).view(1, 3, 1, 1) for p in ([0.5, 0.3, 0.2], [0.8, 0.1, 0.1]))
        >>> round(inter_class_distance(student, teacher).item(), 4)
        0.0551
    """
    return 1 - correlation(student, teacher, (1,)).mean()


def intra_class_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 minus the correlation over all positions of all images, mean over classes.

    This is equation (3) of docs/methods/dist.md.

    Args:
        student: Probabilities (N, C, h, w), float32 or float64.
        teacher: Probabilities (N, C, h, w); they receive no gradient.

    Returns:
        Scalar in [0, 2].

    Examples:
        >>> student, teacher = (torch.tensor(p).view(1, 1, 1, 3) for p in ([0.5, 0.3, 0.2], [0.8, 0.1, 0.1]))
        >>> round(intra_class_distance(student, teacher).item(), 4)
        0.0551
    """
    return 1 - correlation(student, teacher, (0, 2, 3)).mean()


def correlation(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Compute Pearson's correlation of two tensors of one shape along some dimensions; 0 where one is constant.

    Examples:
        >>> a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
        >>> correlation(a, torch.tensor([[30.0, 20.0, 10.0], [1.0, 2.0, 4.0]]), (1,)).tolist()
        [-1.0, 0.0]
    """
    a, b = (x - x.mean(dims, keepdim=True) for x in (a, b))
    norms: Tensor = torch.linalg.vector_norm(a, dim=dims) * torch.linalg.vector_norm(b, dim=dims)
    return (a * b).sum(dims) / (norms + _EPS)


class DISTLoss(WeightedLoss):
    """Distillation of the relations between classes and between positions: {"inter": ..., "intra": ...}.

    Args:
        num_classes: C, the number of classes; None takes it from the first logits.
        inter_weight: Weight of `inter_class_distance`; 0 leaves the term out. With two classes it has no gradient.
        intra_weight: Weight of `intra_class_distance`; 0 leaves the term out.
        temperature: T, above 0; the probabilities are softmax(z / T). The terms are not multiplied by T^2.
        ignore_index: Not used, because the method does not use labels.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> teacher = torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.0, 1.0]]).view(1, 3, 1, 2)
        >>> terms = DISTLoss(3)(teacher.flip(3), teacher, torch.zeros(1, 1, 2, dtype=torch.uint8))
        >>> {name: round(term.item(), 4) for name, term in terms.items()}
        {'inter': 1.5242, 'intra': 2.0}
    """

    name = "dist"

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        temperature: float = 1.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(num_classes, ignore_index, {"inter": inter_weight, "intra": intra_weight})
        check_positive(temperature=temperature)
        self.temperature = temperature

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms, see `WeightedLoss.terms`."""
        student, teacher = ((logits / self.temperature).softmax(1) for logits in outputs.logits)
        terms = {}
        if self.weights["inter"]:
            terms["inter"] = inter_class_distance(student, teacher)
        if self.weights["intra"]:
            terms["intra"] = intra_class_distance(student, teacher)
        return terms
