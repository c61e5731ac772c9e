"""Reader of JPEG files: finds the end of the image, and checks the last scan if the end marker is missing."""

from __future__ import annotations

import io
import re
from typing import IO, NamedTuple

import cv2
import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

from bpkd_sdk.images.samples import CutShortError, Samples, from_pil, orientation_of

_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # restart markers, D0 to D7, are part of a scan
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_STANDALONE = (0x01, *range(0xD0, 0xD8))  # markers without a segment
_BETWEEN_SCANS = (0xC4, *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE)  # tables, scans, metadata, comments
_MAX_SCANS = 500  # encoders write about 10, and decoding each takes a pass over the whole image


class _Structure(NamedTuple):
    """The structure of a JPEG file.

    Attributes:
        scans: Number of scans.
        scan_end: Offset of the first byte after the last scan.
        end: Offset of the first byte after the end marker; None without an end marker.
    """

    scans: int
    scan_end: int
    end: int | None


class JpegReader:
    """A JPEG file whose structure has been read."""

    bits = 8

    def __init__(self, file: IO[bytes]) -> None:
        self._content = file.read()
        self._structure = _parse_structure(self._content)
        if not self._structure.scans:
            raise CutShortError("it ends before its first scan")
        self._image = JpegImageFile(io.BytesIO(self._content))
        self.width, self.height = self._image.size

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8."""
        return orientation_of(self._image)

    def decode(self) -> Samples:
        """Decode the image, without the data after its end.

        Raises:
            CutShortError: If the end marker is missing, and the last scan is incomplete or other data follow it.
            ValueError: If the pixels cannot be decoded.
        """
        scans, scan_end, end = self._structure
        if scans > _MAX_SCANS:
            raise ValueError(f"it has {scans} scans, and at most {_MAX_SCANS} are read")
        if end is not None:
            return self._decode(self._content[:end])
        if scan_end < len(self._content):
            raise CutShortError("other data follow its last scan, without an end marker")
        # Decoders skip data after a complete scan, but decode data after an incomplete scan as pixels.
        scan = self._content.rstrip(b"\0\xff")  # an incomplete download may be filled with zeros
        first, *others = (self._decode(scan + _filler(value)) for value in (0x00, 0x55, 0xAA))
        if not all(np.array_equal(first.values, other.values) for other in others):
            raise CutShortError("its last scan is not complete")
        return first

    def _decode(self, content: bytes) -> Samples:
        if self._image.mode not in ("L", "RGB"):
            return from_pil(JpegImageFile(io.BytesIO(content)))
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        if image is None or image.shape[:2] != (self.height, self.width):
            raise ValueError("its pixels cannot be decoded")
        return Samples(image, orientation=self.orientation)


def _parse_structure(content: bytes) -> _Structure:
    """Go through the segments up to the end marker, or to data that are not a segment."""
    position, scans, scan_end = 2, 0, len(content)
    while True:
        if not scans:  # cameras write padding between the segments of a header
            position = max(content.find(b"\xff", position), 0) or len(content)
        while content[position : position + 2] == b"\xff\xff":  # a marker may begin with several of these bytes
            position += 1
        if content[position : position + 1] != b"\xff" or position + 1 >= len(content):
            return _Structure(scans, scan_end, None)
        code, position = content[position + 1], position + 2
        if code == _END_OF_IMAGE:
            return _Structure(scans, scan_end, position if scans else None)
        if code in _STANDALONE or (not scans and code == 0):
            continue
        if scans and code not in _BETWEEN_SCANS:
            return _Structure(scans, scan_end, None)
        position += int.from_bytes(content[position : position + 2], "big")
        if code == _START_OF_SCAN:
            match = _END_OF_SCAN.search(content, position)
            scans += 1
            scan_end = position = match.start() if match else len(content)


def _filler(value: int) -> bytes:
    """Return data that continue an incomplete scan: one value between all restart markers, and an end marker."""
    parts = (bytes([value]) * 16 + bytes([0xFF, marker]) for marker in range(0xD0, 0xD8))
    return b"".join(parts) * 2 + b"\xff\xd9"
