"""Tests of the scores against torchmetrics and against loops in float64."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from bpkd_sdk.evaluation import MetricCounts

CLASSES = ("a", "b", "c", "d", "never")


def masks(seed, *, void=False, size=(24, 31), count=3):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 4, (count, 6, 8))
    labels = coarse.repeat(5, 1).repeat(5, 2)[:, : size[0], : size[1]]
    noise = generator.random(labels.shape)
    labels = np.where(noise < 0.1, generator.integers(0, 4, labels.shape), labels)
    return torch.from_numpy(np.where(noise > 0.95, 255, labels) if void else labels)


def scores(predictions, labels, **options):
    counts = MetricCounts(CLASSES, **options)
    counts.update(predictions, labels)
    return counts.compute()


def test_confusion_matrix_equals_torchmetrics():
    predictions, labels = masks(0), masks(1, void=True)
    counts = MetricCounts(CLASSES)
    counts.update(predictions, labels)
    expected = MulticlassConfusionMatrix(num_classes=5, ignore_index=255)(predictions, labels)
    assert np.array_equal(counts.confusion, expected.numpy())


def test_region_scores_equal_loops():
    predictions, labels = masks(0), masks(1, void=True)
    result = scores(predictions, labels)
    p, y = predictions.numpy(), labels.numpy()
    known = y != 255
    iou, accuracy = [], []
    for c in range(4):
        both = (known & (p == c) & (y == c)).sum()
        iou.append(both / (known & ((p == c) | (y == c))).sum())
        accuracy.append(both / (y == c).sum())
    assert result.per_class_iou[:4] == pytest.approx(iou)
    assert math.isnan(result.per_class_iou[4])
    assert result.miou == pytest.approx(np.mean(iou))
    assert result.macc == pytest.approx(np.mean(accuracy))
    assert result.pixel_accuracy == pytest.approx((known & (p == y)).sum() / known.sum())


def plain_erosion(mask, distance):
    padded = np.pad(mask, distance)
    result = np.zeros_like(mask)
    for row, column in np.ndindex(*mask.shape):
        result[row, column] = padded[row : row + 2 * distance + 1, column : column + 2 * distance + 1].all()
    return result


def plain_boundary_iou(predictions, labels, distance):
    both, either = np.zeros(5), np.zeros(5)
    for p, y in zip(predictions.numpy(), labels.numpy(), strict=True):
        p = np.where(y == 255, 255, p)
        for c in range(5):
            inner = [(mask == c) & ~plain_erosion(mask == c, distance) for mask in (p, y)]
            both[c] += (inner[0] & inner[1]).sum()
            either[c] += (inner[0] | inner[1]).sum()
    return np.array([b / e if e else math.nan for b, e in zip(both, either, strict=True)])


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_boundary_iou_is_the_iou_of_masks_minus_erosions(distance):
    predictions, labels = masks(2), masks(3, void=True)
    expected = plain_boundary_iou(predictions, labels, distance)
    result = scores(predictions, labels, boundary_width=distance)
    np.testing.assert_allclose(result.per_class_boundary_iou, expected)
    assert result.boundary_iou == pytest.approx(np.nanmean(expected))


def test_boundary_width_as_a_share_of_the_diagonal():
    predictions, labels = masks(2), masks(3)
    share = 2.0 / math.hypot(24, 31)
    assert scores(predictions, labels, boundary_width=share).boundary_iou == pytest.approx(
        scores(predictions, labels, boundary_width=2).boundary_iou
    )


def plain_contour(mask):
    """Return the pixels of each class that touch another class; void and the image border do not count."""
    result = np.full(mask.shape, 255)
    for row, column in np.ndindex(*mask.shape):
        near = mask[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        if mask[row, column] != 255 and len(set(near.ravel().tolist()) - {255}) > 1:
            result[row, column] = mask[row, column]
    return result


def plain_matches(own, other, c, distance):
    matched = []
    for row, column in np.argwhere(own == c):
        near = other[max(row - distance, 0) : row + distance + 1, max(column - distance, 0) : column + distance + 1]
        matched.append((near == c).any())
    return matched


@pytest.mark.parametrize("distance", [1, 3])
def test_boundary_f1_equals_loops(distance):
    predictions, labels = masks(4), masks(5, void=True)
    matched = {c: ([], []) for c in range(5)}
    for p, y in zip(predictions.numpy(), labels.numpy(), strict=True):
        contours = plain_contour(np.where(y == 255, 255, p)), plain_contour(y)
        for c, (precise, recalled) in matched.items():
            precise += plain_matches(*contours, c, distance)
            recalled += plain_matches(*contours[::-1], c, distance)
    f1 = []
    for precise, recalled in list(matched.values())[:4]:
        precision, recall = np.mean(precise), np.mean(recalled)
        f1.append(2 * precision * recall / (precision + recall))
    assert scores(predictions, labels, boundary_width=distance).boundary_f1 == pytest.approx(np.mean(f1))


def test_edge_and_body_accuracy_equal_loops():
    predictions, labels = masks(6), masks(7, void=True)
    p, y = predictions.numpy(), labels.numpy()
    correct = {True: [], False: []}
    for n, row, column in np.ndindex(*y.shape):
        if y[n, row, column] != 255:
            near = y[n, max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4]
            correct[len(set(near.ravel().tolist())) > 1].append(p[n, row, column] == y[n, row, column])
    labels_with_bodies = torch.zeros_like(labels)
    result = scores(predictions, labels)
    assert result.edge_accuracy == pytest.approx(np.mean(correct[True]))
    one_body = scores(predictions, labels_with_bodies)
    assert math.isnan(one_body.edge_accuracy)
    assert one_body.body_accuracy == pytest.approx((p == 0).mean())


def test_perfect_prediction_scores_one():
    labels = masks(8)
    result = scores(labels, labels)
    assert (result.miou, result.macc, result.boundary_iou, result.boundary_f1) == (1, 1, 1, 1)
    assert (result.edge_accuracy, result.pixel_accuracy) == (1, 1)


def test_counts_of_parts_sum_to_those_of_the_whole():
    predictions, labels = masks(9), masks(10, void=True)
    parts = MetricCounts(CLASSES)
    for p, y in zip(predictions, labels, strict=True):
        parts.update(p[None], y[None])
    expected = scores(predictions, labels)
    assert str(parts.compute()) == str(expected)
    assert expected.images == 3


def test_json_has_null_for_nan():
    values = scores(masks(0), masks(1)).to_dict()
    assert values["per_class_iou"][4] is None
    assert values["class_names"] == list(CLASSES)


def test_arrays_have_the_scores_of_tensors():
    predictions, labels = masks(0), masks(1, void=True)
    for width in (1, 3, 0.05):
        expected = scores(predictions, labels, boundary_width=width)
        assert str(scores(predictions.numpy(), labels.numpy(), boundary_width=width)) == str(expected)
    narrow = scores(predictions.numpy().astype(np.uint8), labels.numpy().astype(np.uint8))
    assert str(narrow) == str(scores(predictions, labels))


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # the second name stands for an accelerator
def test_invalid_input_is_named(monkeypatch, device):
    monkeypatch.setattr("bpkd_sdk.boundary.device", lambda _: torch.device(device))
    counts = MetricCounts(CLASSES)
    with pytest.raises(ValueError, match="of the same size"):
        counts.update(torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 5, dtype=torch.int64))
    for label in (5, 259, -7):
        with pytest.raises(ValueError, match=rf"\[{label}\]"):
            counts.update(torch.zeros(1, 4, 4, dtype=torch.int64), torch.full((1, 4, 4), label))
    with pytest.raises(ValueError, match=r"\[7\]"):
        counts.update(torch.full((1, 4, 4), 7), torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="whole pixels, or a share"):
        MetricCounts(CLASSES, boundary_width=2.5)
