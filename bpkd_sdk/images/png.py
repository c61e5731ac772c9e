"""Reader of PNG files: checksums, metadata after the pixels, transparent colours, bit depth."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

import cv2
import numpy as np
from PIL.PngImagePlugin import PngImageFile

from bpkd_sdk.images.samples import Samples, clear_color, orientation_of

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # chunks that may contain EXIF or XMP data
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types


class _Chunk(NamedTuple):
    """The kind of a chunk, and the position of its data in the file."""

    kind: bytes
    start: int
    length: int

    def data(self, content: bytes) -> bytes:
        return content[self.start : self.start + self.length]

    def whole(self, content: bytes) -> bytes:
        """The chunk with its length, kind and checksum."""
        return content[self.start - 8 : self.start + self.length + 4]


class PngReader:
    """A PNG file whose header has been read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._header = file.read(33)
        if len(self._header) < 33:
            raise ValueError("the file is truncated inside its header")
        length, kind, self.width, self.height, self._depth, self._color = struct.unpack(">I4sIIBB", self._header[8:26])
        if (length, kind) != (13, b"IHDR") or struct.pack(">I", zlib.crc32(self._header[12:29])) != self._header[29:]:
            raise ValueError("the checksum of its header is wrong")
        self.bits = 16 if self._depth == 16 else 8

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8; the pixels are not read."""
        metadata = b""
        for chunk in _chunks(self._file):
            if chunk.kind in _METADATA:
                self._file.seek(chunk.start - 8)
                metadata += self._file.read(chunk.length + 12)
        return self._orientation(metadata)

    def _orientation(self, metadata: bytes) -> int:
        if not metadata:
            return 1
        # Metadata may follow the pixels. Pillow would find them only after decoding the image.
        return orientation_of(PngImageFile(io.BytesIO(self._header + metadata + b"\0\0\0\0IDAT")))

    def decode(self) -> Samples:
        """Decode the image; for an animation, its default image.

        Raises:
            ValueError: If a checksum is wrong, or the file is truncated.
        """
        self._file.seek(0)
        content = self._file.read()
        chunks = list(_chunks(io.BytesIO(content)))
        for chunk in chunks:
            start, end = chunk.start - 4, chunk.start + chunk.length
            if zlib.crc32(memoryview(content)[start:end]) != int.from_bytes(content[end : end + 4], "big"):
                raise ValueError(f"the checksum of its chunk {chunk.kind.decode('latin-1')} is wrong")
        orientation = self._orientation(b"".join(c.whole(content) for c in chunks if c.kind in _METADATA))
        if any(chunk.kind in _ANIMATION for chunk in chunks):
            content = _SIGNATURE + b"".join(c.whole(content) for c in chunks if c.kind not in _ANIMATION)
            chunks = list(_chunks(io.BytesIO(content)))
        extras = {chunk.kind: chunk.data(content) for chunk in chunks if chunk.kind in (b"tRNS", b"sBIT")}
        if self.bits == 8 and self._color in (_GREY, _RGB, _PALETTE) and b"tRNS" not in extras:
            return Samples(self._pixels(content, cv2.IMREAD_COLOR_RGB), orientation=orientation)
        values = self._pixels(content, cv2.IMREAD_UNCHANGED)
        if values.ndim == 3:
            values = cv2.cvtColor(values, cv2.COLOR_BGRA2RGBA if values.shape[2] == 4 else cv2.COLOR_BGR2RGB)
        stated = _stated_depth(values, extras[b"sBIT"], self._color) if self.bits == 16 and b"sBIT" in extras else None
        if self._color == _GREY and b"tRNS" in extras:
            clear = int.from_bytes(extras[b"tRNS"], "big")
            values = clear_color(values, clear * (255 // (2**self._depth - 1)) if self._depth < 8 else clear)
        return Samples(values, stated, orientation=orientation)

    def _pixels(self, content: bytes, flags: int) -> np.ndarray:
        """Decode with OpenCV, which refuses incomplete pixels. Pillow accepts them, and keeps 8 bits of 16-bit RGB."""
        values = cv2.imdecode(np.frombuffer(content, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
        if values is None or values.shape[:2] != (self.height, self.width):
            raise ValueError("its pixels cannot be decoded")
        return np.asarray(values)


def _chunks(file: IO[bytes]) -> Iterator[_Chunk]:
    """Yield the chunks of a PNG file; raise ValueError if the file ends before its end chunk."""
    end = file.seek(0, io.SEEK_END)
    position, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            raise ValueError("the file is truncated: its end chunk is missing")
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if position + 12 + length > end:
            raise ValueError(f"the file is truncated inside its chunk {kind.decode('latin-1')}")
        yield _Chunk(kind, position + 8, length)
        position += 12 + length


def _stated_depth(values: np.ndarray, significant_bits: bytes, color: int) -> int:
    """Return the bit depth of the chunk sBIT if the values are not scaled up to 16 bits, otherwise 16."""
    bits = max(significant_bits[: 1 if color in (0, 4) else 3], default=16)
    if not 1 <= bits < 16:
        return 16
    colors = values[..., :3] if values.ndim == 3 else values
    # Values below 2**bits that are scaled up have zeros as their lower bits.
    return bits if colors.max() < 2**bits and (colors & (2 ** (16 - bits) - 1)).any() else 16
