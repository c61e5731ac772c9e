"""Tests of the trimaps against dilation and erosion that are computed pixel by pixel."""

import numpy as np
import pytest
import torch

from bpkd_sdk import boundary
from bpkd_sdk.boundary import class_contours, edge_band, edge_masks, has_same_class_within, inner_boundary


def random_labels(classes: int, height: int, width: int, *, void: int | None, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, classes, (2, height // 3 + 1, width // 3 + 1))
    labels = coarse.repeat(3, 1).repeat(3, 2)[:, :height, :width]
    if void is not None:
        labels = np.where(generator.random(labels.shape) < 0.04, void, labels)
    return torch.from_numpy(labels)


def pixels_in_window(image: np.ndarray, row: int, column: int, width: int) -> np.ndarray:
    radius = width // 2
    return image[max(row - radius, 0) : row + radius + 1, max(column - radius, 0) : column + radius + 1]


def plain_masks(labels, classes, size, width, ignore, void):
    """Compute dilation minus erosion of each class, then the mean over each cell, one pixel at a time in float64."""
    count, height, columns = labels.shape
    edges = np.zeros((count, classes, height, columns))
    for n, row, column in np.ndindex(count, height, columns):
        labels_in_window = set(pixels_in_window(labels[n], row, column, width).ravel().tolist())
        if void == "clear" and labels[n, row, column] == ignore:
            continue
        if void == "guard" and ignore in labels_in_window:
            continue
        for c in labels_in_window - {ignore}:
            dilated, eroded = 1, int(labels_in_window == {c})
            edges[n, c, row, column] = dilated - eroded
    masks = np.zeros((count, classes, *size))
    for i, j in np.ndindex(*size):
        rows = slice(i * height // size[0], -(-(i + 1) * height // size[0]))
        cols = slice(j * columns // size[1], -(-(j + 1) * columns // size[1]))
        masks[:, :, i, j] = edges[:, :, rows, cols].mean((2, 3))
    return masks


@pytest.mark.parametrize("void", ["clear", "keep", "guard"])
@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize(
    ("classes", "height", "columns", "size"),
    [
        pytest.param(2, 16, 24, (4, 6), id="divisible"),
        pytest.param(19, 17, 23, (5, 6), id="not-divisible"),
        pytest.param(5, 7, 5, (7, 5), id="same-size"),
        pytest.param(5, 6, 5, (9, 11), id="finer-than-labels"),
        pytest.param(3, 13, 40, (1, 1), id="one-cell"),
        pytest.param(33, 16, 16, (4, 4), id="two-words"),
        pytest.param(255, 20, 20, (5, 5), id="nine-words"),
        pytest.param(40, 16, 136, (4, 34), id="tiles"),
        pytest.param(40, 12, 78, (3, 11), id="tiles-not-divisible"),
    ],
)
def test_masks_equal_plain_dilation_minus_erosion(classes, height, columns, size, width, void):
    labels = random_labels(classes, height, columns, void=255)
    expected = plain_masks(labels.numpy(), classes, size, width, 255, void)
    masks = edge_masks(labels, classes, size, width, void=void)
    assert masks.dtype is torch.float32
    np.testing.assert_allclose(masks.numpy(), expected, rtol=0, atol=1e-6)


def test_256_classes_with_a_void_label_outside_them():
    labels = torch.arange(256).view(1, 16, 16)
    masks = edge_masks(labels, 256, (16, 16), 3, ignore_index=-1)
    np.testing.assert_allclose(masks.numpy(), plain_masks(labels.numpy(), 256, (16, 16), 3, -1, "clear"), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_label_type_does_not_matter(dtype):
    labels = random_labels(19, 24, 24, void=255)
    torch.testing.assert_close(edge_masks(labels.to(dtype), 19, (6, 6)), edge_masks(labels, 19, (6, 6)), rtol=0, atol=0)


@pytest.mark.parametrize(("classes", "void"), [(3, 255), (3, -1), (40, 255), (256, -1)])
def test_arrays_have_the_same_boundaries_as_tensors(classes, void):
    labels, others = (random_labels(classes, 21, 34, void=void, seed=seed) for seed in (1, 2))
    arrays = labels.numpy(), others.numpy()
    for width in (1, 3, 7, 15, 71):
        assert np.array_equal(edge_band(arrays[0], width, void), edge_band(labels, width, void).numpy())
    for mode in ("clear", "keep", "guard"):
        masks = edge_masks(arrays[0], classes, (5, 9), ignore_index=void, void=mode)
        assert masks.dtype == np.float32
        assert np.array_equal(masks, edge_masks(labels, classes, (5, 9), ignore_index=void, void=mode).numpy())
    for distance in (1, 3, 40):
        assert np.array_equal(inner_boundary(arrays[0], distance), inner_boundary(labels, distance).numpy())
    assert np.array_equal(class_contours(arrays[0], void), class_contours(labels, void).numpy())
    found = zip(
        has_same_class_within(*arrays, 2, classes, void),
        has_same_class_within(labels, others, 2, classes, void),
        strict=True,
    )
    assert all(np.array_equal(flags, expected.numpy()) for flags, expected in found)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_the_band_of_an_array_does_not_depend_on_its_type(dtype):
    labels = random_labels(256, 30, 31, void=None)  # 255 is a class
    assert np.array_equal(edge_band(labels.numpy().astype(dtype), 7, -1), edge_band(labels, 7, -1).numpy())
    large = labels * 200
    if dtype != np.uint8:
        assert np.array_equal(edge_band(large.numpy().astype(dtype), 7, -1), edge_band(large, 7, -1).numpy())


@pytest.mark.parametrize("classes", [5, 200])
@pytest.mark.parametrize("pixels", [1, 500, 3000])
def test_parts_of_the_labels_have_the_masks_of_the_whole(classes, pixels, monkeypatch):
    labels = random_labels(classes, 48, 64, void=255)
    whole = edge_masks(labels, classes, (12, 16))
    monkeypatch.setattr(boundary, "_PART_PIXELS", pixels)
    assert torch.equal(edge_masks(labels, classes, (12, 16)), whole)


def test_masks_of_the_reference(reference):
    case = np.load(reference / "losses" / "bpkd_c19_void.npz")
    masks = edge_masks(torch.from_numpy(case["labels"]), 19, (17, 23), int(case["kernel"]))
    np.testing.assert_allclose(masks.numpy(), case["mask"], rtol=0, atol=1e-7)


def test_the_border_of_the_image_is_not_an_edge():
    assert edge_masks(torch.zeros(1, 12, 12, dtype=torch.uint8), 3, (3, 3)).abs().max() == 0
    assert not edge_band(torch.zeros(1, 12, 12, dtype=torch.uint8)).any()


def test_void_only_has_no_edge():
    void = torch.full((1, 12, 12), 255, dtype=torch.uint8)
    for mode in ("clear", "keep", "guard"):
        assert edge_masks(void, 3, (3, 3), void=mode).abs().max() == 0


def test_the_edge_band_is_the_union_of_the_edges_of_all_classes():
    labels = random_labels(7, 30, 31, void=255)
    any_edge = edge_masks(labels, 7, (30, 31)).amax(1) > 0
    assert torch.equal(edge_band(labels), any_edge)


@pytest.mark.parametrize("distance", [1, 3])
def test_inner_boundary_is_the_mask_minus_its_erosion(distance):
    labels = random_labels(4, 20, 17, void=255).numpy()
    expected = np.zeros(labels.shape, bool)
    padded = np.pad(labels, ((0, 0), (distance, distance), (distance, distance)), constant_values=-1)
    for n, row, column in np.ndindex(*labels.shape):
        near = padded[n, row : row + 2 * distance + 1, column : column + 2 * distance + 1]
        expected[n, row, column] = (near != labels[n, row, column]).any()
    assert np.array_equal(inner_boundary(torch.from_numpy(labels), distance).numpy(), expected)


def test_contours_touch_another_class_but_not_void_or_the_border():
    labels = torch.tensor([[[0, 0, 0, 1, 1, 1, 255, 2]]])
    assert class_contours(labels).tolist() == [[[255, 255, 0, 1, 255, 255, 255, 255]]]


@pytest.mark.parametrize("classes", [3, 40])
def test_same_class_within_a_distance(classes):
    labels, others = (random_labels(classes, 15, 14, void=255, seed=seed) for seed in (1, 2))
    found = has_same_class_within(labels, others, 2, classes, 255)
    for own, other, flags in ((labels, others, found[0]), (others, labels, found[1])):
        expected = np.zeros(labels.shape, bool)
        for n, row, column in np.ndindex(*labels.shape):
            value = int(own[n, row, column])
            expected[n, row, column] = value != 255 and value in pixels_in_window(other[n].numpy(), row, column, 5)
        assert np.array_equal(flags.numpy(), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"labels": torch.full((1, 4, 4), 7)}, r"Expected labels in \[0, 3\).*\[7\]", id="label"),
        pytest.param({"labels": torch.full((1, 4, 4), -1)}, r"\[-1\]", id="negative-label"),
        pytest.param({"labels": torch.full((1, 4, 4), 10**6) * torch.arange(4)}, r"\[1000000,", id="large-label"),
        pytest.param({"labels": torch.zeros(4, 4, dtype=torch.int64)}, r"shape \(N, H, W\)", id="shape"),
        pytest.param({"width": 4}, "odd number", id="even-width"),
        pytest.param({"num_classes": 257}, "1 to 256", id="classes"),
        pytest.param({"ignore_index": 2}, "outside the 3 classes, but got 2", id="ignore-is-a-class"),
        pytest.param({"output_size": (0, 4)}, "two positive numbers", id="size"),
        pytest.param({"void": "guarded"}, "Did you mean 'guard'", id="void"),
    ],
)
def test_bad_input_is_named(arguments, message):
    valid = {"labels": torch.zeros(1, 4, 4, dtype=torch.int64), "num_classes": 3, "output_size": (2, 2)}
    with pytest.raises(ValueError, match=message):
        edge_masks(**valid | arguments)


def test_float_labels_are_refused():
    with pytest.raises(TypeError, match="integer labels"):
        edge_masks(torch.zeros(1, 4, 4), 3, (2, 2))


@pytest.mark.parametrize("axis", [0, 1], ids=["down", "right"])
@pytest.mark.parametrize("width", [3, 7])
@pytest.mark.parametrize(
    ("size", "grid"),
    [
        pytest.param((64, 96), (8, 12), id="stride-8"),
        pytest.param((64, 96), (16, 24), id="stride-4"),
        pytest.param((61, 97), (8, 13), id="odd"),
        pytest.param((64, 96), (9, 11), id="odd-grid"),
        pytest.param((48, 48), (48, 48), id="same-size"),
        pytest.param((32, 40), (47, 61), id="finer-than-labels"),
    ],
)
def test_masks_have_the_position_of_resized_logits(size, grid, width, axis):
    """The centre of a mask that is resized to the labels, as logits are in the cross-entropy, is the labels' edge.

    A single edge may deviate by up to half a cell, because a cell is coarser than a pixel. The mean over all positions
    of the edge must not deviate.
    """
    margin = 2 * size[axis] // grid[axis] + width
    offsets = []
    for position in range(margin, size[axis] - margin + 1):
        labels = torch.zeros(1, *size, dtype=torch.uint8)
        labels.narrow(axis + 1, position, size[axis] - position).fill_(1)
        mask = edge_masks(labels, 2, grid, width)[:, :1]
        resized = torch.nn.functional.interpolate(mask, size, mode="bilinear", align_corners=False)[0, 0]
        profile = resized.double().mean(1 - axis)
        offsets.append((profile @ (torch.arange(size[axis]) + 0.5).double() / profile.sum()).item() - position)
    assert abs(np.mean(offsets)) < 0.01
