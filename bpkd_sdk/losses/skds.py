"""SKDS: structured knowledge distillation (Liu et al., CVPR 2019; TPAMI, arXiv 1903.04197).

Pixel-wise: each position's distribution over classes. Pair-wise: the similarities of all pairs of cells of the last
feature map. Holistic: a critic that tells the student's score maps from the teacher's.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.errors import check_choice
from bpkd_sdk.losses.critic import AdversarialTerms, CriticLoss
from bpkd_sdk.losses.divergence import pixel_kl
from bpkd_sdk.losses.method import Outputs, Terms
from bpkd_sdk.losses.similarity import gram_mse

PixelLoss = Literal["kl", "cross_entropy"]


def pixel_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """The official pixel-wise term: 1 / (h w) sum over images and positions of CE(softmax_c(t), softmax_c(s)).

    It is N times `pixel_kl` plus the teacher's entropy, a constant: same gradient, but never 0.

    Args:
        student: Logits (N, C, h, w), float32 or float64.
        teacher: Logits (N, C, h, w), constant.

    Returns:
        Scalar, 0 or above.
    """
    return -(teacher.softmax(1) * student.log_softmax(1)).sum((0, 1)).mean()


def pair_similarity(student: Tensor, teacher: Tensor, *, pool: int | float = 2, constant_norm: bool = False) -> Tensor:
    """Mean squared difference of the cosine similarities of all pairs of cells, over images and pairs.

    Args:
        student: Features (N, D_S, h, w), float32 or float64.
        teacher: Features (N, D_T, h, w), constant.
        pool: Side of the cells, over which features are pooled by their maximum: a whole number of positions, or a
            fraction of height and width as in the official code, where 0.5 leaves 2x2 cells.
        constant_norm: Take the features' norms as constants in the gradient, as the official code does.

    Returns:
        Scalar, 0 or above.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).view(1, 2, 1, 2)
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        >>> pair_similarity(student, teacher, pool=1).item()
        0.5
    """
    return gram_mse(*(unit_cells(features, pool, constant_norm) for features in (student, teacher)))


def unit_cells(features: Tensor, pool: int | float, constant_norm: bool = False) -> Tensor:
    """The vectors that the pair-wise term compares.

    Args:
        features: (N, D, h, w).
        pool: See `pair_similarity`.
        constant_norm: See `pair_similarity`.

    Returns:
        (N, cells, D), each of length 1, row by row of the map.
    """
    window = (pool, pool) if isinstance(pool, int) else tuple(max(1, int(pool * side)) for side in features.shape[2:])
    cells: Tensor = F.max_pool2d(features, window, ceil_mode=True).flatten(2).mT
    norm: Tensor = torch.linalg.vector_norm(cells, dim=2, keepdim=True).clamp(min=1e-8)
    return cells / (norm.detach() if constant_norm else norm)


class SKDSLoss(AdversarialTerms):
    """Structured distillation: {"pixel": ..., "pair": ..., "adversarial": ...}; a weight of 0 leaves a term out.

    Args:
        num_classes: C; None: that of the first logits.
        pixel_weight: Of the pixel-wise term. Half the official 10: see `CanonicalKDLoss`, which has the same term.
        pair_weight: Of the pair-wise term. CIRKD's 10 made it 0.2 to 0.3 on CamVid; the official 1 goes with its own
            pooling.
        adversarial_weight: Of the holistic term. The official 0.1, which with a hinge critic of 20 steps made 0.2 to
            0.4 on CamVid. WGAN-GP's scores know no bounds and want less: IFVD's code has 0.001.
        pixel_loss: "kl" is `pixel_kl`, "cross_entropy" the official `pixel_cross_entropy`.
        pair_pool: See `pair_similarity`. 2 as in CIRKD's re-implementation: the official 0.5 compares four cells.
        pair_constant_norm: See `pair_similarity`.
        critic_loss: See `bpkd_sdk.losses.critic`. "hinge" costs no second derivative.
        ignore_index: Not used: the method sees no labels.

    Raises:
        ValueError: For a value out of its range.

    Example:
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
        super().__init__(num_classes, ignore_index, weights, critic_loss)
        check_choice("pixel_loss", pixel_loss, get_args(PixelLoss))
        if not (pair_pool >= 1 if isinstance(pair_pool, int) else 0 < pair_pool <= 1):
            raise ValueError(
                "Expected `pair_pool` to be a whole number of positions, 1 or above, or a fraction of the map up to "
                f"1.0, but got {pair_pool!r}."
            )
        self.pixel_loss: PixelLoss = pixel_loss
        self.pair_pool = pair_pool
        self.pair_constant_norm = pair_constant_norm

    @classmethod
    def paper(cls, num_classes: int | None = None, *, ignore_index: int = 255) -> SKDSLoss:
        """The official code's setting: weights 10, 1 and 0.1, pooling to half the map, WGAN-GP.

        Its critic is trained by SGD; here, as everywhere, by Adam.
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

    def terms(self, outputs: Outputs, labels: Tensor) -> Terms:
        """See `WeightedTerms.terms`. In training mode the critic makes a step of its own before it judges."""
        pixel = pixel_kl if self.pixel_loss == "kl" else pixel_cross_entropy
        return {
            "pixel": lambda: pixel(*outputs.logits),
            "pair": lambda: pair_similarity(
                *outputs.features, pool=self.pair_pool, constant_norm=self.pair_constant_norm
            ),
            "adversarial": lambda: self.adversary(*outputs.logits),
        }
