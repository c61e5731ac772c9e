"""Reads arrays, PIL images, paths and the bytes of files as 8-bit RGB images."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Protocol, TypeAlias

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.WebPImagePlugin import WebPImageFile

from bpkd_sdk.images.jpeg import JpegReader
from bpkd_sdk.images.png import PngReader
from bpkd_sdk.images.samples import (
    CutShortError,
    Samples,
    TooLargeError,
    UnknownFormatError,
    UnsupportedImageError,
    from_pil,
    orientation_of,
)
from bpkd_sdk.images.tiff import TiffReader

ImageSource: TypeAlias = np.ndarray | Image.Image | str | Path | bytes

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 178_956_970  # pixels; Pillow's own limit against decompression bombs


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> np.ndarray:
    """Read an image as upright 8-bit RGB, with transparent parts over white.

    Training, evaluation, calibration, `Predictor`, demo page and service read all images with this function.

    - EXIF orientation is applied. Colour profiles are not.
    - Transparency (an alpha channel, or a transparent colour or palette entry) is composited over white. The fourth
      channel of a TIFF is alpha, unless the file declares it unspecified: then it is dropped.
    - Values of 16 bits are scaled by the bit depth of the image, so that its white becomes 255; see `bit_depth`.
    - CMYK, grey, palette and LAB images are converted to RGB. Only the first image of an animation or of a file with
      several pages is read.
    - A JPEG may have other data after its end (the video of a motion photo), and its end marker may be missing if its
      last scan is complete. All other truncated files are refused, and PNG files with a wrong checksum too.

    Args:
        source: RGB array, uint8, uint16 or bool, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a PIL image; a path; or
            the bytes of a file. The format of a file is determined from its content, not from its name. PIL images are
            read with Pillow's values, which have 8 bits per channel for 16-bit RGB files.
        max_pixels: Largest number of pixels, checked before a file is decoded.
        formats: Allowed formats of a file, a subset of `FORMATS`.

    Returns:
        RGB image, uint8 (H, W, 3). An array of this kind is returned without a copy.

    Raises:
        FileNotFoundError: If the file does not exist.
        TypeError: If the source has another type, or an array another dtype.
        TooLargeError: If the image has too many pixels.
        UnknownFormatError: If the file has none of the allowed formats.
        CutShortError: If a JPEG file is cut short.
        UnsupportedImageError: If the image cannot be converted to 8-bit RGB: more than 4 channels, or values for which
            white is not defined (PIL's modes "I" and "F").
        ValueError: If an array has another shape, an image has no pixels, a path is a folder or a device, or a file is
            damaged. The message names the file. The four errors above are ValueErrors too.
    """
    return _decode(source, max_pixels, formats).to_rgb()


def bit_depth(source: ImageSource) -> int:
    """Return the bit depth by which `read_image` scales an image.

    For images with up to 8 bits per channel it is 8, and files are not decoded. For 16 bits it is the depth that the
    file states (TIFF: fewer than 16 bits per sample, or the tag MaxSampleValue; PNG: the chunk sBIT, if the values are
    not scaled up). If the file states none, it is the smallest of 8, 10, 12, 14 and 16 bits that can represent the
    largest value of the image, since cameras store values of 10 to 14 bits in 16-bit files without scaling. The depth
    of a dark 16-bit image can therefore be too small; compare the bit depths of the images of a data set.

    Args:
        source: Image, as `read_image` accepts it.

    It raises the errors of `read_image`.
    """
    if isinstance(source, (str, Path, bytes)):
        with _open(source) as reader:
            return 8 if reader.bits <= 8 else reader.decode().depth
    return _decode(source).depth


def exif_orientation(source: str | Path | bytes) -> int:
    """Return the EXIF orientation of an image file, 1 to 8; 1 if the file states none. Pixels are not decoded.

    Orientations 5 to 8 swap height and width; `read_image` returns the upright image.

    Args:
        source: Path, or the bytes of a file.

    It raises the errors of `read_image`.
    """
    with _open(source, max_pixels=None) as reader:
        return reader.orientation


def has_unnamed_channel(source: str | Path | bytes) -> bool:
    """Return whether an image file has a fourth channel that it does not declare as transparency; only TIFF files can.

    `read_image` returns three channels: it leaves the fourth out if the file declares it unspecified, and otherwise
    takes it as transparency. Pixels are not decoded.

    Args:
        source: Path, or the bytes of a file.

    It raises the errors of `read_image`.
    """
    with _open(source, max_pixels=None) as reader:
        return isinstance(reader, TiffReader) and reader.has_unnamed_channel


def image_size(source: str | Path | bytes) -> tuple[int, int]:
    """Return the (height, width) of an image file as `read_image` returns it, upright. Pixels are not decoded.

    Args:
        source: Path, or the bytes of a file.

    It raises the errors of `read_image`.
    """
    with _open(source, max_pixels=None) as reader:
        size = reader.height, reader.width
        return size if reader.orientation < 5 else size[::-1]


class _Reader(Protocol):
    """An image file whose header has been read."""

    width: int  # of the stored image, before EXIF orientation is applied
    height: int
    bits: int

    @property
    def orientation(self) -> int: ...
    def decode(self) -> Samples: ...


class _PillowReader:
    """A file of a format that Pillow decodes without loss."""

    bits = 8

    def __init__(self, plugin: type[ImageFile], file: IO[bytes]) -> None:
        self._image = plugin(file)
        self.width, self.height = self._image.size

    @property
    def orientation(self) -> int:
        return orientation_of(self._image)

    def decode(self) -> Samples:
        return from_pil(self._image)


_READERS: dict[str, Callable[[IO[bytes]], _Reader]] = {
    "JPEG": JpegReader,
    "PNG": PngReader,
    "WEBP": partial(_PillowReader, WebPImageFile),
    "BMP": partial(_PillowReader, BmpImageFile),
    "TIFF": TiffReader,
}


def _format_of(head: bytes) -> str | None:
    """Return the format of a file from its first 16 bytes."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM"):
        return "BMP"
    return "TIFF" if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") else None


