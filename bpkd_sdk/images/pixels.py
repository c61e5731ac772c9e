"""Conversion of decoded samples to 8-bit RGB: bit depth, alpha over white, EXIF orientation."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import ExifTags, Image

from bpkd_sdk.images.errors import UnsupportedImageError

DEPTHS = (8, 10, 12, 14, 16)  # bits of the sensors whose values cameras store in 16-bit files without scaling them

_WHITE = 255
_QUIET = threading.Lock()


@dataclass(frozen=True)
class Samples:
    """Decoded values of an image, before they are converted to 8-bit RGB.

    Attributes:
        values: uint8 or uint16; (H, W) or (H, W, 1) is grey, (H, W, 3) RGB, (H, W, 4) RGB with alpha.
        stated_depth: Bit depth of 16-bit values as the file states it; None if it states none.
        premultiplied: Whether the colours are multiplied by alpha already.
        white_is_zero: Whether 0 is white and the largest value black.
        orientation: EXIF orientation, 1 to 8, of `values`.
    """

    values: np.ndarray
    stated_depth: int | None = None
    premultiplied: bool = False
    white_is_zero: bool = False
    orientation: int = 1

    @property
    def depth(self) -> int:
        """Number of bits whose largest value is white; alpha does not count."""
        if self.values.dtype == np.uint8:
            return 8
        largest = int((self.values[..., :3] if self.values.ndim == 3 else self.values).max())
        if self.stated_depth is not None and largest < 2**self.stated_depth:
            return self.stated_depth
        return smallest_depth(largest)

    def to_rgb(self) -> np.ndarray:
        """Convert to uint8 (H, W, 3) RGB, upright; returns `values` themselves if there is nothing to convert."""
        values = self._eight_bits()
        if self.white_is_zero:
            values = _WHITE - values
        channels = 1 if values.ndim == 2 else values.shape[2]
        if channels == 1:
            grey = np.ascontiguousarray(values.reshape(values.shape[:2]))
            values = np.asarray(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB))
        elif channels == 4:
            values = _over_white(values, self.premultiplied)
        return _upright(values, self.orientation)

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
    """Return the smallest of the `DEPTHS` whose values go up to `largest`."""
    return next(depth for depth in DEPTHS if largest < 2**depth)


def from_pil(image: Image.Image, orientation: int | None = None) -> Samples:
    """Decode a PIL image.

    Args:
        image: PIL image; it is loaded if it is not yet.
        orientation: EXIF orientation of the pixels; None reads it from the image.

    Raises:
        UnsupportedImageError: If the image has a mode without a known white ("I" and "F").
    """
    if image.mode in ("I", "F"):
        raise UnsupportedImageError(
            f"Expected an image of 8 or 16 bits a channel, but got PIL's mode {image.mode!r}, which does not say what "
            "white is. Save the image with 8 or 16 bits, or pass an array of uint8 or uint16."
        )
    _load_quietly(image)
    orientation = orientation_of(image) if orientation is None else orientation
    if image.mode.startswith("I;16"):
        grey = np.array(image).astype(np.uint16)
        return Samples(clear_color(grey, image.info.get("transparency")), orientation=orientation)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return Samples(np.array(image if image.mode == mode else image.convert(mode)), orientation=orientation)


def clear_color(grey: np.ndarray, transparent: object) -> np.ndarray:
    """Return grey with alpha, (H, W, 4), where one value is transparent; the grey itself if none is."""
    if not isinstance(transparent, int):
        return grey
    return np.dstack([grey, grey, grey, np.where(grey == transparent, 0, np.iinfo(grey.dtype).max).astype(grey.dtype)])


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of a PIL image; 1 if it has none, or if its EXIF data are damaged."""
    try:
        # PngImageFile.getexif decodes the whole image to look for EXIF data behind it.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata do not make the pixels unusable, and Pillow's errors have no base class
        return 1
    return int(value) if value in range(1, 9) else 1


def _load_quietly(image: Image.Image) -> None:
    """Decode without Pillow's DecompressionBombWarning; the caller has checked the size."""
    if Image.MAX_IMAGE_PIXELS is None or image.width * image.height <= Image.MAX_IMAGE_PIXELS:
        image.load()
        return
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image.load()


def _scale(values: np.ndarray, depth: int) -> np.ndarray:
    """Scale uint16 to uint8, such that the largest value of this depth becomes 255; rounds to the nearest."""
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


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return image
    image = np.ascontiguousarray(image)
    if orientation in (5, 7):
        image = np.asarray(cv2.transpose(image))
    if orientation in (2, 4):
        return np.asarray(cv2.flip(image, 1 if orientation == 2 else 0))
    way = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 7: cv2.ROTATE_180, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}
    return np.asarray(cv2.rotate(image, way[orientation])) if orientation in way else image
