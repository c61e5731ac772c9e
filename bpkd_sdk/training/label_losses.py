"""Losses of logits against labels: cross-entropy, and Dice, focal and Lovasz of segmentation-models-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.arrays import at_least_float32, resize_bilinear
from bpkd_sdk.classes import plain_name, two_class_logits
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import SampleReport, inspect_samples
from bpkd_sdk.errors import did_you_mean, format_list
from bpkd_sdk.training.config import TrainingConfig


class LabelLosses(nn.Module):
    """The weighted losses on the labels of a run, computed in float32 at the size of the labels.

    Cross-entropy and focal loss are sums over labelled pixels, divided by their number in the whole batch, so that
    `accumulate` and the number of processes do not change them. Dice and Lovasz are ratios and sorted sums over all
    pixels together. Each micro-batch of a process computes its own, and their mean is the loss of a step: with smaller
    micro-batches they compare fewer images at once.

    - "ce": cross-entropy, with `class_weights` if there are any, see `cross_entropy`.
    - "dice": ``DiceLoss``, the mean over all classes of 1 - 2 |P Y| / (|P| + |Y|) with sums over a micro-batch; 0 for a
      class that occurs in no label of it.
    - "focal": ``FocalLoss`` with gamma 2: the mean over classes of the binary focal losses of each class against all
      others, whose sigmoids take one logit each. Of a network with one logit, it is the binary focal loss.
    - "lovasz": ``LovaszLoss`` of the softmax, the mean over the classes that occur in the labels of a micro-batch.

    Args:
        weights: Weight of each loss by name, above 0.
        ignore_index: Label of void pixels, which no loss counts.
        class_weights: Weight of each class in the cross-entropy; None for 1.
    """

    def __init__(
        self, weights: Mapping[str, float], ignore_index: int, class_weights: tuple[float, ...] | None = None
    ) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.ignore_index = ignore_index
        self.class_weights: Tensor | None
        values = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", values, persistent=False)
        self.library = _library_losses(ignore_index) if self.weights.keys() - {"ce"} else {}

    def forward(self, logits: Tensor, labels: Tensor, labelled_pixels: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the losses by name, multiplied by their weights; all are 0 if all pixels are void.

        Args:
            logits: (N, C, h, w); one logit is that of the second of two classes.
            labels: int64 (N, H, W).
            labelled_pixels: Divisor of the sums over pixels; None: the number of labelled pixels.
        """
        if labelled_pixels is None:
            labelled_pixels = (labels != self.ignore_index).sum().clamp(min=1)
        with torch.autocast(logits.device.type, enabled=False):
            logits = resize_to_labels(logits, labels)
            return {
                name: weight * self._compute(name, logits, labels, labelled_pixels)
                for name, weight in self.weights.items()
            }

    def _compute(self, name: str, logits: Tensor, labels: Tensor, labelled_pixels: Tensor) -> Tensor:
        """Compute one loss of logits at the size of the labels."""
        if name == "ce":
            return cross_entropy(logits, labels, self.ignore_index, labelled_pixels, self.class_weights)
        if name == "focal" and logits.shape[1] == 1:
            return self.library["binary focal"](logits[:, 0], labels) / labelled_pixels
        if name == "focal":
            return self.library["focal"](logits, labels) / labelled_pixels
        if name == "dice":
            return self.library["dice"](_at_least_two(logits), labels)
        # LovaszLoss accepts float32 only, and returns an empty tensor if all pixels are void.
        return self.library["lovasz"](_at_least_two(logits).float(), labels).sum()