def _decode(source: ImageSource, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> Samples:
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "")
        with _name_errors(_File("the PIL image", str(name) if name else None)):
            check_size(source.height, source.width, max_pixels)
            return from_pil(source)
    with _open(source, max_pixels, formats) as reader:
        return reader.decode()


def _from_array(array: np.ndarray, max_pixels: int) -> Samples:
    if array.dtype not in (np.uint8, np.uint16, np.bool_):
        raise TypeError(
            f"Expected an image array of uint8, uint16 or bool, but got {array.dtype}. "
            "Scale floats to 0..255 and convert: (image * 255).round().astype(np.uint8)."
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"Expected an image array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), but got {array.shape}.")
    check_size(array.shape[0], array.shape[1], max_pixels)
    return Samples(array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array)


@contextmanager
def _open(source: object, max_pixels: int | None = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> Iterator[_Reader]:
    """Open a file and read its header. Errors of all libraries become ValueErrors that name the file."""
    with open_content(source) as (content, name):
        yield _read_header(content, name, max_pixels, formats)


@contextmanager
def open_content(source: object) -> Iterator[tuple[IO[bytes], str]]:
    """Open a file and yield it with its name; errors of all libraries become ValueErrors that name the file."""
    if isinstance(source, bytes):
        with _name_errors(file := _File(f"the file of {len(source)} bytes")):
            yield io.BytesIO(source), file.name
        return
    if not isinstance(source, (str, Path)):
        raise TypeError(f"Expected an image as array, PIL image, path or bytes, but got {type(source).__name__}.")
    path = Path(source)
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path}: is a {'folder' if path.is_dir() else 'device or pipe'}. Expected an image file.")
        raise FileNotFoundError(f"There is no image at {source}.")
    # A buffer would copy the whole file again.
    with path.open("rb", buffering=0) as content, _name_errors(file := _File(path.name, str(path))):
        yield content, file.name


def _read_header(content: IO[bytes], name: str, max_pixels: int | None, formats: tuple[str, ...]) -> _Reader:
    file_format = _format_of(content.read(16))
    if file_format is None or file_format not in formats:
        raise UnknownFormatError(
            f"Expected a file of the formats {', '.join(formats)}, but {name} is none of them. Convert it to PNG."
        )
    content.seek(0)
    reader = _READERS[file_format](content)
    if max_pixels is not None:
        check_size(reader.height, reader.width, max_pixels)
    return reader


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise an error for an image without pixels, or with more than `max_pixels`."""
    if height < 1 or width < 1:
        raise UnsupportedImageError(f"Expected an image with pixels, but got {height} x {width}.")
    if height * width > max_pixels:
        raise TooLargeError(
            f"Expected an image of at most {max_pixels:,} pixels, but got {height} x {width}, "
            f"which is {height * width} pixels. Scale it down or cut it into parts."
        )


@dataclass(frozen=True)
class _File:
    """The name of a file in error messages.

    Attributes:
        name: Name within a sentence.
        path: Path of the file; None for bytes and for PIL images without a path.
    """

    name: str
    path: str | None = None

    def is_cut_short(self, reason: object) -> str:
        text = f"is cut short: {reason}. Copy or download it again."
        return f"{self.path}: {text}" if self.path else f"Cannot read {self.name} as an image: it {text}"

    def cannot_be_read(self, reason: object) -> str:
        start = f"{self.path}: cannot be read as an image" if self.path else f"Cannot read {self.name} as an image"
        return f"{start}: {reason}"


@contextmanager
def _name_errors(file: _File) -> Iterator[None]:
    """Turn every error into a ValueError that names the file."""
    try:
        yield
    except CutShortError as error:
        raise CutShortError(file.is_cut_short(error)) from error
    except (TooLargeError, UnknownFormatError, UnsupportedImageError) as error:
        if file.path is None:
            raise
        raise type(error)(f"{file.path}: cannot be read as an image. {error}") from error
    except Image.DecompressionBombError as error:
        raise TooLargeError(file.cannot_be_read(error)) from error
    except MemoryError as error:
        raise MemoryError(file.cannot_be_read("there is not enough memory")) from error
    except Exception as error:  # errors of Pillow and OpenCV for damaged files have no common base class
        text = getattr(error, "err", "") or str(error)  # OpenCV's full message contains its source files
        reason = text.strip().rstrip(".") or type(error).__name__
        raise ValueError(
            file.cannot_be_read(
                f"{reason}. The file is damaged or of an unusual kind: copy it again, or save it as an 8-bit PNG."
            )
        ) from error
