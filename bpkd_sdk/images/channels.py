"""Reads images of any `PixelFormat` with their original values: TIFF with tifffile, NPY with numpy, and PNG."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from bpkd_sdk.images.png import PngReader
from bpkd_sdk.images.reader import FORMATS, MAX_PIXELS, ImageSource, check_size, open_content, read_image
from bpkd_sdk.images.samples import UnknownFormatError, UnsupportedImageError, upright
from bpkd_sdk.pixels import PixelFormat

RAW_FORMATS = ("TIFF", "NPY", "PNG")
_NPY = b"\x93NUMPY"
_MAGIC = {_NPY: "NPY", b"\x89PNG\r\n": "PNG"}
_DEFLATE = (8, 32946)
_COMPRESSIONS = (1, 5, *_DEFLATE, 32773)  # none, LZW, deflate, PackBits
_SIMPLE_TYPES = "bhefdBH"  # kinds of numbers that float32 holds without loss, and float64


def formats_of(pixels: PixelFormat) -> tuple[str, ...]:
    """Return the formats of files that can contain images of a `PixelFormat`."""
    return (*FORMATS, "NPY") if pixels.is_rgb8 or _is_grey8(pixels) else RAW_FORMATS


def read_pixels(
    source: ImageSource,
    pixels: PixelFormat,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> np.ndarray:
    """Read an image of a `PixelFormat`.

    8-bit RGB is read by `read_image`, and so is 8-bit grey, of which the three equal channels become one. All other
    images keep their values: nothing is scaled, and a fourth channel is not transparency. They are arrays, TIFF files
    (one page with all channels, or one page per channel), NPY files, or PNG files. Arrays and NPY files are
    (H, W, channels) or (channels, H, W), and also (H, W) for one channel.

    Args:
        source: Array, PIL image, path, or bytes of a file.
        pixels: Format of the image.
        max_pixels: Largest number of pixels, checked before a file is decoded.
        formats: Allowed formats of a file; None: all of `formats_of`.

    Returns:
        (H, W, channels): uint8 if `pixels.is_uint8`, otherwise float32.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the image has other channels, values outside of the range, or cannot be read; the message names
            the file. The errors of `read_image` are raised too.
    """
    formats = formats_of(pixels) if formats is None else formats
    if pixels.is_rgb8 and not ("NPY" in formats and _is_npy(source)):
        return read_image(source, max_pixels=max_pixels, formats=formats)
    if isinstance(source, np.ndarray):
        return _checked(source, pixels, max_pixels)
    if isinstance(source, Image.Image):
        if _is_grey8(pixels):
            return _grey(read_image(source, max_pixels=max_pixels))
        return _checked(np.asarray(source), pixels, max_pixels)
    with open_content(source) as (file, name):
        head = file.read(8)
        file.seek(0)
        is_tiff = head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        kind = "TIFF" if is_tiff else _MAGIC.get(head[:6])
        if kind != "NPY" and _is_grey8(pixels):
            return _grey(read_image(file.read(), max_pixels=max_pixels, formats=formats))
        if kind is None or kind not in formats:
            raise UnknownFormatError(
                f"Expected a file of the formats {', '.join(formats)} for images of {pixels}, but {name} is none of "
                "them."
            )
        decode = {"TIFF": _decode_tiff, "NPY": _decode_npy, "PNG": _decode_png}[kind]
        return _checked(decode(file, pixels, max_pixels), pixels, max_pixels)


def _is_npy(source: ImageSource) -> bool:
    """Return whether a source is an NPY file: bytes by their content, a path by its name, so that it is opened once."""
    if isinstance(source, bytes):
        return source.startswith(_NPY)
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".npy"


def _is_grey8(pixels: PixelFormat) -> bool:
    return pixels.channels == 1 and pixels.is_uint8


def _grey(image: np.ndarray) -> np.ndarray:
    """Return the one channel of a grey image that was read as RGB."""
    if (image != image[..., :1]).any():
        raise UnsupportedImageError("Expected an image of 1 channel, but it has colours. Save it as grey.")
    return np.ascontiguousarray(image[..., :1])


def _checked(array: np.ndarray, pixels: PixelFormat, max_pixels: int) -> np.ndarray:
    """Return decoded values as (H, W, channels) of the format's type; raise ValueError if they do not have it."""
    values = _channels_last(array, pixels)
    check_size(values.shape[0], values.shape[1], max_pixels)
    if problem := pixels.problem(values):
        raise UnsupportedImageError(f"Expected an image of {pixels}, but {problem}.")
    return np.ascontiguousarray(values, np.uint8 if pixels.is_uint8 else np.float32)


