"""Decoded values of an image and their conversion to 8-bit RGB, and the errors of the readers."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import ExifTags, Image

DEPTHS = (8, 10, 12, 14, 16)  # bits of the sensors whose values cameras store in 16-bit files without scaling them

_WHITE = 255
_WARNING_FILTER = threading.Lock()  # the filter of warnings is global


class UnknownFormatError(ValueError):
    """A file that has none of the allowed formats."""


class TooLargeError(ValueError):
    """An image with more pixels than allowed."""


class CutShortError(ValueError):
    """A JPEG file that ends before its last scan is complete."""


class UnsupportedImageError(ValueError):
    """An image that cannot be converted to 8-bit RGB."""


@dataclass(frozen=True)
class Samples:
    """Decoded values of an image, before they are converted to 8-bit RGB.

    Attributes:
        values: Values of the pixels, uint8 or uint16: grey (H, W) or (H, W, 1), RGB (H, W, 3), or RGB with alpha
            (H, W, 4).
        stated_depth: Bit depth of 16-bit values that the file states; None if it states none.
        premultiplied: Whether the colours are already multiplied by alpha.
        white_is_zero: Whether 0 is white and the largest value is black.
        orientation: EXIF orientation of `values`, 1 to 8.
    """

    values: np.ndarray
    stated_depth: int | None = None
    premultiplied: bool = False
    white_is_zero: bool = False
    orientation: int = 1

    @property
    def depth(self) -> int:
        """Number of bits whose largest value is white; alpha is not considered."""
        if self.values.dtype == np.uint8:
            return 8
        largest = int((self.values[..., :3] if self.values.ndim == 3 else self.values).max())
        if self.stated_depth is not None and largest < 2**self.stated_depth:
            return self.stated_depth
        return smallest_depth(largest)

    def to_rgb(self) -> np.ndarray:
        """Convert to upright RGB, uint8 (H, W, 3); return `values` without a copy if they are this already."""
        values = self._eight_bits()
        if self.white_is_zero:
            values = _WHITE - values
        channels = 1 if values.ndim == 2 else values.shape[2]
        if channels == 1:
            grey = np.ascontiguousarray(values.reshape(values.shape[:2]))
            values = np.asarray(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB))
        elif channels == 4:
            values = _over_white(values, self.premultiplied)
        return upright(values, self.orientation)

    def _eight_bits(self) -> np.ndarray:
        if self.values.dtype == np.uint8:
            return self.values
        depth = self.depth
        scaled = _scale(self.values, depth)
        if self.values.ndim == 3 and self.values.shape[2] == 4:
            alpha = self.values[..., 3]
            scaled[..., 3] = _scale(alpha, depth if alpha.max() < 2**depth else 16)
        return scaled


def smallest_depth(largest: int) -> int:
    """Return the smallest of the `DEPTHS` that can represent the value `largest`."""
    return next(depth for depth in DEPTHS if largest < 2**depth)


def from_pil(image: Image.Image, orientation: int | None = None) -> Samples:
    """Decode a PIL image.

    Args:
        image: PIL image; it is loaded if necessary.
        orientation: EXIF orientation of the pixels, 1 to 8; None reads it from the image.

    Raises:
        UnsupportedImageError: If the mode of the image does not define white ("I" and "F").
    """
    if image.mode in ("I", "F"):
        raise UnsupportedImageError(
            f"Expected an image of 8 or 16 bits a channel, but got PIL's mode {image.mode!r}, which does not "
            "define white. Save the image with 8 or 16 bits, or pass an array of uint8 or uint16."
        )
    _load_quietly(image)
    orientation = orientation_of(image) if orientation is None else orientation
    if image.mode.startswith("I;16"):
        grey = np.array(image).astype(np.uint16)
        return Samples(clear_color(grey, image.info.get("transparency")), orientation=orientation)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return Samples(np.array(image if image.mode == mode else image.convert(mode)), orientation=orientation)


def clear_color(grey: np.ndarray, transparent: object) -> np.ndarray:
    """Add an alpha channel, (H, W, 4), in which the value `transparent` is clear; return `grey` if it is no integer."""
    if not isinstance(transparent, int):
        return grey
    return np.dstack([grey, grey, grey, np.where(grey == transparent, 0, np.iinfo(grey.dtype).max).astype(grey.dtype)])


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of a PIL image; 1 if it has none, or if its EXIF data are damaged."""
    try:
        # PngImageFile.getexif would decode the whole image in search of EXIF data after the pixels.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata do not affect the pixels, and Pillow's errors have no common base class
        return 1
    return int(value) if value in range(1, 9) else 1


def _load_quietly(image: Image.Image) -> None:
    """Decode without Pillow's DecompressionBombWarning, since the caller has checked the size."""
    if Image.MAX_IMAGE_PIXELS is None or image.width * image.height <= Image.MAX_IMAGE_PIXELS:
        image.load()
        return
    with _WARNING_FILTER, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image.load()


def _scale(values: np.ndarray, depth: int) -> np.ndarray:
    """Scale uint16 to uint8, so that the largest value of this depth becomes 255; round to the nearest integer."""
    largest = 2**depth - 1
    table = (np.minimum(np.arange(65536), largest) * _WHITE + largest // 2) // largest
    scaled: np.ndarray = table.astype(np.uint8)[values]
    return scaled


def _over_white(values: np.ndarray, premultiplied: bool) -> np.ndarray:
    alpha = values[..., 3:].astype(np.uint32)
    if alpha.min() == _WHITE:
        return np.ascontiguousarray(values[..., :3])
    if premultiplied:
        return np.minimum(values[..., :3] + (_WHITE - alpha), _WHITE).astype(np.uint8)
    mixed = values[..., :3] * alpha + _WHITE * (_WHITE - alpha)
    return ((mixed + 127) // _WHITE).astype(np.uint8)


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror an image with the EXIF orientation 1 to 8 into its upright form."""
    if orientation == 1:
        return image
    image = np.ascontiguousarray(image)
    if orientation in (5, 7):
        image = np.asarray(cv2.transpose(image))
    if orientation in (2, 4):
        return np.asarray(cv2.flip(image, 1 if orientation == 2 else 0))
    rotations = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 7: cv2.ROTATE_180, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}
    return np.asarray(cv2.rotate(image, rotations[orientation])) if orientation in rotations else image
