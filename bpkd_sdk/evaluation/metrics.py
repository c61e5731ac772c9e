"""Scores of masks against labels: regions, boundaries, and accuracy inside and outside of the edge band.

All scores are ratios of counts over the whole data set, so that the counts of batches or processes can be summed. Masks
and labels are torch tensors or numpy arrays; the counts are numpy arrays in host memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from array_api_compat import to_device

from bpkd_sdk.arrays import Array, array_namespace
from bpkd_sdk.boundary import check_labels, class_contours, edge_band, has_same_class_within, inner_boundary


@dataclass(frozen=True)
class Metrics:
    """Scores of a network on a data set: fractions in 0..1, or NaN if they are not defined.

    Attributes:
        miou: Mean of `per_class_iou` over the classes that are not NaN.
        macc: Mean of `per_class_accuracy` over the classes that are not NaN.
        pixel_accuracy: Share of the label pixels that are predicted correctly.
        per_class_iou: Intersection over union of each class; NaN if the class is in no label and no prediction.
        per_class_accuracy: Share of the label pixels of each class that are predicted correctly; NaN if the class is in
            no label.
        boundary_iou: Mean of `per_class_boundary_iou` over the classes that are not NaN.
        per_class_boundary_iou: IoU of the inner boundaries of label and prediction (Cheng et al., CVPR 2021) of each
            class; NaN if the class is in no label and no prediction.
        boundary_f1: Mean over classes of the F1 score of contour pixels that are matched within `boundary_width`.
        edge_accuracy: Pixel accuracy inside the edge band of the label, the paper's trimap of width `edge_width`.
        body_accuracy: Pixel accuracy outside the edge band.
        class_names: Names of the classes, in the order of the per-class scores.
        images: Number of images.
        boundary_width: Distance of the boundary scores: pixels, or a share of the image diagonal if below 1.
        edge_width: Side of the window of the edge band in pixels.
    """

    miou: float
    macc: float
    pixel_accuracy: float
    per_class_iou: tuple[float, ...]
    per_class_accuracy: tuple[float, ...]
    boundary_iou: float
    per_class_boundary_iou: tuple[float, ...]
    boundary_f1: float
    edge_accuracy: float
    body_accuracy: float
    class_names: tuple[str, ...]
    images: int
    boundary_width: int | float
    edge_width: int

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain JSON values; NaN becomes None."""
        return {key: _without_nan(value) for key, value in dataclasses.asdict(self).items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class MetricCounts:
    """Counts that accumulate over batches; `compute` turns them into `Metrics`.

    Args:
        class_names: Names of the classes, at most 256.
        ignore_index: Label value of void pixels. They are removed from label and prediction before counting, so that
            masks of both end at void pixels.
        boundary_width: Distance of the boundary scores: pixels, or a share of the image diagonal if below 1.
        edge_width: Side of the window of the edge band in pixels, odd.
    """

    def __init__(
        self,
        class_names: tuple[str, ...],
        *,
        ignore_index: int = 255,
        boundary_width: int | float = 3,
        edge_width: int = 7,
    ) -> None:
        if not (0 < boundary_width < 1 or (boundary_width >= 1 and boundary_width == int(boundary_width))):
            raise ValueError(
                "Expected `boundary_width` to be whole pixels, or a share of the diagonal below 1, "
                f"but got {boundary_width}."
            )
        classes = len(class_names)
        self.class_names = class_names
        self.ignore_index = ignore_index
        self.boundary_width = boundary_width
        self.edge_width = edge_width
        self.images = 0
        self.confusion = np.zeros((classes, classes), np.int64)  # (label, prediction)
        self.boundary = np.zeros((3, classes), np.int64)  # (in both / label / prediction, class)
        self.contour = np.zeros((4, classes), np.int64)  # (label matched / all, prediction matched / all; class)
        self.band = np.zeros((2, 2), np.int64)  # (edge / body, correct / all)

    def update(self, predictions: Array, labels: Array) -> None:
        """Count one batch.

        Args:
            predictions: Predicted class ids, integers (N, H, W) in [0, C).
            labels: Class ids or `ignore_index`, integers (N, H, W) in [0, C).

        Raises:
            ValueError: If the shapes differ, or if a value is out of range.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                "Expected prediction and label of the same size, "
                f"but got {tuple(predictions.shape)} and {tuple(labels.shape)}."
            )
        classes = len(self.class_names)
        check_labels(labels, classes, self.ignore_index, wait=True)
        outside = (predictions < 0) | (predictions >= classes)
        if outside.any():
            raise ValueError(
                f"Expected predictions in [0, {classes}), but the masks contain the class ids "
                f"{sorted(set(predictions[outside].tolist()))[:10]}. The classes of the network and of the data differ."
            )
        self.images += len(labels)
        is_void = labels == self.ignore_index
        self._update(*(_narrow(masks, is_void, classes) for masks in (predictions, labels)))

    def _update(self, predictions: Any, labels: Any) -> None:
        """Count one batch, in which void is the number of classes in both masks."""
        void, distance = len(self.class_names), self._distance(labels)
        self.confusion += self._count(labels, predictions, void + 1)[:, :void]
        correct = labels == predictions
        inner, predicted_inner = (inner_boundary(masks, distance) for masks in (labels, predictions))
        contours, predicted_contours = (class_contours(masks, void) for masks in (labels, predictions))
        matched, predicted_matched = has_same_class_within(contours, predicted_contours, distance, void, void)
        edge = edge_band(labels, self.edge_width, void)
        regions = [edge & correct, edge, ~edge & correct, ~edge]
        counts = self._count_flags(
            labels, [inner & predicted_inner & correct, inner, matched, contours != void, *regions]
        )
        predicted = self._count_flags(predictions, [predicted_inner, predicted_matched, predicted_contours != void])
        self.boundary += np.stack([*counts[:2], predicted[0]])
        self.contour += np.stack([*counts[2:4], *predicted[1:]])
        self.band += counts[4:].sum(1).reshape(2, 2)

    def _count_flags(self, masks: Any, flags: Sequence[Any]) -> np.ndarray:
        """Count the pixels of each class that have each flag, at most 8, as (flags, classes)."""
        xp = array_namespace(masks)
        bits = reduce(lambda bits, flag: (bits << 1) | flag, (flag.view(xp.uint8) for flag in flags))
        counts = self._count(masks, bits, 1 << len(flags))
        has_flag = np.arange(1 << len(flags)) >> np.arange(len(flags))[::-1, None] & 1
        result: np.ndarray = has_flag @ counts.T
        return result

    def _count(self, masks: Any, values: Any, size: int) -> np.ndarray:
        """Count the pixels of each class that have each value from 0 to `size` - 1, as (classes, size)."""
        xp, classes = array_namespace(masks, values), len(self.class_names)
        codes = xp.reshape(xp.astype(masks, xp.int32) * size + xp.astype(values, xp.int32), (-1,))
        counts = xp.bincount(codes, minlength=(classes + 1) * size)  # a function of both libraries
        return np.asarray(to_device(counts, "cpu")).reshape(-1, size)[:classes]

    def _distance(self, labels: Array) -> int:
        if self.boundary_width >= 1:
            return int(self.boundary_width)
        return max(1, round(self.boundary_width * math.hypot(*labels.shape[1:])))

    def sum_across_processes(self, sum_counts: Callable[[np.ndarray], np.ndarray]) -> None:
        """Sum all counts across processes.

        Args:
            sum_counts: Function that sums an int64 array across processes.
        """
        for name in ("confusion", "boundary", "contour", "band"):
            setattr(self, name, sum_counts(getattr(self, name)))
        self.images = int(sum_counts(np.asarray(self.images)))

    @np.errstate(divide="ignore", invalid="ignore")  # 0 / 0 is NaN, an undefined score
    def compute(self) -> Metrics:
        """Return the scores of all counted images."""
        correct, in_label, predicted = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        both, label_boundary, predicted_boundary = self.boundary
        iou = correct / (in_label + predicted - correct)
        accuracy = correct / in_label
        boundary_iou = both / (label_boundary + predicted_boundary - both)
        label_matched, label_contour, predicted_matched, predicted_contour = self.contour
        recall, precision = label_matched / label_contour, predicted_matched / predicted_contour
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
        f1[label_contour + predicted_contour == 0] = math.nan
        edge, body = (self.band[:, 0] / self.band[:, 1]).tolist()
        return Metrics(
            miou=_mean(iou),
            macc=_mean(accuracy),
            pixel_accuracy=float(correct.sum() / in_label.sum()),
            per_class_iou=tuple(iou.tolist()),
            per_class_accuracy=tuple(accuracy.tolist()),
            boundary_iou=_mean(boundary_iou),
            per_class_boundary_iou=tuple(boundary_iou.tolist()),
            boundary_f1=_mean(f1),
            edge_accuracy=edge,
            body_accuracy=body,
            class_names=self.class_names,
            images=self.images,
            boundary_width=self.boundary_width,
            edge_width=self.edge_width,
        )


def _narrow(masks: Array, is_void: Array, classes: int) -> Array:
    """Return class ids in the narrowest type, with the number of classes in place of void."""
    xp = array_namespace(masks)
    narrow: Array = xp.astype(masks, xp.uint8 if classes < 256 else xp.int16)
    narrow[is_void] = classes
    return narrow


def _mean(scores: np.ndarray) -> float:
    """Return the mean of the scores that are not NaN; NaN if there is none."""
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if len(defined) else math.nan
