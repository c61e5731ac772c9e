"""Scores of masks against labels: regions, boundaries, and accuracy inside and outside of the edge band.

All scores are ratios of counts over the whole data set, so that the counts of batches or processes can be summed. Masks
and labels are torch tensors or numpy arrays; the counts are numpy arrays in host memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
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
        check_labels(labels, classes, self.ignore_index)
        if len(outside := predictions[(predictions < 0) | (predictions >= classes)]):
            raise ValueError(
                f"Expected predictions in [0, {classes}), but the masks contain the class ids "
                f"{sorted(set(outside.tolist()))[:10]}. The classes of the network and of the data differ."
            )
        xp = array_namespace(predictions, labels)
        labels = xp.astype(labels, xp.int64)
        valid = labels != self.ignore_index
        predictions = xp.where(valid, xp.astype(predictions, xp.int64), self.ignore_index)
        self.images += len(labels)
        pairs = (labels * classes + predictions)[valid]
        self.confusion += _bin_counts(pairs, classes**2).reshape(classes, classes)
        self._count_boundary(predictions, labels, valid)
        self._count_contours(predictions, labels)
        correct = predictions == labels
        edge = edge_band(labels, self.edge_width, self.ignore_index)
        for row, region in enumerate((edge, valid & ~edge)):
            self.band[row] += int((correct & region).sum()), int(region.sum())

    def _distance(self, labels: Array) -> int:
        if self.boundary_width >= 1:
            return int(self.boundary_width)
        return max(1, round(self.boundary_width * math.hypot(*labels.shape[1:])))

    def _count_boundary(self, predictions: Array, labels: Array, valid: Array) -> None:
        distance = self._distance(labels)
        in_label = inner_boundary(labels, distance) & valid
        in_prediction = inner_boundary(predictions, distance) & valid
        both = in_label & in_prediction & (labels == predictions)
        for row, values in enumerate((labels[both], labels[in_label], predictions[in_prediction])):
            self.boundary[row] += _bin_counts(values, len(self.class_names))

    def _count_contours(self, predictions: Array, labels: Array) -> None:
        distance, classes, void = self._distance(labels), len(self.class_names), self.ignore_index
        contours = class_contours(labels, void), class_contours(predictions, void)
        for row, (own, other) in enumerate((contours, contours[::-1])):
            matched = has_same_class_within(own, other, distance, classes, void)
            self.contour[2 * row] += _bin_counts(own[matched], classes)
            self.contour[2 * row + 1] += _bin_counts(own[own != void], classes)

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


def _bin_counts(values: Any, length: int) -> np.ndarray:
    """Count each of the integers from 0 to `length` - 1, in host memory."""
    counts = array_namespace(values).bincount(values, minlength=length)  # a function of both libraries
    return np.asarray(to_device(counts, "cpu"))


def _mean(scores: np.ndarray) -> float:
    """Return the mean of the scores that are not NaN; NaN if there is none."""
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if len(defined) else math.nan
