"""Reader of TIFF files: kinds of channels, bit depth, truncated files.

The directory is parsed here, since Pillow does not open RGB files with 12 packed bits per channel or big-endian BigTIFF
files, and reports a truncated directory only by a warning.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping
from typing import IO

import cv2
import numpy as np

from bpkd_sdk.images.samples import Samples, UnsupportedImageError, from_pil, smallest_depth

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _CHANNELS = 256, 257, 258, 259, 262, 274, 277
_LARGEST_VALUE, _PLANES, _EXTRA, _NUMBER_FORMAT, _XMP = 281, 284, 338, 339, 700
_STRIP_OFFSETS = 273
_STRIPS = (_STRIP_OFFSETS, 279), (324, 325)  # tags of offsets and lengths, for strips and for tiles
_TAGS = {
    _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _CHANNELS, _LARGEST_VALUE, _PLANES, _EXTRA,
    _NUMBER_FORMAT, _XMP, *_STRIPS[0], *_STRIPS[1],
}  # fmt: skip
_TYPES = {1: "B", 3: "H", 4: "I", 7: "B", 13: "I", 16: "Q", 18: "Q"}  # types of whole numbers

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2  # photometric interpretations
_UNSPECIFIED, _PREMULTIPLIED = 0, 1  # kinds of extra channels
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


class TiffReader:
    """A TIFF file whose first directory has been read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._tags = _read_tags(file)
        self.width, self.height = self._one(_WIDTH, 0), self._one(_HEIGHT, 0)
        self._channels = self._one(_CHANNELS, 1)
        self._depths = set(self._tags.get(_BITS, (1,)))
        self.bits = 8 if max(self._depths) <= 8 else 16

    @property
    def has_unnamed_channel(self) -> bool:
        """Whether there is a fourth channel that is not declared as transparency."""
        return self._channels == 4 and self._one(_EXTRA, _UNSPECIFIED) == _UNSPECIFIED

    def _one(self, tag: int, default: int) -> int:
        return next(iter(self._tags.get(tag, ())), default)

    @property
    def orientation(self) -> int:
        """Value of the orientation tag, 1 to 8; without the tag, the orientation in the XMP data."""
        if _ORIENTATION in self._tags:
            value = self._one(_ORIENTATION, 1)
            return value if value in range(1, 9) else 1
        match = _XMP_ORIENTATION.search(bytes(self._tags.get(_XMP, ())))
        return int(match[1]) if match else 1

    def decode(self) -> Samples:
        """Decode the first image.

        Raises:
            UnsupportedImageError: If the number or the kind of the channels is not supported.
            ValueError: If the file is damaged or truncated.
        """
        if self._channels > 4:
            raise UnsupportedImageError(
                f"Expected at most 4 channels, but got {self._channels}. Save the red, green and blue channels only, "
                f'or state the channels of the data (in a folder: "channels": {self._channels} in classes.json).'
            )
        self._check_strips()
        if max(self._depths) > 8 and self._is_plain():
            return self._decode_16_bits()
        from PIL.TiffImagePlugin import TiffImageFile  # slow to import, and needed for this format only

        self._file.seek(0)
        try:
            image = TiffImageFile(self._file)
        except SyntaxError as error:
            raise UnsupportedImageError(
                f"Pillow cannot read this kind of TIFF: {self._channels} channels of "
                f"{sorted(self._depths)} bits (photometric interpretation {self._one(_PHOTOMETRIC, 0)}, "
                f"number format {self._one(_NUMBER_FORMAT, 1)}). Save the image as PNG, or "
                "as RGB of 8 or 16 bits a channel."
            ) from error
        with image:
            return from_pil(image, orientation=1)  # Pillow applies the orientation of TIFF images

    def _is_plain(self) -> bool:
        """Return whether the image is grey, RGB or RGB with a fourth channel, in whole numbers of at most 16 bits."""
        if len(self._depths) > 1 or max(self._depths) > 16 or not {*self._tags.get(_NUMBER_FORMAT, ())} <= {1, 4}:
            return False
        grey = self._channels == 1 and self._one(_PHOTOMETRIC, 0) in (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
        return grey or (self._channels in (3, 4) and self._one(_PHOTOMETRIC, 0) == _RGB)

    def _check_strips(self) -> None:
        """Raise ValueError if strips or tiles end after the end of the file, or are too short."""
        end = self._file.seek(0, io.SEEK_END)
        raw = self._one(_COMPRESSION, 1) == 1 and len(self._depths) == 1
        for offsets, lengths in _STRIPS:
            starts, sizes = self._tags.get(offsets, ()), self._tags.get(lengths, ())
            parts = list(zip(starts, sizes, strict=False))
            if any(start > end for start in starts):
                raise ValueError("the file is truncated: some of its pixels would be after its end")
            if raw and offsets == _STRIP_OFFSETS:  # some writers state more bytes than the pixels need
                present = sum(min(size, end - start) for start, size in parts)
                needed = self.width * self.height * self._channels * max(self._depths) // 8
                if parts and present < needed:
                    raise ValueError(f"the file is truncated: it has {present} of the {needed} bytes of its pixels")
            elif any(start + size > end for start, size in parts):
                raise ValueError("the file is truncated: some of its pixels would be after its end")

    def _decode_16_bits(self) -> Samples:
        """Decode 9 to 16 bits per channel with OpenCV; Pillow keeps only the upper 8 bits of RGB."""
        if self._channels > 1 and self._one(_PLANES, 1) != 1:
            raise UnsupportedImageError(
                "Expected interleaved channels, but got one plane for each channel (planar "
                "configuration 2) with more than 8 bits. Save the image with the channels interleaved."
            )
        self._file.seek(0)
        try:
            values = cv2.imdecode(np.frombuffer(self._file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            raise ValueError(f"OpenCV cannot decode it: {error.err}") from error
        channels = 1 if values is None or values.ndim == 2 else values.shape[2]
        if values is None or values.dtype != np.uint16 or channels != self._channels:
            raise ValueError("its pixels cannot be decoded")
        depth = max(self._depths)
        unused = 16 - depth
        if unused and not (values & (2**unused - 1)).any():
            values = np.right_shift(values, unused)  # OpenCV shifts packed values to the upper bits
        if channels > 1:
            values = cv2.cvtColor(values, cv2.COLOR_BGRA2RGBA if channels == 4 else cv2.COLOR_BGR2RGB)
        extra = self._one(_EXTRA, -1)
        if channels == 4 and extra == _UNSPECIFIED:
            values = values[..., :3]
        return Samples(
            values,
            self._stated_depth(),
            premultiplied=extra == _PREMULTIPLIED,
            white_is_zero=self._one(_PHOTOMETRIC, 0) == _WHITE_IS_ZERO,
            orientation=1 if _ORIENTATION in self._tags else self.orientation,  # OpenCV applies the tag
        )

    def _stated_depth(self) -> int | None:
        depth = max(self._depths)
        if depth < 16:
            return depth
        largest = max(self._tags.get(_LARGEST_VALUE, (0,)))
        return smallest_depth(min(largest, 65535)) if largest else None


def _read_tags(file: IO[bytes]) -> Mapping[int, tuple[int, ...]]:
    """Return the whole numbers in the first directory of a TIFF or BigTIFF file."""
    end = file.seek(0, io.SEEK_END)

    def read(layout: str, offset: int) -> tuple[int, ...]:
        size = struct.calcsize(order + layout)
        if offset + size > end:
            raise ValueError("the file is truncated: its directory would be after its end")
        file.seek(offset)
        return struct.unpack(order + layout, file.read(size))

    file.seek(0)
    order = "<" if file.read(2) == b"II" else ">"
    big = read("H", 2) == (43,)
    pointer, inline, entry = ("Q", 8, 20) if big else ("I", 4, 12)
    (directory,) = read(pointer, 8 if big else 4)
    (entries,) = read("Q" if big else "H", directory)
    first = directory + (8 if big else 2)
    tags = {}
    if first + entries * entry > end:
        raise ValueError("the file is truncated inside its directory")
    for offset in range(first, first + entries * entry, entry):
        tag, kind, count = read("HH" + pointer, offset)
        if tag in _TAGS and kind in _TYPES:
            position = offset + entry - inline
            layout = f"{count}{_TYPES[kind]}"
            if struct.calcsize(order + layout) > inline:
                (position,) = read(pointer, position)
            tags[tag] = read(layout, position)
    return tags
