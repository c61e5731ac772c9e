"""Errors of image files. Each is a ValueError."""

from __future__ import annotations


class UnknownFormatError(ValueError):
    """A file that has none of the allowed formats."""


class TooLargeError(ValueError):
    """An image with more pixels than allowed."""


class CutShortError(ValueError):
    """A JPEG file that ends before its last scan is complete."""


class UnsupportedImageError(ValueError):
    """An image that cannot be converted to 8-bit RGB."""
