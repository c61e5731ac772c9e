"""JPEG files: where they end, and whether their last scan is complete."""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass, field
from typing import IO

import cv2
import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from bpkd_sdk.images.errors import CutShortError
from bpkd_sdk.images.pixels import Samples, from_pil, orientation_of

_MARKER = re.compile(rb"\xff[^\x00\xff]")
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # restart markers, D0 to D7, belong to a scan
_START_OF_SCAN, _END_OF_IMAGE, _METADATA = 0xDA, 0xD9, 0xE1
_STANDALONE = (0x01, *range(0xD0, 0xD8))  # markers without a segment
_SEGMENTS = (*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE)
_FRAMES = tuple(code for code in range(0xC0, 0xD0) if code not in (0xC4, 0xC8, 0xCC))  # the others are tables
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2  # the frames with Huffman codes and a DCT

_MOST_SCANS = 500  # encoders write about 10; each costs a pass over the whole image
_LOOKAHEAD = 8  # bytes that libjpeg's Huffman decoder reads ahead
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_END = b"\xff\xd9"
_STUFFING = b"\xff\x00"  # eight 1 bits; no Huffman code consists of 1 bits only


@dataclass
class _Layout:
    """Structure of a JPEG file.

    Attributes:
        height: Number of rows.
        width: Number of columns.
        bits: Number of bits a channel.
        has_metadata: Whether there is a segment APP1, which may hold EXIF or XMP data.
        frame: Marker of the last frame header.
        scans: Number of scans.
        scan_start: Offset of the data of the last scan.
        scan_end: Offset behind the last scan.
        end: Offset behind the end marker; None if there is none.
        missing: Number of bits that the scans leave out, by component, for each coefficient.
    """

    scan_end: int
    height: int = 0
    width: int = 0
    bits: int = 0
    has_metadata: bool = False
    frame: int = 0
    scans: int = 0
    scan_start: int = 0
    end: int | None = None
    missing: dict[int, bytearray] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the file is grey or has three channels, in one scan that has an end marker."""
        known = self.frame in (_BASELINE, _EXTENDED) and self.bits == 8 and len(self.missing) in (1, 3)
        return known and self.scans == 1 and self.end is not None

    def add_frame(self, marker: int, header: bytes) -> None:
        """Record a frame header."""
        if len(header) < 8:
            raise CutShortError("it ends before its first scan")
        self.frame = marker
        self.bits, self.height, self.width = struct.unpack(">BHH", header[2:7])
        self.missing = {component: bytearray(b"\xff" * 64) for component in header[8::3]}

    def add_scan(self, header: bytes, start: int, end: int) -> None:
        """Record a scan."""
        self.scans, self.scan_start, self.scan_end = self.scans + 1, start, end
        first, last, bits = (header[-3], header[-2], header[-1] & 15) if self.frame == _PROGRESSIVE else (0, 63, 0)
        for component in header[3:-3:2]:
            if component in self.missing:
                self.missing[component][first : last + 1] = bytes([bits]) * (last + 1 - first)


class JpegReader:
    """A JPEG file whose structure has been read."""

    bits = 8

    def __init__(self, file: IO[bytes]) -> None:
        self._content = file.read()
        self._layout = _layout(self._content)
        if not self._layout.scans:
            raise CutShortError("it ends before its first scan")
        self.height, self.width = self._layout.height, self._layout.width

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8."""
        return orientation_of(self._image()) if self._layout.has_metadata else 1

    def decode(self) -> Samples:
        """Decode the image; CutShortError if its last scan is not complete. Data behind the end marker are ignored."""
        layout = self._layout
        if layout.scans > _MOST_SCANS:
            raise ValueError(f"it has {layout.scans} scans, and at most {_MOST_SCANS} are read")
        if any(any(bits) for bits in layout.missing.values()):
            raise CutShortError("its last scans are missing")
        if layout.end is None and layout.scan_end < len(self._content):
            raise CutShortError("its last scan goes over into data of another kind, without an end marker")
        image = self._decode_fast() if layout.is_plain else None
        # Decoders fill the rest of a scan that was cut with zeros, which are grey, and hide or log the warning.
        if image is not None and not _ends_grey(image):
            return Samples(image, orientation=self.orientation)
        slow = self._image()
        if layout.frame in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            _decode_complete(slow, _without_padding(self._content, layout), layout.scan_start)
        return from_pil(slow)

    def _image(self) -> JpegImageFile:
        return JpegImageFile(io.BytesIO(self._content))

    def _decode_fast(self) -> np.ndarray | None:
        content = np.frombuffer(self._content, np.uint8, self._layout.end or -1)
        image = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        return image if image is not None and image.shape[:2] == (self.height, self.width) else None