def _library_losses(ignore_index: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    from segmentation_models_pytorch import losses

    several, one = losses.MULTICLASS_MODE, losses.BINARY_MODE
    return {
        "focal": losses.FocalLoss(several, gamma=2.0, ignore_index=ignore_index, reduction="sum"),
        "binary focal": losses.FocalLoss(one, gamma=2.0, ignore_index=ignore_index, reduction="sum"),
        "dice": losses.DiceLoss(several, ignore_index=ignore_index),
        "lovasz": losses.LovaszLoss(several, ignore_index=ignore_index),
    }


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    labelled_pixels: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy over labelled pixels, with logits resized to the labels; 0 if all pixels are void.

    It is the sum over labelled pixels of w_c times minus the log probability of the pixel's class c, divided by
    `labelled_pixels`. The divisor does not contain the weights, so they are used as they are.

    Args:
        logits: (N, C, h, w); one logit is that of the second of two classes, see `two_class_logits`.
        labels: int64 (N, H, W).
        ignore_index: Void label.
        labelled_pixels: Divisor of the sum over pixels; None divides by the number of labelled pixels (the mean).
        class_weights: Weight w of each class, (C,) or (2,) for one logit; None for 1.
    """
    resized = _at_least_two(resize_to_labels(logits, labels))
    weights = None if class_weights is None else class_weights.to(resized)
    total = F.cross_entropy(resized, labels, weights, ignore_index=ignore_index, reduction="sum")
    return total / ((labels != ignore_index).sum().clamp(min=1) if labelled_pixels is None else labelled_pixels)


def resize_to_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Resize logits (N, C, h, w) bilinearly to the size of labels (N, H, W), in float32 or float64."""
    logits = at_least_float32(logits)
    if logits.shape[2:] == labels.shape[1:]:
        return logits
    return resize_bilinear(logits, labels.shape[1:])


def _at_least_two(logits: Tensor) -> Tensor:
    return two_class_logits(logits) if logits.shape[1] == 1 else logits


def balanced_class_weights(
    dataset: SegmentationDataset, reports: Sequence[SampleReport] | None = None
) -> tuple[float, ...]:
    """Compute the weights w_c = N / (K n_c), whose mean over the labelled pixels is 1.

    n_c of the N labelled pixels have the class c, and K classes occur. A class without pixels has the weight 0.

    Args:
        dataset: Training data.
        reports: Reports of `inspect_samples` on them; None reads all of the data.

    Raises:
        ValueError: If samples cannot be used; they are listed.
    """
    if reports is None:
        reports = inspect_samples(dataset)
        if problems := [report.problem for report in reports if report.problem]:
            raise ValueError(f"The classes of {dataset.name} cannot be counted:\n{format_list(problems)}")
    counts = torch.zeros(dataset.num_classes, dtype=torch.float64)
    for report in reports:
        for label, count in zip(report.labels, report.counts, strict=True):
            if label != dataset.ignore_index:
                counts[label] += count
    weights = counts.sum() / ((counts > 0).sum() * counts)
    return tuple(torch.where(counts > 0, weights, 0.0).tolist())


def find_class_weights(
    dataset: SegmentationDataset, config: TrainingConfig
) -> Literal["balanced"] | tuple[float, ...] | None:
    """Return the class weights of a run in the order of the data's classes; "balanced" and None stay as they are.

    Names that differ only in case, spaces, hyphens and underscores count as equal.

    Raises:
        ValueError: If they are not one weight per class, or if no labels can be counted.
    """
    weights = config.class_weights
    if weights == "balanced" and (config.labels == "teacher" or not dataset.has_labels):
        raise ValueError(
            "class_weights='balanced' is computed from the labels of the training data, and this run uses the "
            "teacher's predictions. Pass one number per class."
        )
    if isinstance(weights, Mapping):
        names = {plain_name(name): name for name in dataset.class_names}
        if unknown := [name for name in weights if name not in dataset.class_names and plain_name(name) not in names]:
            raise ValueError(
                f"`class_weights` names {unknown[0]!r}, which is not a class of {dataset.name}."
                f"{did_you_mean(unknown[0], dataset.class_names)} Its classes are: {', '.join(dataset.class_names)}."
            )
        plain = {plain_name(name): weight for name, weight in weights.items()}
        if missing := [name for name in dataset.class_names if name not in weights and plain_name(name) not in plain]:
            raise ValueError(
                f"`class_weights` has no weight for {len(missing)} of the {dataset.num_classes} classes of "
                f"{dataset.name}: {', '.join(missing)}. Add a number for each; 1 is the weight without `class_weights`."
            )
        if len(weights) > dataset.num_classes:
            raise ValueError(
                f"`class_weights` names a class of {dataset.name} twice, in different spellings: {weights}."
            )
        return tuple(float(weights.get(name, plain[plain_name(name)])) for name in dataset.class_names)
    if isinstance(weights, (tuple, list)) and len(weights) != dataset.num_classes:
        raise ValueError(
            f"Expected `class_weights` to be {dataset.num_classes} numbers, one per class of {dataset.name} "
            f"({', '.join(dataset.class_names[:8])}{', ...' if dataset.num_classes > 8 else ''}), but got "
            f"{len(weights)}: {weights}."
        )
    return "balanced" if weights == "balanced" else None if weights is None else tuple(weights)
