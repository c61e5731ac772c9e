"""IFVD: intra-class feature variation distillation (Wang et al., ECCV 2020).

The variation term compares, between student and teacher, how far the feature of each position is from the mean feature
of its class. The official code loops over the classes and processes the whole feature map for each. Here one matrix
product covers all classes, and no intermediate tensor is larger than the features or the logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.boundary import check_labels
from bpkd_sdk.losses.critic import Adversary, CriticLoss
from bpkd_sdk.losses.divergence import pixel_kl
from bpkd_sdk.losses.method import OutputPair, WeightedLoss
from bpkd_sdk.losses.tensors import downsample_labels


def class_cosine(features: Tensor, members: Tensor) -> Tensor:
    """Compute the cosine of each feature with the mean feature of its class in the same image.

    This is v of equation (1) of docs/methods/ifvd.md.

    Args:
        features: (N, D, M) at M positions, float32 or float64.
        members: One-hot classes (N, C, M) in the dtype of the features; all 0 at a position without a class.

    Returns:
        (N, M) in [-1, 1]; 0 at a position without a class.

    Examples:
        >>> features = torch.tensor([[[1.0, 0.0, 3.0], [0.0, 1.0, 0.0]]])
        >>> class_cosine(features, torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])).tolist()
        [[0.7071067690849304, 0.7071067690849304, 1.0]]
    """
    # The sum replaces the mean: the cosine does not depend on the length of a vector.
    centres = F.normalize(features @ members.mT, dim=1, eps=1e-8)
    projected = ((centres.mT @ features) * members).sum(1)
    # One image at a time, because the squares of all images would be a second copy of the features.
    squared = torch.stack([torch.linalg.vecdot(image, image, dim=0) for image in features])
    return projected / squared.clamp(min=1e-16).sqrt()


def feature_variation(
    student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = 255
) -> Tensor:
    """Compute L_ifv = 1 / (N h w) sum of (v^S - v^T)^2 over images and positions; v is `class_cosine`.

    This is equation (2) of docs/methods/ifvd.md, averaged over images. Class means are per image, and gradients flow
    through them. A void position adds 0 to the sum and 1 to the count. The label of a position is the floor-nearest
    one, as in the authors' code: at stride s it lies (s - 1) / 2 pixels above and to the left of the position's
    centre, see `downsample_labels`.

    Args:
        student: Features (N, D_S, h, w), float32 or float64.
        teacher: Features (N, D_T, h, w); they receive no gradient.
        labels: (N, H, W) integers in [0, num_classes) or `ignore_index`.
        num_classes: C, 1 to 256.
        ignore_index: Label of void pixels.

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> student, teacher = torch.ones(1, 2, 1, 2), torch.eye(2).view(1, 2, 1, 2)
        >>> round(feature_variation(student, teacher, torch.zeros(1, 1, 2, dtype=torch.uint8), 1).item(), 4)
        0.0858
    """
    check_labels(labels, num_classes, ignore_index)
    classes = downsample_labels(labels, (student.shape[2], student.shape[3])).flatten(1)
    index = torch.arange(num_classes, device=classes.device).unsqueeze(1)
    members = ((classes.unsqueeze(1) == index) & (classes.unsqueeze(1) != ignore_index)).to(student.dtype)
    student_cosine, teacher_cosine = (class_cosine(features.flatten(2), members) for features in (student, teacher))
    return (student_cosine - teacher_cosine).square().mean()


class IFVDLoss(WeightedLoss):
    """Intra-class feature variation distillation: {"kd": ..., "variation": ..., "adversarial": ...}.

    Args:
        num_classes: C, the number of classes; None takes it from the first logits.
        kd_weight: Weight of `pixel_kl` at T = 1; 0 leaves the term out. The default is that of `CanonicalKDLoss`. The
            official weight is 10 for a mean over all elements, which equals 10 / C here.
        variation_weight: lambda_ifv, weight of `feature_variation`; 0 leaves the term out. With the official code's 200
            the term was 0.7 (student trained alone before) to 1.9 (fresh student) on CamVid. The paper's text has 50.
        adversarial_weight: Weight of the critic's term, see `bpkd_sdk.losses.critic`; 0 leaves the term and the critic
            out. The default is that of `SKDSLoss`; the official weight is 0.001, with WGAN-GP.
        critic_loss: Loss of the critic, see `bpkd_sdk.losses.critic`. "hinge" requires no second derivative.
        ignore_index: Label of void pixels.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
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
        super().__init__(num_classes, ignore_index, weights)
        self.critic_loss: CriticLoss = critic_loss
        self.adversary = Adversary(critic_loss)

    @classmethod
    def paper(cls, num_classes: int, *, ignore_index: int = 255) -> IFVDLoss:
        """Create the method with the official code's setting.

        The weights are 10 for KD averaged over all elements, 200 for the variation (50 in the paper's text) and 0.001
        for a critic of WGAN-GP.
        """
        return cls(
            num_classes,
            kd_weight=10 / num_classes,
            variation_weight=200,
            adversarial_weight=0.001,
            critic_loss="wgan-gp",
            ignore_index=ignore_index,
        )

    def build(self, outputs: OutputPair) -> None:
        """Build the critic if its term is computed, see `DistillationLoss.prepare`."""
        if self.weights["adversarial"]:
            self.adversary.build(outputs.logits[0])

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms, see `WeightedLoss.terms`. In training mode the critic makes one step before it scores."""
        terms = {}
        if self.weights["kd"]:
            terms["kd"] = pixel_kl(*outputs.logits)
        if self.weights["variation"]:
            terms["variation"] = feature_variation(
                *outputs.features, labels, outputs.num_classes, ignore_index=self.ignore_index
            )
        if self.weights["adversarial"]:
            terms["adversarial"] = self.adversary(*outputs.logits)
        return terms
