"""Images of any number of channels, read from arrays and files with their original values."""

import io
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from bpkd_sdk.images import TooLargeError, UnknownFormatError, read_image, read_pixels
from bpkd_sdk.pixels import PixelFormat

WIDE = PixelFormat(4, (0, 65535))
FLOATS = PixelFormat(6, (-1, 1))
values = np.random.default_rng(0)
FOUR = values.integers(0, 65536, (7, 9, 4)).astype(np.uint16)
SIX = values.uniform(-1, 1, (7, 9, 6)).astype(np.float32)


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric=options.pop("photometric", "minisblack"), **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def png(array):
    return cv2.imencode(".png", cv2.cvtColor(array, cv2.COLOR_RGBA2BGRA))[1].tobytes()


FILES = {
    "interleaved": (tiff(FOUR, planarconfig="contig"), WIDE, FOUR),
    "planar": (tiff(np.moveaxis(FOUR, -1, 0), planarconfig="separate"), WIDE, FOUR),
    "a page per channel": (tiff(np.moveaxis(FOUR, -1, 0)), WIDE, FOUR),
    "deflate": (tiff(FOUR, planarconfig="contig", compression="zlib", predictor=True), WIDE, FOUR),
    "big-endian": (tiff(FOUR, planarconfig="contig", byteorder=">"), WIDE, FOUR),
    "RGB and infrared": (tiff(FOUR, photometric="rgb", extrasamples=["unspecified"]), WIDE, FOUR),
    "six floats": (tiff(SIX, planarconfig="contig"), FLOATS, SIX),
    "pages of rows": (tiff(SIX), FLOATS, SIX),
    "signed": (
        tiff((SIX[..., 0] * 900).astype(np.int16)),
        PixelFormat(1, (-900, 900)),
        (SIX[..., :1] * 900).astype(int),
    ),
    "npy": (npy(FOUR), WIDE, FOUR),
    "npy of channels first": (npy(np.moveaxis(SIX, -1, 0)), FLOATS, SIX),
    "npy of float64": (npy(SIX.astype(np.float64)), FLOATS, SIX),
    "png": (png(FOUR), WIDE, FOUR),
    "png of bytes": (png((FOUR >> 8).astype(np.uint8)), PixelFormat(4), FOUR >> 8),
}


@pytest.mark.parametrize("name", FILES)
def test_files_keep_their_values(name, tmp_path):
    content, pixels, expected = FILES[name]
    image = read_pixels(content, pixels)
    assert image.dtype == (np.uint8 if pixels.is_uint8 else np.float32)
    np.testing.assert_array_equal(image, expected)
    (tmp_path / "a").write_bytes(content)
    np.testing.assert_array_equal(read_pixels(tmp_path / "a", pixels), expected)


def test_arrays_and_pil_images_are_read_as_files_are():
    np.testing.assert_array_equal(read_pixels(FOUR, WIDE), FOUR)
    np.testing.assert_array_equal(read_pixels(np.moveaxis(FOUR, -1, 0), WIDE), FOUR)
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.testing.assert_array_equal(read_pixels(Image.fromarray(grey), PixelFormat(1, (0, 4095))), grey[..., None])


def test_8_bit_rgb_is_read_as_before_with_alpha_over_white():
    content = png((FOUR >> 8).astype(np.uint8))
    np.testing.assert_array_equal(read_pixels(content, PixelFormat()), read_image(content))


def test_grey_images_have_one_channel_also_if_they_are_stored_as_rgb():
    grey = (FOUR[..., 0] >> 8).astype(np.uint8)
    for array in (grey, np.dstack([grey] * 3)):
        content = cv2.imencode(".png", array)[1].tobytes()
        np.testing.assert_array_equal(read_pixels(content, PixelFormat(1)), grey[..., None])
    with pytest.raises(ValueError, match="1 channel, but it has colours"):
        read_pixels(cv2.imencode(".png", np.uint8([[[1, 2, 3]]]))[1].tobytes(), PixelFormat(1))


def test_the_orientation_of_a_file_is_applied():
    turned = tiff(FOUR, planarconfig="contig", extratags=[(274, 3, 1, 6, True)])
    np.testing.assert_array_equal(read_pixels(turned, WIDE), np.rot90(FOUR, -1))


def bomb():
    """A file that states 7 x 9 pixels, whose compressed bytes are a thousand times as long."""
    content = bytearray(tiff(FOUR, planarconfig="contig", compression="zlib"))
    long = zlib.compress(bytes(FOUR.nbytes * 1000), 9)
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as file:
        tag = file.pages[0].tags["StripByteCounts"]
        offsets = file.pages[0].tags["StripOffsets"]
    content[tag.valueoffset : tag.valueoffset + 4] = len(long).to_bytes(4, "little")
    content[offsets.valueoffset : offsets.valueoffset + 4] = len(content).to_bytes(4, "little")
    return bytes(content) + long


@pytest.mark.parametrize(
    ("content", "pixels", "error", "message"),
    [
        (tiff(FOUR, planarconfig="contig"), FLOATS, ValueError, r"\(6, H, W\), but got the shape \(7, 9, 4\)"),
        (tiff(FOUR, planarconfig="contig"), PixelFormat(4, (0, 4095)), ValueError, "go from .* outside of 0 to 4095"),
        (tiff(np.where(SIX < 0.9, SIX, np.nan)), FLOATS, ValueError, "NaN"),
        (npy(FOUR[..., :3]), WIDE, ValueError, r"\(4, H, W\), but got the shape \(7, 9, 3\)"),
        (npy(np.array([None])), WIDE, ValueError, "array of uint8, uint16 or float32, but got object"),
        (npy(FOUR)[:200], WIDE, ValueError, "cannot be read|read"),
        (tiff(FOUR, planarconfig="contig")[:300], WIDE, ValueError, "as an image"),
        (bomb(), WIDE, ValueError, "compressed pixels are longer than the image"),
        (b"\xff\xd8\xff\xe0 jpeg", WIDE, UnknownFormatError, "TIFF, NPY, PNG for images of 4 channels of 0 to 65535"),
    ],
)
def test_files_with_other_channels_or_values_are_refused(content, pixels, error, message):
    with pytest.raises(error, match=message):
        read_pixels(content, pixels)


@pytest.mark.parametrize("name", [None, "a.npy", "a.NPY"])
def test_npy_files_of_rgb_images_are_read(name, tmp_path):
    image = (FOUR[..., :3] >> 8).astype(np.uint8)
    source = npy(image)
    if name is not None:
        (tmp_path / name).write_bytes(source)
        source = tmp_path / name
    assert np.array_equal(read_pixels(source, PixelFormat()), image)
    with pytest.raises(UnknownFormatError):
        read_pixels(source, PixelFormat(), formats=("JPEG", "PNG"))


def test_the_size_is_checked_before_the_pixels_are_read():
    header = npy(np.zeros((2, 2, 4), np.uint16)).replace(b"(2, 2, 4)", b"(70000, 90000, 4)")
    for content in (header, tiff(FOUR, planarconfig="contig"), png(FOUR)):
        with pytest.raises(TooLargeError):
            read_pixels(content, WIDE, max_pixels=50)
