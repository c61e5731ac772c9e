"""Canonical distillation of logits and features without changes to either (Ali et al., 2026, arXiv 2604.25530).

The study finds that these two terms, given equal time, give better results than losses made for segmentation. Its
weights, layer and projection are not known here; the terms below have the common forms.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.losses.divergence import pixel_kl
from bpkd_sdk.losses.method import OutputPair, WeightedLoss, check_positive, require_prepared
from bpkd_sdk.losses.tensors import build_projection


def feature_mse(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Compute the mean squared error over all elements, after a 1x1 convolution of the student's feature map.

    This is equation (2) of docs/methods/canonical.md, averaged over images.

    Args:
        student: Features (N, D_S, h, w), float32 or float64.
        teacher: Features (N, D_T, h, w); they receive no gradient.
        weight: Kernel of the convolution, (D_T, D_S, 1, 1).

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> import torch
        >>> feature_mse(torch.ones(1, 2, 1, 1), torch.ones(1, 1, 1, 1), torch.full((1, 2, 1, 1), 2.0)).item()
        9.0
    """
    return F.mse_loss(F.conv2d(student, weight), teacher)


class CanonicalKDLoss(WeightedLoss):
    """Plain logit and feature distillation: {"logit": ..., "feature": ...}.

    Args:
        num_classes: C, the number of classes; None takes it from the first logits.
        logit_weight: Weight of `pixel_kl`; 0 leaves the term out. On CamVid, with weight 5, the term was 25 for a fresh
            student and 4 for a student trained alone before, beside cross-entropies of 5.2 and 0.95.
        feature_weight: Weight of `feature_mse`; 0 leaves the term out. The term grows with the square of the teacher's
            features; with weight 1 it was 6 to 7 on CamVid. CIRKD's re-implementation has 10.
        temperature: T of the term on logits, above 0.
        ignore_index: Not used, because the method does not use labels.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import torch
        >>> from bpkd_sdk import SegmentationOutput
        >>> student = SegmentationOutput(torch.zeros(1, 2, 1, 1), {"neck": torch.ones(1, 4, 1, 1)})
        >>> teacher = SegmentationOutput(torch.zeros(1, 2, 1, 1), {"neck": torch.ones(1, 8, 1, 1)})
        >>> method = CanonicalKDLoss(2)
        >>> method.prepare(student, teacher)
        >>> sorted(method(student, teacher, torch.zeros(1, 1, 1, dtype=torch.uint8)))
        ['feature', 'logit']
    """

    name = "canonical"
    feature_terms = ("feature",)

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        logit_weight: float = 5.0,
        feature_weight: float = 1.0,
        temperature: float = 1.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(num_classes, ignore_index, {"logit": logit_weight, "feature": feature_weight})
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.projection: nn.Conv2d | None = None

    def build(self, outputs: OutputPair) -> None:
        """Build the projection if features are compared, see `DistillationLoss.prepare`."""
        if self.needs_features:
            self.projection = build_projection(*outputs.features)

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms, see `WeightedLoss.terms`."""
        terms = {}
        if self.weights["logit"]:
            terms["logit"] = pixel_kl(*outputs.logits, temperature=self.temperature)
        if self.weights["feature"]:
            terms["feature"] = feature_mse(*outputs.features, require_prepared(self.projection, self).weight)
        return terms
