"""Tests of the image reader: arrays, PIL images and files of all kinds, and every part that reads images."""

import json
import os
import re
import subprocess
import sys
import warnings
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bpkd_sdk
from bpkd_sdk.data import open_dataset
from bpkd_sdk.images import (
    FORMATS,
    CutShortError,
    TooLargeError,
    UnknownFormatError,
    UnsupportedImageError,
    bit_depth,
    exif_orientation,
    read_image,
)
from bpkd_sdk.serve import Predictor
from bpkd_sdk.serve.demo.scene import Scene
from bpkd_sdk.serve.service.limits import Limits
from tests.image_files import (
    END,
    STORED,
    TIFF_GREY,
    TIFF_RGB,
    chunk,
    deep,
    exif_chunk,
    image_files,
    photo,
    png,
    tiff,
)
from tests.serve.cases import encoded, pixels, served

COLORS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 13
GREY = COLORS[..., 0]
EXIF_ORIENTATION = 0x0112


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=2)


def orientation(value):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = value
    return exif


@pytest.mark.parametrize("value", STORED)
@pytest.mark.parametrize("pixels", [COLORS, COLORS[..., 0].astype(np.uint16) * 257], ids=["RGB", "16 bit grey"])
def test_images_are_upright(pixels, value):
    read = read_image(encoded(STORED[value](pixels), exif=orientation(value)))
    np.testing.assert_array_equal(read, pixels if pixels.ndim == 3 else grey(GREY))


def test_jpeg_and_webp_are_upright():
    """The upright image is red on the left and blue on the right."""
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
def test_modes_without_a_defined_white_are_refused(mode):
    with pytest.raises(ValueError, match=f"8 or 16 bits a channel, but got PIL's mode '{mode}'"):
        read_image(encoded(Image.new(mode, (2, 2), 1), "TIFF"))


def test_the_format_is_determined_from_the_content(tmp_path):
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
        read_image(source, max_pixels=5)
    assert read_image(source, max_pixels=6).shape == (2, 3, 3)


def test_a_bomb_is_refused_before_it_is_decoded():
    """The header states 20,000 x 20,000 grey pixels, and the file ends early: decoding would raise another error."""
    content = bytearray(encoded(GREY))
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(TooLargeError, match="400000000 pixels"):
        read_image(bytes(content))
    with pytest.raises(TooLargeError):
        read_image(bytes(content), max_pixels=10)


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
def test_invalid_sources_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        read_image(source)


FILES = {file.name: file for file in image_files()}
READ = [file for file in FILES.values() if file.pixels is not None]
REFUSED = [file for file in FILES.values() if file.pixels is None]


@pytest.mark.parametrize("name", [file.name for file in READ])
def test_files_are_read(name):
    file = FILES[name]
    read = read_image(file.content)
    assert (read.dtype, read.shape) == (np.uint8, file.pixels.shape)
    assert np.abs(read.astype(int) - file.pixels).max() <= file.tolerance
    assert read.flags.writeable
    assert read.flags.c_contiguous


@pytest.mark.parametrize("name", [file.name for file in REFUSED])
def test_files_are_refused(name, tmp_path):
    file = FILES[name]
    with pytest.raises(ValueError, match=file.error) as caught:
        read_image(file.content)
    if not isinstance(caught.value, (TooLargeError, UnsupportedImageError)):
        assert f"the file of {len(file.content)} bytes" in str(caught.value)
    path = tmp_path / name
    path.write_bytes(file.content)
    with pytest.raises(ValueError, match=file.error) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert ("is cut short" in file.error) == isinstance(caught.value, CutShortError)


