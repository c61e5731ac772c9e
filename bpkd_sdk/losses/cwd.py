"""CWD: channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

A softmax over positions makes each channel of a map a distribution. The student's distributions are trained to match
the teacher's. The map is the logits, or the student's feature map projected to the teacher's channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from bpkd_sdk.losses.divergence import softmax_kl
from bpkd_sdk.losses.method import OutputPair, WeightedLoss, check_positive, require_prepared
from bpkd_sdk.losses.tensors import build_projection


def channel_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Compute T^2 / (N C) sum KL(softmax_i(t / T) || softmax_i(s / T)) over images and channels; i are positions.

    This is equation (2) of docs/methods/cwd.md, averaged over images.

    Args:
        student: s, (N, C, h, w), float32 or float64.
        teacher: t, (N, C, h, w); it receives no gradient.
        temperature: T, above 0.
        mask: Factor (N, C, h, w) that s and t are multiplied by before the softmax, without gradient; None is 1.

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> import torch
        >>> round(channel_kl(torch.zeros(1, 1, 1, 2), torch.tensor([2.0, 0.0]).view(1, 1, 1, 2)).item(), 4)
        0.3278
    """
    mask = None if mask is None else mask.flatten(2)
    divergence = softmax_kl(student.flatten(2), teacher.flatten(2), dim=2, temperature=temperature, mask=mask)
    return temperature**2 * divergence.mean()


class CWDLoss(WeightedLoss):
    """Channel-wise distillation: {"logit": ..., "feature": ...}.

    Args:
        num_classes: C, the number of classes; None takes it from the first logits.
        weight: Weight of the term on logits; 0 leaves the term out. On CamVid, in short schedules, 2 gave better
            results than 1, and 1 better results than 5, the weight in the code base of BPKD's authors.
        feature_weight: Weight of the term on the last feature map, which a learned 1x1 convolution without bias
            projects to the teacher's channels; 0 leaves the term out.
        temperature: T of both terms, above 0.
        ignore_index: Not used, because the method does not use labels.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import torch
        >>> teacher = torch.tensor([[4.0, 0.0], [0.0, 4.0]]).view(1, 2, 1, 2)
        >>> terms = CWDLoss(2, weight=1)(torch.zeros(1, 2, 1, 2), teacher, torch.zeros(1, 1, 2, dtype=torch.uint8))
        >>> {name: round(term.item(), 4) for name, term in terms.items()}
        {'logit': 0.6031}
    """

    name = "cwd"
    feature_terms = ("feature",)

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        weight: float = 2.0,
        feature_weight: float = 0.0,
        temperature: float = 1.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(num_classes, ignore_index, {"logit": weight, "feature": feature_weight})
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.projection: nn.Conv2d | None = None

    @classmethod
    def paper(cls, num_classes: int | None = None, *, ignore_index: int = 255) -> CWDLoss:
        """Create the method with the setting of CIRKD's scripts: logits and features, weights 3 and 50, T = 4.

        Those scripts add pixel-wise KL and a critic, which are not part of this method.
        """
        return cls(num_classes, weight=3, feature_weight=50, temperature=4, ignore_index=ignore_index)

    def build(self, outputs: OutputPair) -> None:
        """Build the projection if features are compared, see `DistillationLoss.prepare`."""
        if self.needs_features:
            self.projection = build_projection(*outputs.features)

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms, see `WeightedLoss.terms`."""
        terms = {}
        if self.weights["logit"]:
            terms["logit"] = channel_kl(*outputs.logits, temperature=self.temperature)
        if self.weights["feature"]:
            student, teacher = outputs.features
            projected = require_prepared(self.projection, self)(student)
            terms["feature"] = channel_kl(projected, teacher, temperature=self.temperature)
        return terms
