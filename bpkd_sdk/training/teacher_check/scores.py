"""Measure how well outputs fit the labels, and distinguish logits from probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkd_sdk.class_map import ClassGroups
from bpkd_sdk.classes import two_class_logits
from bpkd_sdk.sizes import Size
from bpkd_sdk.training.teacher_check.crops import VOID, Sample

GOOD_ERROR = 0.03  # share of wrong pixels up to which no other input format is tried
CLEARLY_BETTER = 0.7  # largest ratio of error and cross-entropy at which another input format is clearly better
MAX_RATIOS_TO_CONSTANT = (
    0.9,
    0.8,
)  # largest ratios of error and cross-entropy to those of constant answers, for a useful teacher

MAX_LEFT_OUT = 0.25  # largest share of pixels, without a finding, of classes that a class map leaves out

Kind = Literal["logits", "probabilities", "sigmoids"]


def output_kind(outputs: Sequence[Tensor]) -> Kind:
    """Classify outputs (C, h, w) as logits, as probabilities that sum to 1, or as sigmoids, which lie in 0..1 too."""
    lowest, highest = class_ranges(outputs)
    if lowest.min() < 0 or highest.max() > 1.001:
        return "logits"
    tolerance = max(1e-3, torch.finfo(outputs[0].dtype).eps)
    sums = torch.cat([output.float().sum(0).flatten() for output in outputs])
    if len(lowest) > 1 and float(((sums - 1).abs() <= tolerance).float().mean()) > 0.99:
        return "probabilities"
    # Random weights too may give small positive values, but with little variation.
    return "sigmoids" if (highest - lowest).max() > 0.5 else "logits"


def class_ranges(outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest value of each class, (C,) each, over outputs (C, h, w)."""
    lowest = torch.stack([output.flatten(1).amin(1) for output in outputs]).amin(0)
    return lowest, torch.stack([output.flatten(1).amax(1) for output in outputs]).amax(0)


