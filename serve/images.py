"""Whatever a caller has for an image, as RGB bytes: array, PIL image, path, the bytes of a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ImageSource: TypeAlias = np.ndarray | Image.Image | str | Path | bytes

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
LARGEST = 178_956_970  # pixels; Pillow's own limit against decompression bombs

_WHITE = 255


class UnknownFormatError(ValueError):
    """A file that is none of the formats asked for."""


class TooLargeError(ValueError):
    """An image of more pixels than allowed."""


def read_image(source: ImageSource, *, largest: int = LARGEST, formats: tuple[str, ...] = FORMATS) -> np.ndarray:
    """Read an image as a person sees it: turned as its EXIF data say, transparency over white, 16 bits scaled to 8.

    Args:
        source: uint8, uint16 or bool array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), RGB; a PIL image; a path; or the
            bytes of a file. A file's format is found from its content, never from its name; of an animation the first
            frame counts.
        largest: Most pixels, checked before a file is decoded.
        formats: Pillow's names of the formats that a file may have.

    Returns:
        uint8 (H, W, 3) RGB; the very array that was given, if it is one of that kind.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: For another kind of source, or an array of another type.
        TooLargeError: For too many pixels.
        UnknownFormatError: For a file of none of these formats.
        ValueError: For an array of another shape, an image without pixels or of a scale that is not known (PIL's modes
            "I" and "F"), or a file that is damaged. Both errors above are also ValueErrors.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, largest)
    if isinstance(source, Image.Image):
        return _from_pil(source, largest)
    if isinstance(source, bytes):
        return _from_file(io.BytesIO(source), f"the file of {len(source)} bytes", largest, formats)
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            raise FileNotFoundError(f"There is no image at {source}.")
        with Path(source).open("rb") as file:
            return _from_file(file, str(source), largest, formats)
    raise TypeError(f"Expected an image as array, PIL image, path or bytes, but got {type(source).__name__}.")


def _from_file(file: IO[bytes], name: str, largest: int, formats: tuple[str, ...]) -> np.ndarray:
    try:
        with Image.open(file, formats=formats) as image:
            return _from_pil(image, largest)
    except UnidentifiedImageError as error:
        raise UnknownFormatError(
            f"Expected a file of the formats {', '.join(formats)}, but {name} is none of them."
        ) from error
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"Cannot read {name} as an image: {error}") from error
    except (TooLargeError, MemoryError):
        raise
    except Exception as error:  # what Pillow's readers raise for a damaged file has no base class
        raise ValueError(f"Cannot read {name} as an image: {error}") from error


def _from_pil(image: Image.Image, largest: int) -> np.ndarray:
    _check_size(image.height, image.width, largest)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"Expected an image of 8 or 16 bits a channel, but got PIL's mode {image.mode!r}, which does not say what "
            "white is. Pass an array of uint8 or uint16."
        )
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return _from_array(np.asarray(upright).astype(np.uint16), largest)
    if upright.has_transparency_data:
        return _over_white(np.asarray(upright.convert("RGBA")))
    return np.asarray(upright.convert("RGB"))


def _from_array(array: np.ndarray, largest: int) -> np.ndarray:
    if array.dtype not in (np.uint8, np.uint16, np.bool_):
        raise TypeError(
            f"Expected an image array of uint8, uint16 or bool, but got {array.dtype}. "
            "Scale floats to 0..255 and convert: (image * 255).round().astype(np.uint8)."
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"Expected an image array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), but got {array.shape}.")
    _check_size(array.shape[0], array.shape[1], largest)
    array = _eight_bits(array)
    channels = 1 if array.ndim == 2 else array.shape[2]
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return _over_white(array) if channels == 4 else array


def _eight_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return array.astype(np.uint8) * _WHITE if array.dtype == np.bool_ else array


def _over_white(array: np.ndarray) -> np.ndarray:
    alpha = array[..., 3:].astype(np.uint32)
    mixed = array[..., :3] * alpha + _WHITE * (_WHITE - alpha)
    return ((mixed + 127) // _WHITE).astype(np.uint8)


def _check_size(height: int, width: int, largest: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"Expected an image with pixels, but got {height} x {width}.")
    if height * width > largest:
        raise TooLargeError(f"Expected an image of at most {largest:,} pixels, but got {height} x {width}.")
