"""The reader of image files for training, evaluation, calibration and serving."""

from __future__ import annotations

from bpkd_sdk.images.channels import RAW_FORMATS, formats_of, read_pixels
from bpkd_sdk.images.reader import (
    FORMATS,
    MAX_PIXELS,
    ImageSource,
    bit_depth,
    exif_orientation,
    has_unnamed_channel,
    image_size,
    read_image,
)
from bpkd_sdk.images.samples import CutShortError, TooLargeError, UnknownFormatError, UnsupportedImageError

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "RAW_FORMATS",
    "CutShortError",
    "ImageSource",
    "TooLargeError",
    "UnknownFormatError",
    "UnsupportedImageError",
    "bit_depth",
    "exif_orientation",
    "formats_of",
    "has_unnamed_channel",
    "image_size",
    "read_image",
    "read_pixels",
]
