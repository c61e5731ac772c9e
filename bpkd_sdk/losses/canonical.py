"""Canonical distillation: logits and features as they are (Ali et al., 2026, arXiv 2604.25530).

The study finds that these two, given equal time, beat losses made for segmentation. Its weights, layer and projection
are not known here; the forms below are the common ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.losses.method import (
    DistillationLoss,
    built,
    check_batch,
    check_not_negative,
    check_positive,
    full_precision,
    paired_features,
    paired_logits,
    projection,
)
from bpkd_sdk.losses.pixel import pixel_kl
from bpkd_sdk.output import SegmentationOutput


def feature_mse(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error over all elements, after a 1x1 convolution of the student's feature map.

    Args:
        student: (N, D_S, h, w), float32 or float64.
        teacher: (N, D_T, h, w), constant.
        weight: (D_T, D_S, 1, 1).

    Returns:
        Scalar, 0 or above.
    """
    return F.mse_loss(F.conv2d(student, weight), teacher)


class CanonicalKDLoss(DistillationLoss):
    """Plain logit and feature distillation: {"logit": ..., "feature": ...}.

    Args:
        num_classes: C.
        logit_weight: Of `pixel_kl`; a weight of 0 leaves a term out. 5 did better than 1 on CamVid, where it makes 1.7
            for a student trained alone, beside a cross-entropy of 0.65.
        feature_weight: Of `feature_mse`, which grows with the square of the teacher's features: 1 made 3 to 6 on
            CamVid, and a gradient once or twice the cross-entropy's. CIRKD's re-implementation has 10.
        temperature: T of the logits' term.
        ignore_index: Not used: the method sees no labels.

    Raises:
        ValueError: For a value out of its range.

    Example:
        >>> import torch
        >>> student = SegmentationOutput(torch.zeros(1, 2, 1, 1), {"neck": torch.ones(1, 4, 1, 1)})
        >>> teacher = SegmentationOutput(torch.zeros(1, 2, 1, 1), {"neck": torch.ones(1, 8, 1, 1)})
        >>> method = CanonicalKDLoss(2)
        >>> method.prepare(student, teacher)
        >>> sorted(method(student, teacher, torch.zeros(1, 1, 1, dtype=torch.uint8)))
        ['feature', 'logit']
    """

    def __init__(
        self,
        num_classes: int,
        *,
        logit_weight: float = 5.0,
        feature_weight: float = 1.0,
        temperature: float = 1.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_not_negative(logit_weight=logit_weight, feature_weight=feature_weight)
        check_positive(temperature=temperature)
        self.num_classes = num_classes
        self.logit_weight = logit_weight
        self.feature_weight = feature_weight
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.needs_features = feature_weight > 0
        self.projection: nn.Conv2d | None = None

    def prepare(self, student: SegmentationOutput, teacher: SegmentationOutput) -> None:
        """Build the projection; see `DistillationLoss.prepare`."""
        if self.needs_features:
            self.projection = projection(*paired_features(student, teacher))

    def forward(
        self, student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """See `DistillationLoss.forward`."""
        z_student, z_teacher = paired_logits(student, teacher)
        check_batch(z_student, labels, self.num_classes)
        terms = {}
        with full_precision(z_student):
            if self.logit_weight:
                terms["logit"] = self.logit_weight * pixel_kl(z_student, z_teacher, temperature=self.temperature)
            if self.feature_weight:
                weight = built(self.projection, self).weight
                terms["feature"] = self.feature_weight * feature_mse(*paired_features(student, teacher), weight)
        return terms