def _layout(content: bytes) -> _Layout:
    """Walk over the segments of a JPEG file up to its end marker, or to where no segment follows."""
    layout, position = _Layout(scan_end=len(content)), 2
    while True:
        # Cameras leave padding between the segments of a header; behind a scan, it would be data of another kind.
        find = _MARKER.match if layout.scans else _MARKER.search
        marker = find(content, _skip_fill(content, position))
        if marker is None:
            return layout
        code, position = content[marker.end() - 1], marker.end()
        if code == _END_OF_IMAGE and layout.scans:
            layout.end = position
            return layout
        if code in _STANDALONE:
            continue
        segment = content[position : position + int.from_bytes(content[position : position + 2], "big")]
        if code not in _SEGMENTS or (code == _START_OF_SCAN and not _is_scan_header(segment)):
            if layout.scans:
                return layout
            continue
        position += len(segment)
        layout.has_metadata |= code == _METADATA
        if code in _FRAMES:
            layout.add_frame(code, segment)
        if code == _START_OF_SCAN:
            found = _END_OF_SCAN.search(content, position)
            layout.add_scan(segment, position, found.start() if found else len(content))
            position = layout.scan_end


def _skip_fill(content: bytes, position: int) -> int:
    """Return the offset of the last of the bytes FF at this position; a marker may begin with any number of them."""
    while content[position : position + 2] == b"\xff\xff":
        position += 1
    return position


def _is_scan_header(segment: bytes) -> bool:
    return len(segment) in (8, 10, 12, 14) and len(segment) == 6 + 2 * segment[2]


def _ends_grey(image: np.ndarray) -> bool:
    """Return whether the last block of 8x8 has the brightness of a block that was not decoded."""
    height, width = image.shape[:2]
    brightness = np.array([0.299, 0.587, 0.114])
    if abs(image[-1, -1] @ brightness - 128) >= 2:
        return False
    block = image[(height - 1) // 8 * 8 :, (width - 1) // 8 * 8 :]
    return bool(np.abs(block @ brightness - 128).max() < 2)


def _without_padding(content: bytes, layout: _Layout) -> bytes:
    """Return the file up to the end of its last scan, without what fills the rest of a file that was not finished."""
    scan = content[: layout.scan_end]
    if layout.end is None:
        scan = scan.rstrip(b"\xff")
        filled = scan.rstrip(b"\x00")
        if len(scan) - len(filled) >= 16:
            scan = filled + b"\x00" if filled.endswith(b"\xff") else filled
    return scan


def _decode_complete(image: JpegImageFile, content: bytes, scan_start: int) -> None:
    """Decode a JPEG file up to the end of its last scan; CutShortError if bytes of that scan are missing.

    libjpeg never fails for missing data: at a marker it fills the scan with zeros. Without a marker, it waits for more
    bytes and leaves those unread that do not complete a block. So the decoder gets the scan without the end marker,
    followed by as many 1 bits as it reads ahead: then a complete baseline scan is done, and a complete progressive
    scan takes any further bytes for garbage before the next marker. A decoder that waits for a restart marker does
    the same, until it gets that marker.
    """
    image.load_prepare()
    name, extents, _, arguments = image.tile[0]
    decoder = Image._getdecoder(image.mode, name, arguments, image.decoderconfig)
    restarts = _RESTART.findall(content, scan_start)
    restart = b"\xff" + bytes([0xD0 + (restarts[-1][1] + 1) % 8 if restarts else 0xD0])
    try:
        decoder.setimage(image.im, extents)
        used, error = decoder.decode(content)
        rest = content[used:]
        for count, more in enumerate([_STUFFING] * 4 * _LOOKAHEAD + [restart] + [_STUFFING] * 2 * _LOOKAHEAD):
            if used < 0:
                break
            rest += more
            used, error = decoder.decode(rest)
            rest = rest[used:]
            if used >= 0 and rest and count >= _LOOKAHEAD:
                raise CutShortError("its last scan is not complete")
        if used >= 0:
            used, error = decoder.decode(_END)
        if used >= 0 or error < 0:
            raise CutShortError("its last scan is damaged or not complete")
    finally:
        decoder.cleanup()
    image.tile = []