class Code(nn.Module):
    """A network whose mask is a number computed from the red, green and blue of each pixel."""

    def __init__(self):
        super().__init__()
        self.spec = bpkd_sdk.NetworkSpec(None, 256, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.eval()

    def forward(self, images):
        number = ((images * 255).round() * torch.tensor([1.0, 3.0, 7.0]).view(3, 1, 1)).sum(1).long() % 256
        return nn.functional.one_hot(number, 256).permute(0, 3, 1, 2).float()


def code(image):
    return (image.astype(int) @ [1, 3, 7] % 256).astype(np.uint8)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Paths of all files of the corpus, in order."""
    folder = tmp_path_factory.mktemp("files")
    paths = []
    for index, file in enumerate(FILES.values()):
        path = folder / f"{index:04d}.{file.name.rpartition('.')[2]}"
        path.write_bytes(file.content)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def expected():
    """Images that the reader returns for the bytes of all files; None for files that it refuses."""
    return [None if file.pixels is None else read_image(file.content) for file in FILES.values()]


class TestEntryPoints:
    """Every entry point reads each file with the same pixels, or refuses it."""

    def check(self, expected, read, inputs):
        """Assert that every input gives the expected array, or a ValueError if None is expected."""
        wrong = []
        for file, image, value in zip(FILES.values(), expected, inputs, strict=True):
            try:
                result = read(value)
            except ValueError as error:
                result = error
            if image is None and not isinstance(result, ValueError):
                wrong.append(f"{file.name}: not refused")
            elif image is not None and not np.array_equal(image, result):
                wrong.append(f"{file.name}: {result if isinstance(result, Exception) else 'other pixels'}")
        assert wrong == []

    def test_paths(self, paths, expected):
        self.check(expected, read_image, paths)
        self.check(expected, read_image, map(str, paths))

    def test_training_evaluation_and_calibration(self, paths, expected, tmp_path):
        """All of them read a data set."""
        for part in ("images", "labels"):
            (tmp_path / part / "train").mkdir(parents=True)
        (tmp_path / "classes.json").write_text(json.dumps(["one", "two"]))
        for path, image in zip(paths, expected, strict=True):
            (tmp_path / "images/train" / path.name).write_bytes(path.read_bytes())
            size = (4, 4) if image is None else image.shape[:2]
            Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / f"labels/train/{path.stem}.png")
        data = open_dataset("folder", root=tmp_path, split="train")
        assert [pair.image.name for pair in data.pairs] == [path.name for path in paths]
        self.check(expected, lambda index: data[index][0].permute(1, 2, 0).numpy(), range(len(data)))
        for index, image in enumerate(expected):
            if image is None:
                with pytest.raises(ValueError, match=re.escape(f"{data.pairs[index].image}: ")):
                    data[index]

    def test_predictor(self, paths, expected):
        predictor = Predictor(Code(), "cpu")
        masks = [None if image is None else code(image) for image in expected]
        self.check(masks, lambda source: predictor(source).mask, paths)
        self.check(masks, lambda source: predictor(source).mask, [file.content for file in FILES.values()])

    def test_service(self, expected):
        """The service and the page do not accept TIFF."""
        masks = [
            None if image is None or file.is_tiff else code(image)
            for file, image in zip(FILES.values(), expected, strict=True)
        ]
        with served(Code()) as server:

            def segment(content):
                response = server.segment(content, params={"format": "mask"})
                if response.status_code in (400, 413, 415, 422):
                    raise ValueError(response.json()["detail"])
                return pixels(response)

            self.check(masks, segment, [file.content for file in FILES.values()])

    def test_page(self, paths, expected):
        """The service and the page do not accept TIFF."""
        images = [
            None if image is None or file.is_tiff else image
            for file, image in zip(FILES.values(), expected, strict=True)
        ]
        self.check(images, lambda path: Scene.open(path, Limits()).image, paths)

    def test_pil_images(self, paths, expected):
        """Skip files whose values Pillow does not keep: 16 bits with several channels, clear greys below 8 bits."""
        for file, path, image in zip(FILES.values(), paths, expected, strict=True):
            unlike = ("16 bits", "12 bits", "bits with a clear", "12 packed", "12 stated", "channels", "white is 0,")
            if image is None or any(words in file.name for words in unlike) or "no end" in file.name:
                continue
            if "zeros for its end" in file.name:
                continue
            with Image.open(path) as opened:
                assert np.abs(read_image(opened).astype(int) - image).max() <= 2, file.name


class TestOrientation:
    @pytest.mark.parametrize("value", STORED)
    def test_of_each_format(self, value, tmp_path):
        """The orientation is read from the header: the pixels of these files are damaged."""
        exif = orientation(value)
        for content in (
            encoded(photo(), "JPEG", exif=exif)[:-300] + END,
            encoded(photo(), "WEBP", exif=exif),
            tiff(photo(), TIFF_RGB, tags={274: ("H", [value])})[:-300],
            FILES["RGB.png"].content[:33]
            + exif_chunk(value)
            + FILES["colour type 2 of 8 bits, one bit changed.png"].content[33:],
            png(photo(), 2, after=[exif_chunk(value)]),
        ):
            path = tmp_path / "image"
            path.write_bytes(content)
            assert exif_orientation(content) == exif_orientation(path) == exif_orientation(str(path)) == value

    def test_is_1_if_the_file_states_none(self):
        for file_format in FORMATS:
            assert exif_orientation(encoded(COLORS, file_format)) == 1
        assert exif_orientation(tiff(COLORS, TIFF_RGB, tags={274: ("H", [9])})) == 1
        assert exif_orientation(FILES["damaged EXIF.jpg"].content) == 1

    def test_of_xmp_data(self):
        xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
        text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
        stored = STORED[6](COLORS)
        for content in (
            png(stored, 2, before=[text]),
            png(stored, 2, after=[text]),
            tiff(stored, TIFF_RGB, tags={700: ("B", list(xmp))}),
            tiff(stored.astype(np.uint16) * 257, TIFF_RGB, tags={700: ("B", list(xmp))}),
        ):
            assert exif_orientation(content) == 6
            np.testing.assert_array_equal(read_image(content), COLORS)

    def test_errors_name_the_file(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"no image")
        with pytest.raises(UnknownFormatError, match=r"a\.png: cannot be read as an image"):
            exif_orientation(tmp_path / "a.png")


class TestBitDepth:
    @pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_an_array_and_its_files_agree(self, depth, channels):
        values = deep(depth, channels)
        photometric = TIFF_GREY if channels == 1 else TIFF_RGB
        color = {1: 0, 3: 2, 4: 6}[channels]
        sources = [values, png(values, color, 16), tiff(values, photometric), tiff(values, photometric, order=">")]
        assert [bit_depth(source) for source in sources] == [depth] * 4
        for source in sources[1:]:
            np.testing.assert_array_equal(read_image(source), read_image(values))

    @pytest.mark.parametrize("largest", [255, 1023, 4095, 16383, 65535])
    def test_the_largest_value_of_a_depth_is_white(self, largest):
        values = np.array([[0, 1, largest // 2, largest]], np.uint16)
        expected = np.rint(values * (255 / largest)).astype(np.uint8)
        np.testing.assert_array_equal(read_image(values), grey(expected))
        if largest < 65535:
            assert bit_depth(values + 1) > bit_depth(values)

    def test_the_stated_depth_takes_precedence(self):
        dark = deep(12) // 20  # at most 204
        assert bit_depth(png(dark, 2, 16)) == 8
        assert bit_depth(png(dark, 2, 16, [chunk(b"sBIT", bytes([12, 14, 12]))])) == 14
        assert bit_depth(png(dark, 2, 16, [chunk(b"sBIT", bytes([16] * 3))])) == 16
        assert bit_depth(png(dark << 4, 2, 16, [chunk(b"sBIT", bytes([12] * 3))])) == 16
        assert bit_depth(tiff(dark, TIFF_RGB, depth=12)) == 12
        assert bit_depth(tiff(dark, TIFF_RGB, tags={281: ("H", [65535] * 3)})) == 16
        assert bit_depth(tiff(dark, TIFF_RGB, tags={281: ("H", [3817] * 3)})) == 12
        assert bit_depth(tiff(dark, TIFF_RGB, tags={281: ("H", [100] * 3)})) == 8

    def test_files_of_8_bits_are_not_decoded(self):
        assert bit_depth(encoded(photo(), "JPEG")[:-300] + END) == 8
        assert bit_depth(encoded(COLORS)) == bit_depth(COLORS) == bit_depth(Image.fromarray(COLORS)) == 8


class TestErrors:
    def test_folders_and_devices_are_refused(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "folder.png").mkdir()
        for name, kind in (("pipe.png", "device or pipe"), ("folder.png", "folder")):
            with pytest.raises(ValueError, match=f"{name}: is a {kind}. Expected an image file"):
                read_image(tmp_path / name)
        with pytest.raises(ValueError, match="/dev/zero: is a device or pipe"):
            read_image("/dev/zero")

    def test_a_pil_image_of_a_damaged_file(self, tmp_path):
        path = tmp_path / "photo.png"
        path.write_bytes(encoded(photo())[:3000])
        with (
            Image.open(path) as image,
            pytest.raises(ValueError, match=r"photo\.png: cannot be read as an image: .*trunc"),
        ):
            read_image(image)

    @pytest.mark.parametrize("file_format", FORMATS)
    def test_the_size_is_checked_before_the_pixels(self, file_format, tmp_path):
        content = encoded(photo(), file_format)
        path = tmp_path / "photo"
        path.write_bytes(content[: -len(content) // 3] + bytes(len(content) // 3))
        with pytest.raises(TooLargeError, match=r"photo: .* at most 5,062 pixels, but got 61 x 83"):
            read_image(path, max_pixels=61 * 83 - 1)

    @pytest.mark.parametrize("file_format", FORMATS)
    def test_pillow_does_not_warn_of_large_images(self, file_format, monkeypatch):
        content = encoded(photo(), file_format)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 61 * 83 - 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(content).shape == (61, 83, 3)
            read_image(encoded(photo(), "JPEG", progressive=True))

    @pytest.mark.parametrize("progressive", [False, True])
    def test_small_truncations_are_refused(self, progressive):
        """A few missing bytes cannot be detected, since the last block may not need all of its bytes."""
        content = encoded(photo(120, 160), "JPEG", quality=95, progressive=progressive)
        refused = 0
        for missing in range(12, 112, 2):
            try:
                read_image(content[:-missing])
            except CutShortError:
                refused += 1
        assert refused >= 48  # of 50

    def test_a_progressive_file_that_ends_between_two_scans_is_refused(self):
        content = encoded(photo(120, 160), "JPEG", progressive=True)
        with pytest.raises(CutShortError, match="other data follow its last scan"):
            read_image(content[: content.rindex(b"\xff\xda") - 1])

    def test_too_many_scans_are_refused(self):
        content = encoded(photo(), "JPEG", progressive=True)
        scan = content.rindex(b"\xff\xda")
        with pytest.raises(ValueError, match="at most 500 are read"):
            read_image(content[:-2] + content[scan:-2] * 600 + END)

    def test_unsupported_images_are_value_errors(self):
        for error in (CutShortError, TooLargeError, UnknownFormatError, UnsupportedImageError):
            assert issubclass(error, ValueError)


def test_the_reader_needs_no_torch():
    code = "import sys, bpkd_sdk.images; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_name_in_serve_is_the_same_function():
    from bpkd_sdk.serve.images import read_image as served_image

    assert served_image is read_image is bpkd_sdk.serve.read_image
