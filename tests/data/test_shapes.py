"""Tests of the generated scenes: size, determinism, and properties of objects and labels."""

import colorsys
from itertools import combinations

import cv2
import numpy as np
import pytest

from bpkd_sdk.data.shapes import CLASS_NAMES, PALETTE, render


@pytest.fixture(scope="module")
def scenes():
    return [render(0, "train", index) for index in range(200)]


def pixels_of(label, name):
    return (label == CLASS_NAMES.index(name)).astype(np.uint8)


@pytest.mark.parametrize("size", [(128, 128), (32, 48), (96, 161), (161, 96), (256, 320)], ids=str)
def test_image_and_label_have_the_requested_size(size):
    image, label = render(0, "train", 1, size)
    assert image.shape == (*size, 3)
    assert label.shape == size
    assert image.dtype == label.dtype == np.uint8
    assert image.flags.c_contiguous
    assert label.flags.c_contiguous


def test_the_same_arguments_give_the_same_scene():
    for first, second in zip(render(3, "val", 7, (96, 161)), render(3, "val", 7, (96, 161)), strict=True):
        np.testing.assert_array_equal(first, second)


def test_seed_split_and_index_each_give_another_scene():
    labels = [render(*arguments)[1] for arguments in [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1)]]
    assert all((a != b).mean() > 0.01 for a, b in combinations(labels, 2))


def test_the_global_random_state_is_not_used():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    render(0, "train", 0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_every_class_is_in_a_fifth_of_the_scenes_or_more(scenes):
    present = np.mean([np.bincount(label.ravel(), minlength=len(CLASS_NAMES)) > 0 for _, label in scenes], axis=0)
    assert len(present) == len(CLASS_NAMES)
    assert dict(zip(CLASS_NAMES, present >= 0.2, strict=True)) == dict.fromkeys(CLASS_NAMES, True)


@pytest.mark.parametrize("name", ["pole", "wire"])
def test_lines_are_thin(scenes, name):
    square = np.ones((7, 7), np.uint8)
    remaining = total = 0
    for _, label in scenes:
        line = pixels_of(label, name)
        remaining += cv2.erode(line, square, borderValue=0).sum()
        total += line.sum()
    assert total > 0
    assert remaining < 0.001 * total  # the crossings of two lines


def test_fences_have_holes(scenes):
    square = np.ones((5, 5), np.uint8)
    fences = [fence for _, label in scenes if (fence := pixels_of(label, "fence")).any()]
    hidden = [cv2.morphologyEx(fence, cv2.MORPH_CLOSE, np.ones((15, 15), np.uint8)).sum() for fence in fences]
    assert sum(fence.sum() for fence in fences) < 0.6 * sum(hidden)
    assert sum(cv2.erode(fence, square, borderValue=0).sum() for fence in fences) < 0.01 * sum(hidden)


def test_edges_of_the_image_lie_on_edges_of_the_label(scenes):
    on, off = [], []
    for image, label in scenes[:50]:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        gradient = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
        border = cv2.morphologyEx(label, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        on.append(gradient[border])
        off.append(gradient[~border])
    assert np.concatenate(on).mean() > 3 * np.concatenate(off).mean()


def test_colour_alone_does_not_determine_the_class(scenes):
    """The class of the nearest hue is better than chance (1 in 8), and often wrong."""
    guesses = []
    for image, label in scenes:
        for class_id in np.unique(label[label > 0]):
            hue = colorsys.rgb_to_hsv(*(image[label == class_id].mean(axis=0) / 255))[0]
            distance = [abs((hue - guess / len(CLASS_NAMES) + 0.5) % 1 - 0.5) for guess in range(1, len(CLASS_NAMES))]
            guesses.append(1 + int(np.argmin(distance)) == class_id)
    assert 0.3 < np.mean(guesses) < 0.8, np.mean(guesses)


def test_every_class_has_a_different_colour():
    assert len(PALETTE) == len(set(PALETTE)) == len(CLASS_NAMES) == len(set(CLASS_NAMES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, "train", 0, (31, 128)), "at least 32"), ((-1, "train", 0), "0 or more"), ((0, "train", -1), "0 or more")],
    ids=["size", "seed", "index"],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        render(*arguments)
