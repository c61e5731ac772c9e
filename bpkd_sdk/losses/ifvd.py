"""IFVD: intra-class feature variation distillation (Wang et al., ECCV 2020).

How far each position lies from the mean feature of its own class, in the student as in the teacher. The official code
goes through all classes, each time over the whole feature map; here all classes come from one matrix product, and
nothing is larger than the features or the logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.boundary import check_labels
from bpkd_sdk.losses.critic import AdversarialTerms, CriticLoss
from bpkd_sdk.losses.divergence import pixel_kl
from bpkd_sdk.losses.method import Outputs, Terms, labels_at


def class_cosine(features: Tensor, members: Tensor) -> Tensor:
    """The cosine of each feature with the mean of its own class in the same image.

    Args:
        features: (N, D, M), float32 or float64.
        members: (N, C, M), 1 where a position is of a class and 0 elsewhere, in the dtype of the features; all 0 where
            it is of none.

    Returns:
        (N, M) in [-1, 1]; 0 where a position is of no class.

    Example:
        >>> features = torch.tensor([[[1.0, 0.0, 3.0], [0.0, 1.0, 0.0]]])
        >>> class_cosine(features, torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])).tolist()
        [[0.7071067690849304, 0.7071067690849304, 1.0]]
    """
    # A cosine does not see the length of the mean, so the sum stands in for it.
    centres = F.normalize(features @ members.mT, dim=1, eps=1e-8)
    projected = ((centres.mT @ features) * members).sum(1)
    # An image at a time: the squares of all would be a second copy of the features.
    squared = torch.stack([torch.linalg.vecdot(image, image, dim=0) for image in features])
    return projected / squared.clamp(min=1e-16).sqrt()


def feature_variation(
    student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = 255
) -> Tensor:
    """L_ifv = 1 / (N h w) sum over images and positions of (v^S - v^T)^2, v the cosine with the own class's mean.

    Means are per image, and gradients flow through them. Void positions add nothing, but are counted. Each position
    takes its label by floor-nearest, as in the authors' code: at stride s the label's pixel lies (s - 1) / 2 pixels
    above and to the left of the position's centre, see `labels_at`.

    Args:
        student: Features (N, D_S, h, w), float32 or float64.
        teacher: Features (N, D_T, h, w), constant.
        labels: (N, H, W) integers in [0, num_classes) or `ignore_index`.
        num_classes: C, 1 to 256.
        ignore_index: The void label.

    Returns:
        Scalar, 0 or above.
    """
    check_labels(labels, num_classes, ignore_index)
    classes = labels_at(labels, (student.shape[2], student.shape[3])).flatten(1)
    index = torch.arange(num_classes, device=classes.device).unsqueeze(1)
    members = ((classes.unsqueeze(1) == index) & (classes.unsqueeze(1) != ignore_index)).to(student.dtype)
    student_cosine, teacher_cosine = (class_cosine(features.flatten(2), members) for features in (student, teacher))
    return (student_cosine - teacher_cosine).square().mean()


class IFVDLoss(AdversarialTerms):
    """Intra-class feature variation distillation: {"kd": ..., "variation": ..., "adversarial": ...}.

    Args:
        num_classes: C; None: that of the first logits.
        kd_weight: Of `pixel_kl` at T = 1; a weight of 0 leaves a term out. As in `CanonicalKDLoss`; the official 10
            counts from a mean over all elements, so that it is 10 / C here.
        variation_weight: Of `feature_variation`, lambda_ifv. The official code's 200 made 0.7 (student trained alone)
            to 1.9 (fresh student) on CamVid; the paper's text says 50.
        adversarial_weight: Of the critic's term, see `bpkd_sdk.losses.critic`. As in `SKDSLoss`; officially 0.001, with
            WGAN-GP.
        critic_loss: See `bpkd_sdk.losses.critic`. "hinge" costs no second derivative.
        ignore_index: The void label.

    Raises:
        ValueError: For a value out of its range.

    Example:
        >>> from bpkd_sdk import SegmentationOutput
        >>> labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> student, teacher = (
        ...     SegmentationOutput(torch.zeros(1, 3, 4, 4), {"neck": torch.ones(1, width, 4, 4)}) for width in (4, 8)
        ... )
        >>> terms = IFVDLoss(3, adversarial_weight=0)(student, teacher, labels)
        >>> {name: round(term.item(), 4) for name, term in terms.items()}
        {'kd': 0.0, 'variation': 0.0}
    """

    name = "ifvd"
    feature_terms = ("variation",)

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        kd_weight: float = 5.0,
        variation_weight: float = 200.0,
        adversarial_weight: float = 0.1,
        critic_loss: CriticLoss = "hinge",
        ignore_index: int = 255,
    ) -> None:
        weights = {"kd": kd_weight, "variation": variation_weight, "adversarial": adversarial_weight}
        super().__init__(num_classes, ignore_index, weights, critic_loss)

    @classmethod
    def paper(cls, num_classes: int, *, ignore_index: int = 255) -> IFVDLoss:
        """The official code's setting: 10 for KD averaged over all elements, 200 (50 in the text), 0.001, WGAN-GP."""
        return cls(
            num_classes,
            kd_weight=10 / num_classes,
            variation_weight=200,
            adversarial_weight=0.001,
            critic_loss="wgan-gp",
            ignore_index=ignore_index,
        )

    def terms(self, outputs: Outputs, labels: Tensor) -> Terms:
        """See `WeightedTerms.terms`. In training mode the critic makes a step of its own before it judges."""
        return {
            "kd": lambda: pixel_kl(*outputs.logits),
            "variation": lambda: feature_variation(
                *outputs.features, labels, outputs.num_classes, ignore_index=self.ignore_index
            ),
            "adversarial": lambda: self.adversary(*outputs.logits),
        }