@dataclass(frozen=True)
class LabelScores:
    """Counts that measure how well outputs fit the labels of N crops with C classes.

    Attributes:
        losses: (N,) sums of the pixels' cross-entropies.
        counts: (N, C) numbers of pixels of each class.
        hits: (N, C) numbers of correct pixels of each class.
    """

    losses: Tensor
    counts: Tensor
    hits: Tensor

    @property
    def first(self) -> LabelScores:
        """Scores of the first crop alone."""
        return LabelScores(self.losses[:1], self.counts[:1], self.hits[:1])

    @property
    def total(self) -> float:
        """Number of labelled pixels."""
        return float(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share of labelled pixels that are correct."""
        return float(self.hits.sum()) / max(1.0, self.total)

    @property
    def cross_entropy(self) -> float:
        """Mean cross-entropy over labelled pixels."""
        return float(self.losses.sum()) / max(1.0, self.total)

    @property
    def majority_accuracy(self) -> float:
        """Accuracy of a constant answer, the most frequent class."""
        return float(self.counts.sum(0).max()) / self.total

    @property
    def entropy(self) -> float:
        """Cross-entropy of a constant answer, the frequencies of the classes."""
        return float(torch.special.entr(self.counts.sum(0) / self.total).sum())

    @property
    def can_improve(self) -> bool:
        """Whether outputs could fit better; always False if the labels contain one class only."""
        return self.entropy > 0 and 1 - self.accuracy > min(GOOD_ERROR, (1 - self.majority_accuracy) / 2)

    @property
    def is_chance(self) -> bool:
        """Whether constant answers fit as well.

        A teacher that was trained with a weighted loss assigns too many pixels to rare classes. Its mean recall
        distinguishes it from chance, unless it errs more than twice as often as a constant answer.
        """
        counts, hits = self.counts.sum(0), self.hits.sum(0)
        present = counts > 0
        recall = float((hits[present] / counts[present]).mean())
        error, constant_error = 1 - self.accuracy, 1 - self.majority_accuracy
        return (
            self.cross_entropy >= self.entropy
            and error >= 0.95 * constant_error
            and (recall <= (1 + 1 / int(present.sum())) / 2 or error > 2 * constant_error)
        )

    def is_clearly_better(self, other: LabelScores) -> bool:
        """Return whether these scores are better than chance, and better than another by a margin and on every crop."""
        error, cross_entropy = MAX_RATIOS_TO_CONSTANT
        return (
            1 - self.accuracy <= error * (1 - self.majority_accuracy)
            and self.cross_entropy <= cross_entropy * self.entropy
            and 1 - self.accuracy <= (1.0 if other.is_chance else CLEARLY_BETTER) * (1 - other.accuracy)
            and self.cross_entropy <= CLEARLY_BETTER * other.cross_entropy
            and bool((self.losses <= other.losses).all())
        )


def measure_scores(
    crops: Sequence[Sample], outputs: Sequence[Tensor], kind: Kind, classes: ClassGroups | None = None
) -> LabelScores:
    """Compare outputs with the labels of their crops, at every second pixel in both directions.

    Args:
        crops: Images and labels.
        outputs: Output (K, h, w) for each crop.
        kind: What the outputs are.
        classes: Channels of the outputs for each class of the labels; None for the same classes in the same order.
    """
    losses, counts, hits = [], [], []
    for crop, output in zip(crops, outputs, strict=True):
        logits = _as_logits(_resize_and_subsample(output.float(), crop.size), kind)
        logits = logits if classes is None else classes.merge(logits[None])[0]
        label = crop.label[::2, ::2].to(logits.device).long()
        label = torch.where(label < len(logits), label, VOID)
        if classes is not None:
            label = torch.where(torch.isin(label, torch.tensor(classes.taught, device=label.device)), label, VOID)
        losses.append(F.cross_entropy(logits[None], label[None], ignore_index=VOID, reduction="sum"))
        # A pixel is correct if its own logit exceeds all others; a tie is wrong. argmax is ten times slower on a CPU.
        own = label.clamp(min=0)[None]
        others = logits.scatter(0, own, -torch.inf).amax(0)
        known = label != VOID
        counts.append(torch.bincount(label[known], minlength=len(logits)))
        hits.append(torch.bincount(label[known & (logits.gather(0, own)[0] > others)], minlength=len(logits)))
    return LabelScores(*(torch.stack(values).cpu().double() for values in (losses, counts, hits)))


def left_out_shares(
    crops: Sequence[Sample], outputs: Sequence[Tensor], kind: Kind, classes: ClassGroups
) -> dict[int, float]:
    """Measure where the columns that `classes` leaves out are together likelier than each class of the data.

    Args:
        crops: Images and labels.
        outputs: Output (K, h, w) for each crop.
        kind: What the outputs are.
        classes: Channels of the outputs for each class of the labels.

    Returns:
        Share of the labelled pixels, or of all pixels without labels, by the likeliest of these columns.
    """
    is_labelled = any(bool((crop.label != VOID).any()) for crop in crops)
    counts = Counter[int]()
    total = 0
    for crop, output in zip(crops, outputs, strict=True):
        logits = _as_logits(_resize_and_subsample(output.float(), crop.size), kind)
        left = classes.left_out(len(logits))
        if not left:
            return {}
        considered = (crop.label[::2, ::2].to(logits.device) != VOID) | (not is_labelled)
        winners = classes.merge(logits[None], others=True)[0].argmax(0)
        columns = logits[left].argmax(0)[considered & (winners == len(classes.columns))]
        counts.update({left[index]: count for index, count in enumerate(torch.bincount(columns).tolist())})
        total += int(considered.sum())
    return {column: count / total for column, count in counts.most_common() if count}


def _resize_and_subsample(logits: Tensor, size: Size) -> Tensor:
    """Resize logits (C, h, w) bilinearly (align_corners=False), keeping every second row and column of the result."""
    if tuple(logits.shape[1:]) == size:
        return logits[:, ::2, ::2]
    rows, columns = (
        F.interpolate(torch.eye(before, device=logits.device)[None], after, mode="linear", align_corners=False)
        for before, after in zip(logits.shape[1:], size, strict=True)
    )
    return rows[0, :, ::2].T @ logits @ columns[0, :, ::2]


def _as_logits(values: Tensor, kind: Kind) -> Tensor:
    """Invert a softmax or sigmoid; one channel becomes two classes."""
    if kind == "probabilities":
        values = values.clamp(min=1e-6).log()
    elif kind == "sigmoids":
        values = values.logit(eps=1e-6)
    return two_class_logits(values[None])[0] if len(values) == 1 else values
