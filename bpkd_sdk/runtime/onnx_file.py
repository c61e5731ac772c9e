"""The format of the ONNX files of bpkd-sdk, written and read without the package `onnx`.

A file is an ONNX model, and behind it entries of its metadata, because protobuf reads a message that is appended to
another as a part of it::

    model | bpkd: JSON | bpkd_cpu: patch | bpkd_sha256: SHA-256, in hex, of all bytes before it

The patch makes the faster model for a CPU of the file, see `bpkd_sdk.export.onnx_cpu`. Both models have the same
weights, so the patch is small: it lists ranges of the file, and the few bytes that stand between them. A file whose own
model is the fastest has no patch, and so have files of older versions.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bpkd_sdk.errors import check_choice
from bpkd_sdk.spec import NetworkSpec

METADATA_KEY = "bpkd"
_PATCH_KEY, _SEAL_KEY = "bpkd_cpu", "bpkd_sha256"
_SEAL_LENGTH = 64
_REQUIRED = ("network", "input_size", "dynamic_batch", "preprocess", "argmax", "precision")

# Numbers of fields in onnx.proto: of the model its graph and its metadata, of an entry of the metadata key and value.
_GRAPH, _METADATA, _KEY, _VALUE = 7, 14, 1, 2
_VARINT, _EIGHT_BYTES, _LENGTH_DELIMITED, _FOUR_BYTES = 0, 1, 2, 5

# A patch is a header (the CRC-32 of its result, the number of steps), the steps, and the new bytes of all steps. A step
# is the start and the length of a range of the file, and the number of new bytes behind the range.
_HEADER, _STEP = struct.Struct("<QQ"), struct.Struct("<QQQ")


def pack_onnx(model: bytes, cpu_model: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Return the content of an ONNX file.

    Args:
        model: Serialised model without metadata.
        cpu_model: Serialised model that runs in its place on a CPU; the same bytes if none is faster.
        metadata: Plain JSON values, see `check_metadata`.
    """
    facts = _entry(METADATA_KEY, json.dumps(metadata).encode())
    content = model + facts
    if cpu_model != model:
        content += _entry(_PATCH_KEY, _make_patch(content, cpu_model + facts))
    content += _entry(_SEAL_KEY, b"0" * _SEAL_LENGTH)[:-_SEAL_LENGTH]
    return content + hashlib.sha256(content).hexdigest().encode()