def _channels_last(array: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    count = pixels.channels
    if array.ndim == 2 and count == 1:
        return array[..., None]
    if array.ndim == 3 and array.shape[2] == count:
        return array
    if array.ndim == 3 and array.shape[0] == count:
        return np.moveaxis(array, 0, -1)
    raise UnsupportedImageError(
        f"Expected an image of {pixels}, (H, W, {count}) or ({count}, H, W), but got the shape {array.shape}."
    )


def _decode_png(file: IO[bytes], pixels: PixelFormat, max_pixels: int) -> np.ndarray:
    reader = PngReader(file)
    check_size(reader.height, reader.width, max_pixels)
    samples = reader.decode()
    return upright(samples.values, samples.orientation)


def _decode_npy(file: IO[bytes], pixels: PixelFormat, max_pixels: int) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    read_header: Any = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
    shape, _, kind = read_header(file)
    if kind.char not in _SIMPLE_TYPES:
        raise UnsupportedImageError(f"Expected an array of uint8, uint16 or float32, but got {kind}.")
    height, width, _ = _channels_last(np.broadcast_to(np.uint8(0), shape), pixels).shape  # before values are read
    check_size(height, width, max_pixels)
    file.seek(0)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _decode_tiff(file: IO[bytes], pixels: PixelFormat, max_pixels: int) -> np.ndarray:
    """Decode the first page; or for several pages of one channel each, all of them."""
    from tifffile import TiffFile

    with TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        is_stack = page.samplesperpixel == 1 and pixels.channels > 1 and len(tiff.pages) > 1
        shape = tiff.series[0].shape if is_stack else (page.imagelength, page.imagewidth, page.samplesperpixel)
        height, width, _ = _channels_last(np.broadcast_to(np.uint8(0), shape), pixels).shape  # before pixels are read
        check_size(height, width, max_pixels)
        for each in tiff.pages if is_stack else [page]:
            _check_page(file, each)
        try:
            return np.asarray(tiff.series[0].asarray()) if is_stack else _upright_page(page)
        except KeyError as error:  # tifffile names the codec and the package imagecodecs
            raise UnsupportedImageError(
                f"The compression of the file cannot be read ({error.args[0]}). Install it with: pip install "
                "imagecodecs, or save the file without compression."
            ) from error


def _check_page(file: IO[bytes], page: Any) -> None:
    """Raise an error for a page whose values are no channels, or whose compression is not allowed or not valid."""
    if page.photometric == 3 or (page.photometric == 0 and page.samplesperpixel == 1):
        raise UnsupportedImageError(
            f"Expected values of channels, but the file has {page.photometric.name}. Save it as MINISBLACK."
        )
    if page.compression not in _COMPRESSIONS:
        raise UnsupportedImageError(
            f"Expected a TIFF file without compression, or with LZW, deflate or PackBits, but it has "
            f"{getattr(page.compression, 'name', page.compression)}. Save it with one of these."
        )
    if page.compression in _DEFLATE:
        _check_deflate(file, page)


def _check_deflate(file: IO[bytes], page: Any) -> None:
    """Raise ValueError if compressed parts are longer than stated, by which a small file could fill the memory."""
    most = int(np.prod(page.chunks)) * page.dtype.itemsize
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(offset)
        decoder = zlib.decompressobj()
        decoder.decompress(file.read(length), most)
        if decoder.unconsumed_tail and decoder.decompress(decoder.unconsumed_tail, 1):
            raise ValueError("its compressed pixels are longer than the image")


def _upright_page(page: Any) -> np.ndarray:
    """Decode a page to (H, W) or (H, W, channels), and apply its orientation."""
    values: np.ndarray = page.asarray()
    if page.samplesperpixel > 1 and page.planarconfig == 2:
        values = np.moveaxis(values, 0, -1)
    tag = page.tags.get(274)
    orientation = tag.value if tag is not None and tag.value in range(1, 9) else 1
    if orientation == 1:
        return values
    planes = [upright(plane, orientation) for plane in np.moveaxis(np.atleast_3d(values), -1, 0)]
    return np.stack(planes, axis=-1)
