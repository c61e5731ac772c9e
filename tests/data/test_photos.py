"""Tests of the photographs that come with the package."""

from itertools import combinations

import pytest
import torch

from bpkd_sdk.data.photos import PHOTOS, photo


@pytest.mark.parametrize("size", [(33, 65), (300, 451), (97, 33), (1024, 1), (513, 1025)], ids=str)
def test_an_image_has_the_requested_size(size):
    image = photo(1, size)
    assert image.shape == (3, *size)
    assert image.dtype is torch.uint8


def test_equal_indices_give_equal_images_and_others_differ():
    images = [photo(index, (64, 96)) for index in range(4 * len(PHOTOS))]
    assert torch.equal(images[5], photo(5, (64, 96)))
    differences = [(a.float() - b.float()).abs().mean().item() for a, b in combinations(images, 2)]
    assert min(differences) > 2


def test_a_size_without_pixels_is_refused():
    with pytest.raises(ValueError, match=r"at least 1 pixel each, but got \(0, 32\)"):
        photo(0, (0, 32))
