"""The format of images: which values are refused with which advice, how pictures are made, and what is compared."""

import numpy as np
import pytest
import torch

from bpkd_sdk.pixels import PixelFormat, check_pixels

WIDE = PixelFormat(4, (0, 65535))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "`channels` to be 1 to 16, but got 0"),
        ({"channels": 17}, "1 to 16"),
        ({"value_range": (1, 1)}, "lowest, highest"),
        ({"value_range": (0, float("nan"))}, "lowest, highest"),
        ({"channels": 4, "bands": (0, 1)}, "three indices of channels"),
        ({"channels": 4, "bands": (0, 1, 4)}, "each 0 to 3, but got .0, 1, 4"),
    ],
)
def test_a_format_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PixelFormat(**options)


@pytest.mark.parametrize(
    ("pixels", "image", "message"),
    [
        (PixelFormat(), torch.full((1,), 4000, dtype=torch.uint16), r"largest value is 4000.*value_range=\(0, 4095\)"),
        (PixelFormat(), torch.full((1,), 0.5), r"from 0.5 to 0.5: return the pixels as bytes"),
        (
            PixelFormat(4, (0, 4095)),
            np.array([0, 9000], np.uint16),
            r"from 0 to 9000, outside of 0 to 4095.*\(0, 16383",
        ),
        (WIDE, np.array([200], np.uint8), "pixels are uint8, but values of 0 to 65535"),
        (PixelFormat(2, (-1, 1)), np.array([0.5, np.nan]), "NaN or infinity"),
        (WIDE, np.array([2, 3], np.int64), "pixels are int64"),
    ],
)
def test_values_of_another_type_or_range_are_refused_with_the_range_to_state(pixels, image, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(pixels.problem(image))


def test_values_within_the_range_are_accepted():
    assert PixelFormat(2, (-1, 1)).problem(np.array([-1.0, 1.0], np.float32)) is None
    assert WIDE.problem(torch.tensor([0, 65535], dtype=torch.uint16)) is None
    assert PixelFormat(1, (0, 100)).problem(np.array([100], np.uint8)) is None


def test_pictures_show_the_bands_from_their_2nd_to_their_98th_percentile():
    image = np.zeros((10, 10, 4), np.uint16)
    image[..., 2] = np.arange(100).reshape(10, 10) * 40  # percentiles 2 and 98: 79.2 and 3880.8
    picture = PixelFormat(4, (0, 65535), (2, 1, 0)).picture(image)
    assert picture.shape == (10, 10, 3)
    assert (picture[..., 1:] == 0).all()
    assert picture[0, 2, 0] == round(255 * (80 - 79.2) / (3880.8 - 79.2))
    assert picture[9, 7, 0] == 255  # 3880 is next to the 98th percentile
    grey = PixelFormat(1, (0, 1)).picture(np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10, 1))
    assert (grey[..., 0] == grey[..., 2]).all()


def test_pictures_of_8_bit_rgb_are_the_images_themselves():
    image = np.zeros((2, 2, 3), np.uint8)
    assert PixelFormat().picture(image) is image
    assert PixelFormat().picture_rule == ""
    assert PixelFormat(4, (0, 65535), (2, 1, 0)).picture_rule == (
        "Channels 2, 1, 0 of 4 (counted from 0) as red, green and blue, each scaled from its 2nd to its 98th percentile."
    )


def test_a_network_of_other_channels_or_another_range_is_refused_with_both_sides():
    with pytest.raises(
        ValueError, match="The teacher takes images of 3 channels of 0 to 255, but d has 4 channels of 0 "
    ):
        check_pixels(PixelFormat(), WIDE, network_name="The teacher", data_name="d")
    with pytest.raises(ValueError, match="0 to 4095, but d has 4 channels of 0 to 65535, so that it would normalise"):
        check_pixels(PixelFormat(4, (0, 4095)), WIDE, network_name="It", data_name="d")
    check_pixels(PixelFormat(4, (0, 65535), (0, 1, 2)), WIDE, network_name="It", data_name="d")
