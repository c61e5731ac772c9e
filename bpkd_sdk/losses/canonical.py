"""Canonical distillation: logits and features as they are (Ali et al., 2026, arXiv 2604.25530).

The study finds that these two, given equal time, beat losses made for segmentation. Its weights, layer and projection
are not known here; the forms below are the common ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.losses.divergence import pixel_kl
from bpkd_sdk.losses.method import Outputs, Terms, WeightedTerms, built, check_positive, projection


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


class CanonicalKDLoss(WeightedTerms):
    """Plain logit and feature distillation: {"logit": ..., "feature": ...}.

    Args:
        num_classes: C; None: that of the first logits.
        logit_weight: Of `pixel_kl`; a weight of 0 leaves a term out. On CamVid 5 made 25 for a fresh student and 4 for
            one trained alone, beside cross-entropies of 5.2 and 0.95.
        feature_weight: Of `feature_mse`, which grows with the square of the teacher's features: 1 made 6 to 7 on
            CamVid. CIRKD's re-implementation has 10.
        temperature: T of the logits' term.
        ignore_index: Not used: the method sees no labels.

    Raises:
        ValueError: For a value out of its range.

    Example:
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

    def build(self, outputs: Outputs) -> None:
        """The projection; see `DistillationLoss.prepare`."""
        if self.needs_features:
            self.projection = projection(*outputs.features)

    def terms(self, outputs: Outputs, labels: Tensor) -> Terms:
        """See `WeightedTerms.terms`."""
        return {
            "logit": lambda: pixel_kl(*outputs.logits, temperature=self.temperature),
            "feature": lambda: feature_mse(*outputs.features, built(self.projection, self).weight),
        }
