"""Losses of logits against labels: cross-entropy, and Dice, focal and Lovasz of segmentation-models-pytorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.arrays import at_least_float32, resize_bilinear
from bpkd_sdk.classes import two_class_logits
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import unknown_labels
from bpkd_sdk.progress import track
from bpkd_sdk.training.config import TrainingConfig


class LabelLosses(nn.Module):
    """The weighted losses on the labels of a run, computed in float32 at the size of the labels.

    Cross-entropy and focal loss are sums over labelled pixels, divided by their number in the whole batch, so that
    `accumulate` and the number of processes do not change them. Dice and Lovasz are ratios and sorted sums over all
    pixels together. Each micro-batch of a process computes its own, and their mean is the loss of a step: with smaller
    micro-batches they compare fewer images at once.

    Cross-entropy does not wait for a GPU; Dice, focal and Lovasz read values of the labels, so that every step waits.

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
        self.compute = {name: self._loss(name) for name in self.weights}

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
                name: weight * self.compute[name](logits, labels, labelled_pixels)
                for name, weight in self.weights.items()
            }

    def _loss(self, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return the function from logits, labels and `labelled_pixels` to a loss."""
        if name == "ce":
            return lambda logits, labels, pixels: cross_entropy(
                logits, labels, self.ignore_index, pixels, self.class_weights
            )
        from segmentation_models_pytorch import losses

        if name == "focal":
            one, several = (
                losses.FocalLoss(mode, gamma=2.0, ignore_index=self.ignore_index, reduction="sum")
                for mode in (losses.BINARY_MODE, losses.MULTICLASS_MODE)
            )
            return lambda logits, labels, pixels: (
                (one(logits[:, 0], labels) if logits.shape[1] == 1 else several(logits, labels)) / pixels
            )
        if name == "dice":
            dice = losses.DiceLoss(losses.MULTICLASS_MODE, ignore_index=self.ignore_index)
            return lambda logits, labels, _: dice(_at_least_two(logits), labels)
        lovasz = losses.LovaszLoss(losses.MULTICLASS_MODE, ignore_index=self.ignore_index)
        # LovaszLoss accepts float32 only, and returns an empty tensor if all pixels are void.
        return lambda logits, labels, _: lovasz(_at_least_two(logits).float(), labels).sum()


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


def balanced_class_weights(dataset: SegmentationDataset) -> tuple[float, ...]:
    """Read all labels and compute the weights w_c = N / (K n_c), whose mean over the labelled pixels is 1.

    n_c of the N labelled pixels have the class c, and K classes occur. A class without pixels has the weight 0.

    Raises:
        ValueError: If a label is neither a class nor void.
    """
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda index: _count_classes(dataset, index), range(len(dataset)))
        parts = list(track(results, total=len(dataset), description=f"Counting classes of {dataset.name}"))
    counts = torch.stack(parts).sum(0).double()
    weights = counts.sum() / ((counts > 0).sum() * counts)
    return tuple(torch.where(counts > 0, weights, 0.0).tolist())


def _count_classes(dataset: SegmentationDataset, index: int) -> Tensor:
    label = dataset[index][1]
    if unknown := unknown_labels(dataset, label):
        raise ValueError(f"{dataset.sample_name(index)}: labels {unknown[:10]} are outside the classes.")
    return torch.bincount(label.long()[label.long() != dataset.ignore_index], minlength=dataset.num_classes)


def check_class_weights(dataset: SegmentationDataset, config: TrainingConfig) -> None:
    """Raise ValueError if the number of class weights is not that of the classes, or if no labels can be counted."""
    weights = config.class_weights
    if weights == "balanced" and (config.labels == "teacher" or not dataset.has_labels):
        raise ValueError(
            "class_weights='balanced' is computed from the labels of the training data, and this run uses the "
            "teacher's predictions. Pass one number per class."
        )
    if isinstance(weights, (tuple, list)) and len(weights) != dataset.num_classes:
        raise ValueError(
            f"Expected `class_weights` to be {dataset.num_classes} numbers, one per class of {dataset.name} "
            f"({', '.join(dataset.class_names[:8])}{', ...' if dataset.num_classes > 8 else ''}), but got "
            f"{len(weights)}: {weights}."
        )
