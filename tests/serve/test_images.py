"""The same picture, however it comes."""

import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from bpkd_sdk.serve.images import FORMATS, TooLargeError, UnknownFormatError, read_image
from tests.serve.cases import encoded

COLORS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 13
GREY = COLORS[..., 0]
EXIF_ORIENTATION = 0x0112

# How a file of that orientation stores the picture: what has to be done to the picture to get the stored pixels.
STORED = {
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: picture.swapaxes(0, 1)[::-1],
    7: lambda picture: picture.swapaxes(0, 1)[::-1, ::-1],
    8: lambda picture: picture.swapaxes(0, 1)[:, ::-1],
}


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=2)


def orientation(value):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = value
    return exif


@pytest.mark.parametrize("value", STORED)
@pytest.mark.parametrize("pixels", [COLORS, COLORS[..., 0].astype(np.uint16) * 257], ids=["RGB", "16 bit grey"])
def test_pictures_stand_upright(pixels, value):
    read = read_image(encoded(STORED[value](pixels), exif=orientation(value)))
    np.testing.assert_array_equal(read, pixels if pixels.ndim == 3 else grey(GREY))


def test_jpeg_and_webp_stand_upright():
    """The picture that a person sees: red on the left, blue on the right."""
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32, 0] = picture[:, 32:, 2] = 200
    for file_format in ("JPEG", "WEBP"):
        read = read_image(encoded(STORED[6](picture), file_format, exif=orientation(6), quality=95))
        assert read.shape == picture.shape
        assert np.abs(read.astype(int) - picture)[:, [5, 58]].max() < 12


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (COLORS, COLORS),
        (GREY, grey(GREY)),
        (GREY[..., None], grey(GREY)),
        (GREY > 100, grey((GREY > 100) * 255)),
        (np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16), grey([[0, 0, 1, 1, 128, 255]])),
        (np.dstack([COLORS, np.full((2, 3), 255, np.uint8)]), COLORS),
        (np.dstack([COLORS, np.zeros((2, 3), np.uint8)]), np.full_like(COLORS, 255)),
        (np.array([[[100, 0, 255, 51]]], np.uint8), np.array([[[224, 204, 255]]], np.uint8)),
        (COLORS.astype(np.uint16) * 257, COLORS),
    ],
    ids=["RGB", "grey", "one channel", "bool", "16 bit", "opaque", "clear", "20 percent", "16 bit RGB"],
)
def test_arrays(pixels, expected):
    before = pixels.copy()
    read = read_image(pixels)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(pixels, before)


def test_an_rgb_array_is_not_copied():
    assert read_image(COLORS) is COLORS


HALF = np.full((2, 3), 128, np.uint8)
OVER_WHITE = np.rint(COLORS * (128 / 255) + 255 * (127 / 255)).astype(np.uint8)
INDEXED = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
INDEXED.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.fromarray(GREY), {}, grey(GREY)),
        (Image.fromarray(GREY > 100), {}, grey((GREY > 100) * 255)),
        (Image.fromarray(np.dstack([COLORS, HALF])), {}, OVER_WHITE),
        (Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(HALF)]), {}, grey(OVER_WHITE[..., 0])),
        (INDEXED, {}, np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)),
        (INDEXED, {"transparency": 1}, np.array([[[255, 0, 0], [255, 255, 255], [0, 0, 255]]], np.uint8)),
        (Image.fromarray(GREY), {"transparency": 0}, grey(np.where(GREY == 0, 255, GREY))),
        (Image.fromarray(GREY.astype(np.uint16) * 257), {}, grey(GREY)),
    ],
    ids=["L", "1", "RGBA", "LA", "P", "P with a clear colour", "L with a clear value", "I;16"],
)
def test_modes_of_png(image, options, expected):
    np.testing.assert_array_equal(read_image(encoded(image, **options)), expected)
    if not options:
        np.testing.assert_array_equal(read_image(image), expected)


def test_sixteen_bits_and_three_channels():
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3), np.uint16)
    ok, content = cv2.imencode(".png", values[..., ::-1])
    assert ok
    np.testing.assert_allclose(read_image(content.tobytes()), values / 257, atol=1)


def test_sixteen_bits_in_either_byte_order():
    values = GREY.astype(np.uint16) * 257
    big = Image.frombytes("I;16B", (3, 2), values.astype(">u2").tobytes())
    for image in (values, big):
        np.testing.assert_array_equal(read_image(encoded(image, "TIFF")), grey(GREY))


def test_cmyk():
    ink = Image.fromarray(np.full((2, 2, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    np.testing.assert_array_equal(read_image(ink), np.full((2, 2, 3), (255, 0, 0), np.uint8))
    read = read_image(encoded(ink, "JPEG", quality=100))
    assert np.abs(read.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_scale_that_is_not_known_is_not_guessed(mode):
    with pytest.raises(ValueError, match=f"8 or 16 bits a channel, but got PIL's mode '{mode}'"):
        read_image(encoded(Image.new(mode, (2, 2), 1), "TIFF"))


def test_the_content_decides_and_not_the_name(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(COLORS, "BMP"))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(read_image(source), COLORS)
    with pytest.raises(UnknownFormatError, match="of the formats PNG, but .*photo.jpg is none of them"):
        read_image(path, formats=("PNG",))
    for file_format in set(FORMATS) - {"JPEG"}:
        options = {"lossless": True} if file_format == "WEBP" else {}
        np.testing.assert_array_equal(read_image(encoded(COLORS, file_format, **options)), COLORS)


def test_an_animation_is_its_first_frame():
    frames = [Image.fromarray(COLORS), Image.fromarray(255 - COLORS)]
    animation = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(animation), COLORS)


@pytest.mark.parametrize("source", [COLORS, Image.fromarray(COLORS), encoded(COLORS)], ids=["array", "PIL", "bytes"])
def test_too_many_pixels(source):
    with pytest.raises(TooLargeError, match="at most 5 pixels, but got 2 x 3"):
        read_image(source, largest=5)
    assert read_image(source, largest=6).shape == (2, 3, 3)


def test_a_bomb_is_refused_before_it_is_decoded():
    """20,000 x 20,000 grey pixels in a few bytes of a PNG that ends early: decoding it would fail in another way."""
    content = bytearray(encoded(GREY))
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(TooLargeError, match="400000000 pixels"):
        read_image(bytes(content))
    with pytest.raises(TooLargeError):
        read_image(bytes(content), largest=10)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no/such/photo.png", FileNotFoundError, "no image at no/such/photo.png"),
        (b"", UnknownFormatError, "file of 0 bytes is none of them"),
        (b"<svg/>", UnknownFormatError, "file of 6 bytes is none of them"),
        (
            encoded(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8))[:5000],
            ValueError,
            "Cannot read the file of 5000 bytes as an image: .*truncated",
        ),
        (None, TypeError, "but got NoneType"),
        (COLORS.astype(float), TypeError, "but got float64. Scale floats to 0..255"),
        (COLORS[..., :2], ValueError, r"but got \(2, 3, 2\)"),
        (COLORS[None], ValueError, r"but got \(1, 2, 3, 3\)"),
        (COLORS[:0], ValueError, "an image with pixels, but got 0 x 3"),
        (Image.new("RGB", (0, 2)), ValueError, "an image with pixels, but got 2 x 0"),
    ],
    ids=["no file", "empty", "svg", "truncated", "None", "float", "two channels", "batch", "no rows", "no columns"],
)
def test_refuses(source, error, message):
    with pytest.raises(error, match=message):
        read_image(source)
