"""CWD: channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

Each channel of a map is a distribution over positions; the student's is brought to the teacher's. The map is the
logits, or a feature map of the student projected to the teacher's channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from bpkd_sdk.losses.divergence import softmax_kl
from bpkd_sdk.losses.method import Outputs, Terms, WeightedTerms, built, check_positive, projection


def channel_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """KL between the spatial distributions of each channel: T^2 / (N C) sum_{n,c} KL(softmax_i(t/T) || softmax_i(s/T)).

    Args:
        student: (N, C, h, w), float32 or float64.
        teacher: (N, C, h, w), constant.
        temperature: T, above 0.
        mask: (N, C, h, w), constant: what s and t are multiplied with first; None: 1.

    Returns:
        Scalar, 0 or above.
    """
    mask = None if mask is None else mask.flatten(2)
    divergence = softmax_kl(student.flatten(2), teacher.flatten(2), dim=2, temperature=temperature, mask=mask)
    return temperature**2 * divergence.mean()


class CWDLoss(WeightedTerms):
    """Channel-wise distillation: {"logit": ...}, and {"feature": ...} where asked for.

    Args:
        num_classes: C; None: that of the first logits.
        weight: Of the logits' term; a weight of 0 leaves a term out. On CamVid, in short schedules, 2 did better than
            1, and 1 better than 5, which is from the code base of BPKD's authors.
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
        """Logits and feature map at T = 4 with weights 3 and 50, as CIRKD's scripts run it (beside KD and a critic)."""
        return cls(num_classes, weight=3, feature_weight=50, temperature=4, ignore_index=ignore_index)

    def build(self, outputs: Outputs) -> None:
        """The projection; see `DistillationLoss.prepare`."""
        if self.needs_features:
            self.projection = projection(*outputs.features)

    def terms(self, outputs: Outputs, labels: Tensor) -> Terms:
        """See `WeightedTerms.terms`."""
        return {
            "logit": lambda: channel_kl(*outputs.logits, temperature=self.temperature),
            "feature": lambda: self._feature(*outputs.features),
        }

    def _feature(self, student: Tensor, teacher: Tensor) -> Tensor:
        return channel_kl(built(self.projection, self)(student), teacher, temperature=self.temperature)
