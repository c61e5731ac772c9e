"""Numpy arrays and torch tensors have the same results."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bpkd_sdk import NetworkSpec
from bpkd_sdk.arrays import class_ids, distinct_values, resize_bilinear
from bpkd_sdk.class_map import ClassGroups
from bpkd_sdk.classes import reorder_labels, reorder_logits, reorder_masks, two_class_logits
from bpkd_sdk.runtime.fit import FittedSize, fit_images
from bpkd_sdk.runtime.inference import resized_bands, sliding_bands, sliding_masks
from bpkd_sdk.sizes import resize_images, resize_label

SIZES = [(37, 53), (19, 106), (74, 26), (12, 17), (38, 53)]


def rng():
    return np.random.default_rng(0)


def bytes_of(*shape):
    return rng().integers(0, 256, shape, np.uint8)


def logits_of(*shape):
    return rng().normal(size=shape).astype(np.float32)


def both(function, array):
    """Return the results of a function for a numpy array and for a tensor, as arrays."""
    of_numpy, of_torch = function(array), function(torch.from_numpy(array))
    assert isinstance(of_numpy, np.ndarray)
    assert isinstance(of_torch, torch.Tensor)
    assert str(of_torch.dtype) == f"torch.{of_numpy.dtype}"
    return of_numpy, of_torch.numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resized_bytes_are_those_of_torchs_kernel_but_halfway_between_two(size):
    images = bytes_of(2, 3, 38, 53)
    found, of_torch = both(lambda images: resize_images(images, size), images)
    np.testing.assert_array_equal(found, of_torch)
    values = F.interpolate(torch.from_numpy(images).float(), size, mode="bilinear", antialias=True).numpy()
    difference = np.abs(found - values.round())
    assert difference.max() <= 1
    np.testing.assert_allclose(values[difference > 0] % 1, 0.5, atol=1e-3)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resized_images_and_logits_of_floating_point(size):
    values = logits_of(2, 4, 38, 53)
    found, of_torch = both(lambda x: resize_images(x, size), values)
    np.testing.assert_array_equal(found, of_torch)
    expected = F.interpolate(torch.from_numpy(values), size, mode="bilinear", antialias=True)
    np.testing.assert_allclose(found, expected, atol=5e-5)
    np.testing.assert_allclose(*both(lambda x: resize_bilinear(x, size), values), atol=1e-4)
    bands = [values[:, :, :11], values[:, :, 11:30], values[:, :, 30:]]
    whole = resize_bilinear(values, size)
    for parts in (bands, list(map(torch.from_numpy, bands))):
        joined = np.concatenate([np.asarray(band) for band in resized_bands(parts, 38, size)], axis=2)
        np.testing.assert_allclose(joined, whole, atol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resized_labels(size):
    np.testing.assert_array_equal(*both(lambda labels: resize_label(labels, size), bytes_of(2, 38, 53)))


@pytest.mark.parametrize("value_range", [(0, 255), (0, 4095)])
def test_normalised_and_padded_images(value_range):
    options = {"in_channels": 4, "mean": (0.1, 0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7, 0.8), "value_range": value_range}
    spec, pictures = NetworkSpec(None, 3, **options), bytes_of(2, 3, 20, 30)
    images, expected = both(spec.imitate, pictures)
    np.testing.assert_allclose(images, expected, atol=1e-3)
    np.testing.assert_allclose(*both(spec.normalize, images), rtol=1e-5, atol=1e-5)
    found, expected = both(lambda x: fit_images(x, FittedSize((20, 30), (32, 32)), spec), images)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found[:, :, 25, 31], [spec.mean_pixel] * 2, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows(batch_size):
    def window_logits(images):
        return images * 2 + images[:, :1]

    def window_masks(images):
        return images[:, 0] > 0

    def logits(images):
        bands = list(sliding_bands(window_logits, images, (16, 20), (7, 9), batch_size))
        return np.concatenate(bands, 2) if isinstance(images, np.ndarray) else torch.cat(bands, 2)

    images = logits_of(2, 3, 33, 41)
    found, expected = both(logits, images)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found, window_logits(images), atol=1e-5)
    found, expected = both(lambda x: sliding_masks(window_masks, x, (16, 20), (7, 9), batch_size), images)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, images[:, 0] > 0)


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_class_ids(channels):
    logits = logits_of(2, channels, 9, 11).round(1)  # rounded, so that some are equal
    found, expected = both(class_ids, logits)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, logits.argmax(1) if channels > 1 else logits[:, 0] > 0)


def test_reordered_and_merged_classes():
    order, logits, masks = (2, 0, 3, 1), logits_of(2, 4, 5, 6), bytes_of(2, 5, 6) % 4
    np.testing.assert_array_equal(*both(lambda x: reorder_logits(x, order), logits))
    found, _ = both(lambda x: reorder_masks(x, order), masks)
    np.testing.assert_array_equal(found, *both(lambda x: reorder_masks(x, order), masks)[1:])
    np.testing.assert_array_equal(class_ids(reorder_logits(logits, order)), reorder_masks(class_ids(logits), order))
    masks[0, 0] = 255
    labels, expected = both(lambda x: reorder_labels(x, order, 255), masks)
    np.testing.assert_array_equal(labels, expected)
    assert (labels[0, 0] == 255).all()
    groups = ClassGroups(((0, 2), (1,), ()))
    np.testing.assert_allclose(*both(groups.merge, logits), atol=1e-6)
    np.testing.assert_allclose(*both(lambda x: groups.merge(x, others=True), logits), atol=1e-6)
    for channels in (1, 2):
        np.testing.assert_array_equal(*both(two_class_logits, logits[:, :channels]))


def test_distinct_values_far_from_zero_need_no_large_table():
    values = torch.full((4, 4), 0xFF804020, dtype=torch.int64)
    values[0, 0] += 3
    for array in (values, values.numpy(), -values):
        assert distinct_values(array) == sorted(set(array.reshape(-1).tolist()))
