"""SKDS: structured knowledge distillation (Liu et al., CVPR 2019; TPAMI, arXiv 1903.04197).

The pixel-wise term compares each position's distribution over classes. The pair-wise term compares the similarities of
all pairs of cells of the last feature map. The holistic term is the score of a critic, which is trained to distinguish
the student's logits from the teacher's.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.errors import check_choice
from bpkd_sdk.losses.critic import Adversary, CriticLoss
from bpkd_sdk.losses.divergence import pixel_kl
from bpkd_sdk.losses.method import OutputPair, WeightedLoss
from bpkd_sdk.losses.similarity import gram_mse

PixelLoss = Literal["kl", "cross_entropy"]


def pixel_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the official pixel-wise term: 1 / (h w) sum of CE(softmax_c(t), softmax_c(s)) over images and positions.

    The term equals N times `pixel_kl` plus the teacher's entropy, which is constant. Its gradient is N times that of
    `pixel_kl`, but its value does not become 0.

    Args:
        student: Logits (N, C, h, w), float32 or float64.
        teacher: Logits (N, C, h, w); they receive no gradient.

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> round(pixel_cross_entropy(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)).item(), 4)
        0.6931
    """
    return -(teacher.softmax(1) * student.log_softmax(1)).sum((0, 1)).mean()


def pair_similarity(student: Tensor, teacher: Tensor, *, pool: int | float = 2, constant_norm: bool = False) -> Tensor:
    """Compute the mean squared difference of the cosine similarities of all pairs of cells, over images and pairs.

    This is equation (2) of docs/methods/skds.md, averaged over images.

    Args:
        student: Features (N, D_S, h, w), float32 or float64.
        teacher: Features (N, D_T, h, w); they receive no gradient.
        pool: Side of the cells, within which features are pooled by their maximum: an int is a number of positions, a
            float a fraction of height and width as in the official code, where 0.5 results in 2x2 cells.
        constant_norm: Whether the norms of the features are constants in the gradient, as in the official code.

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> import torch
        >>> student = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).view(1, 2, 1, 2)
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        >>> pair_similarity(student, teacher, pool=1).item()
        0.5
    """
    return gram_mse(*(unit_cells(features, pool, constant_norm) for features in (student, teacher)))


def unit_cells(features: Tensor, pool: int | float, constant_norm: bool = False) -> Tensor:
    """Pool a feature map by its maximum within cells, and scale the vector of each cell to length 1.

    Args:
        features: (N, D, h, w).
        pool: Side of the cells, see `pair_similarity`.
        constant_norm: Whether the norms are constants in the gradient, see `pair_similarity`.

    Returns:
        (N, cells, D), the cells in row-major order.

    Examples:
        >>> unit_cells(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), pool=1)
        tensor([[[0.6000, 0.8000]]])
    """
    window = (pool, pool) if isinstance(pool, int) else tuple(max(1, int(pool * side)) for side in features.shape[2:])
    cells: Tensor = F.max_pool2d(features, window, ceil_mode=True).flatten(2).mT
    norm: Tensor = torch.linalg.vector_norm(cells, dim=2, keepdim=True).clamp(min=1e-8)
    return cells / (norm.detach() if constant_norm else norm)


class SKDSLoss(WeightedLoss):
    """Structured distillation: {"pixel": ..., "pair": ..., "adversarial": ...}.

    Args:
        num_classes: C, the number of classes; None takes it from the first logits.
        pixel_weight: Weight of the pixel-wise term; 0 leaves the term out. The official weight is 10; `CanonicalKDLoss`
            gives the size of the same term with 5.
        pair_weight: Weight of the pair-wise term; 0 leaves the term out. With CIRKD's 10 the term was 0.2 to 0.3 on
            CamVid. The official weight is 1, with another pooling.
        adversarial_weight: Weight of the holistic term; 0 leaves the term and the critic out. With the official 0.1
            and a hinge critic of 20 steps the term was 0.2 to 0.4 on CamVid. The scores of WGAN-GP are not bounded and
            need a smaller weight: IFVD's code has 0.001.
        pixel_loss: Pixel-wise term: "kl" for `pixel_kl`, "cross_entropy" for the official `pixel_cross_entropy`.
        pair_pool: Side of the cells, see `pair_similarity`; 2 as in CIRKD's re-implementation. The official 0.5
            compares four cells.
        pair_constant_norm: Whether norms are constants in the gradient, see `pair_similarity`.
        critic_loss: Loss of the critic, see `bpkd_sdk.losses.critic`. "hinge" requires no second derivative.
        ignore_index: Not used, because the method does not use labels.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import torch
        >>> from bpkd_sdk import SegmentationOutput
        >>> output = SegmentationOutput(torch.zeros(2, 3, 8, 8), {"neck": torch.ones(2, 4, 8, 8)})
        >>> method = SKDSLoss(3)
        >>> method.prepare(output, output)
        >>> list(method(output, output, torch.zeros(2, 8, 8, dtype=torch.uint8)))
        ['pixel', 'pair', 'adversarial']
    """

    name = "skds"
    feature_terms = ("pair",)

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        pixel_weight: float = 5.0,
        pair_weight: float = 10.0,
        adversarial_weight: float = 0.1,
        pixel_loss: PixelLoss = "kl",
        pair_pool: int | float = 2,
        pair_constant_norm: bool = False,
        critic_loss: CriticLoss = "hinge",
        ignore_index: int = 255,
    ) -> None:
        weights = {"pixel": pixel_weight, "pair": pair_weight, "adversarial": adversarial_weight}
        super().__init__(num_classes, ignore_index, weights)
        check_choice("pixel_loss", pixel_loss, get_args(PixelLoss))
        if not (pair_pool >= 1 if isinstance(pair_pool, int) else 0 < pair_pool <= 1):
            raise ValueError(
                "Expected `pair_pool` to be a whole number of positions, 1 or above, or a fraction of the map up to "
                f"1.0, but got {pair_pool!r}."
            )
        self.critic_loss: CriticLoss = critic_loss
        self.adversary = Adversary(critic_loss)
        self.pixel_loss: PixelLoss = pixel_loss
        self.pair_pool = pair_pool
        self.pair_constant_norm = pair_constant_norm

    @classmethod
    def paper(cls, num_classes: int | None = None, *, ignore_index: int = 255) -> SKDSLoss:
        """Create the method with the official code's setting: weights 10, 1 and 0.1, cells of half the map, WGAN-GP.

        One thing differs: the official code trains its critic by SGD, this package by Adam.
        """
        return cls(
            num_classes,
            pixel_weight=10,
            pair_weight=1,
            adversarial_weight=0.1,
            pixel_loss="cross_entropy",
            pair_pool=0.5,
            pair_constant_norm=True,
            critic_loss="wgan-gp",
            ignore_index=ignore_index,
        )

    def build(self, outputs: OutputPair) -> None:
        """Build the critic if the holistic term is computed, see `DistillationLoss.prepare`."""
        if self.weights["adversarial"]:
            self.adversary.build(outputs.logits[0])

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms, see `WeightedLoss.terms`. In training mode the critic makes one step before it scores."""
        terms = {}
        if self.weights["pixel"]:
            pixel_loss = pixel_kl if self.pixel_loss == "kl" else pixel_cross_entropy
            terms["pixel"] = pixel_loss(*outputs.logits)
        if self.weights["pair"]:
            terms["pair"] = pair_similarity(
                *outputs.features, pool=self.pair_pool, constant_norm=self.pair_constant_norm
            )
        if self.weights["adversarial"]:
            terms["adversarial"] = self.adversary(*outputs.logits)
        return terms