def read_onnx(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Read an ONNX file of bpkd-sdk: its content and its metadata.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, has no metadata of bpkd-sdk or was altered.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no ONNX file at {path}.")
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty. Export it again, or copy the file again from its source.")
    try:
        text = _read_entries(content).get(METADATA_KEY)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable ONNX file ({error}). It may be truncated.") from error
    metadata = parse_metadata(text, path)
    _check_seal(content, path)
    return content, metadata


def cpu_model(content: bytes, name: object) -> bytes:
    """Return the serialised model that runs on a CPU: the content of a file with its patch applied, if it has one.

    Args:
        content: Content of a file, from `read_onnx`.
        name: Name of the file in the message of an error.

    Raises:
        ValueError: If the patch is not readable.
    """
    packed = _read_entries(content).get(_PATCH_KEY)
    if packed is None:
        return content
    try:
        return _apply_patch(content, packed)
    except (ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"The model for a CPU in {name} is not readable ({error}); export the file again.") from error


def _check_seal(content: bytes, path: Path) -> None:
    """Raise ValueError unless the last 64 bytes of a file are the SHA-256, in hex, of all bytes before them."""
    sealed, seal = memoryview(content)[:-_SEAL_LENGTH], content[-_SEAL_LENGTH:]
    if hashlib.sha256(sealed).hexdigest().encode() != seal:
        raise ValueError(
            f"{path} has been altered since bpkd-sdk wrote it: its content does not match the hash at its end. "
            "Export it again, or copy the file again from its source."
        )


def parse_metadata(text: str | None, name: object) -> dict[str, Any]:
    """Parse the metadata of an artifact from JSON; raise ValueError if it is absent, unreadable or incomplete."""
    if text is None:
        raise ValueError(f"{name} has no metadata of bpkd-sdk; write it with the functions of bpkd_sdk.export.")
    try:
        return check_metadata(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The metadata of bpkd-sdk in {name} is not readable ({error}); export it again.") from error


def check_metadata(metadata: Any) -> dict[str, Any]:
    """Return the metadata of an artifact; raise ValueError if it is not an object or lacks a required key."""
    if not isinstance(metadata, dict):
        raise ValueError(f"it is {metadata!r:.40}, not an object")
    if missing := [key for key in _REQUIRED if key not in metadata]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    check_choice("precision", metadata["precision"], ("fp32", "fp16", "int8"))
    if metadata["precision"] == "int8" and not isinstance(metadata.get("quantization"), dict):
        raise ValueError("it lacks quantization")
    NetworkSpec.from_dict(metadata["network"])
    return metadata


def _make_patch(content: bytes, changed: bytes) -> bytes:
    """Return the patch that makes a changed model of the content of a file."""
    known = {content[start:end]: start for start, end in _pieces(content)}
    steps, added = [[0, 0, 0]], bytearray()
    for start, end in _pieces(changed):
        piece, last = changed[start:end], steps[-1]
        if piece not in known:
            last[2] += len(piece)
            added += piece
        elif known[piece] == last[0] + last[1] and not last[2]:
            last[1] += len(piece)
        else:
            steps.append([known[piece], len(piece), 0])
    header = _HEADER.pack(zlib.crc32(changed), len(steps))
    return base64.b64encode(zlib.compress(header + b"".join(_STEP.pack(*step) for step in steps) + added, 9))


def _apply_patch(content: bytes, packed: str) -> bytes:
    """Return the model that a patch makes of the content of a file; raise an error if the patch is damaged."""
    limit = 2 * len(content)
    unpacker = zlib.decompressobj()
    patch = unpacker.decompress(base64.b64decode(packed, validate=True), limit)
    if not unpacker.eof:
        raise ValueError("its patch is cut off, or longer than the file")
    checksum, count = _HEADER.unpack_from(patch)
    behind_steps = _HEADER.size + count * _STEP.size
    steps = list(_STEP.iter_unpack(patch[_HEADER.size : behind_steps]))
    if any(start + copied > len(content) for start, copied, _ in steps):
        raise ValueError("its patch copies bytes that the file does not have")
    if behind_steps + sum(added for _, _, added in steps) != len(patch):
        raise ValueError("its patch has another length than it states")
    if (length := sum(copied + added for _, copied, added in steps)) > limit:
        raise ValueError(f"it would be {length} bytes long, far longer than the file")
    file, new, position = memoryview(content), memoryview(patch), behind_steps
    parts = []
    for start, copied, added in steps:
        parts += [file[start : start + copied], new[position : position + added]]
        position += added
    changed = b"".join(parts)
    if zlib.crc32(changed) != checksum:
        raise ValueError("its patch was made for another file")
    return changed


def _pieces(model: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of each piece of a serialised model, in order: the fields of its graph, and all others."""
    for field in read_fields(model):
        if field.number == _GRAPH:
            yield field.start, field.value_start
            for inner in read_fields(model, field.value_start, field.end):
                yield inner.start, inner.end
        else:
            yield field.start, field.end


def _read_entries(content: bytes) -> dict[str, str]:
    """Return the metadata of a serialised model; raise ValueError if it is not protobuf."""
    entries: dict[str, str] = {}
    for entry in read_fields(content):
        if entry.number == _METADATA:
            texts = {field.number: field.value(content) for field in read_fields(content, entry.value_start, entry.end)}
            entries[texts.get(_KEY, b"").decode()] = texts.get(_VALUE, b"").decode()
    return entries


class Field(NamedTuple):
    """Place of one field in a protobuf message.

    Attributes:
        number: Number of the field in its message.
        start: Position of the field's first byte.
        value_start: Position of the first byte of its value.
        end: Position behind its last byte.
    """

    number: int
    start: int
    value_start: int
    end: int

    def value(self, content: bytes) -> bytes:
        """Return the bytes of the value."""
        return content[self.value_start : self.end]


def read_fields(content: bytes, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """Yield the fields of a protobuf message, without parsing their values.

    Args:
        content: Bytes with the message.
        start: Position of the message in them.
        end: Position behind the message; None: the end of the bytes.

    Raises:
        ValueError: If the message is cut off or not protobuf.
    """
    end = len(content) if end is None else end
    while start < end:
        tag, value_start = read_varint(content, start, end)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            _, behind = read_varint(content, value_start, end)
        elif wire_type == _LENGTH_DELIMITED:
            length, value_start = read_varint(content, value_start, end)
            behind = value_start + length
        elif wire_type in (_FOUR_BYTES, _EIGHT_BYTES):
            behind = value_start + (4 if wire_type == _FOUR_BYTES else 8)
        else:
            raise ValueError(f"byte {start} begins no field of protobuf")
        if behind > end or not number:
            raise ValueError(f"the field at byte {start} is damaged or cut off")
        yield Field(number, start, value_start, behind)
        start = behind


def read_varint(content: bytes, start: int, end: int) -> tuple[int, int]:
    """Return the number of variable length at a position, and the position behind it."""
    number = 0
    for index, byte in enumerate(content[start : min(end, start + 10)]):
        number |= (byte & 127) << 7 * index
        if byte < 128:
            return number, start + index + 1
    raise ValueError(f"the number at byte {start} is damaged or cut off")


def _entry(key: str, value: bytes) -> bytes:
    """Return the bytes that add an entry to the metadata of a serialised model."""
    return _field(_METADATA, _field(_KEY, key.encode()) + _field(_VALUE, value))


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])
