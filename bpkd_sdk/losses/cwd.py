"""CWD: channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

Each channel of a map is a distribution over positions; the student's is brought to the teacher's. The map is the
logits, or a feature map of the student projected to the teacher's channels.
"""

from __future__ import annotations

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
from bpkd_sdk.output import SegmentationOutput


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


class CWDLoss(DistillationLoss):
    """Channel-wise distillation: {"logit": ...}, and {"feature": ...} where asked for.

    Args:
        num_classes: C.
        weight: Of the logits' term; a weight of 0 leaves a term out. 5, from the code base of BPKD's
            authors, did better than nothing on CamVid, and 20 better still; it makes 8 for a student trained alone.
        feature_weight: Of the term on the last feature map, through a learned 1x1 projection without bias.
        temperature: T of both terms.
        ignore_index: Not used: the method sees no labels.

    Raises:
        ValueError: For a value out of its range.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[4.0, 0.0], [0.0, 4.0]]).view(1, 2, 1, 2)
        >>> terms = CWDLoss(2, weight=1)(torch.zeros(1, 2, 1, 2), teacher, torch.zeros(1, 1, 2, dtype=torch.uint8))
        >>> {name: round(term.item(), 4) for name, term in terms.items()}
        {'logit': 0.6031}
    """

    def __init__(
        self,
        num_classes: int,
        *,
        weight: float = 5.0,
        feature_weight: float = 0.0,
        temperature: float = 1.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_not_negative(weight=weight, feature_weight=feature_weight)
        check_positive(temperature=temperature)
        self.num_classes = num_classes
        self.weight = weight
        self.feature_weight = feature_weight
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.needs_features = feature_weight > 0
        self.projection: nn.Conv2d | None = None

    @classmethod
    def paper(cls, num_classes: int, *, ignore_index: int = 255) -> CWDLoss:
        """Logits and feature map at T = 4 with weights 3 and 50, as CIRKD's scripts run it (beside KD and a critic)."""
        return cls(num_classes, weight=3, feature_weight=50, temperature=4, ignore_index=ignore_index)

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
            if self.weight:
                terms["logit"] = self.weight * channel_kl(z_student, z_teacher, temperature=self.temperature)
            if self.feature_weight:
                f_student, f_teacher = paired_features(student, teacher)
                projected = built(self.projection, self)(f_student)
                terms["feature"] = self.feature_weight * channel_kl(projected, f_teacher, temperature=self.temperature)
        return terms
