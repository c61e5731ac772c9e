"""Files on disk: atomic writes, JSON, and records checked field by field."""

from dataclasses import dataclass

import pytest

from bpkd_sdk.files import file_sha256, parse_record, read_json, write_atomically, write_json


@dataclass(frozen=True)
class Point:
    name: str
    size: tuple[int, int]
    scale: float = 1.0


def test_a_record_is_built_from_json_values():
    assert parse_record(Point, {"name": "a", "size": [2, 3]}, "a.json") == Point("a", (2, 3), 1.0)


def test_every_wrong_field_of_a_record_is_named():
    with pytest.raises(ValueError, match=r"(?s)a\.json does not hold a valid Point:.*name: .*size\.1: .*got 'x'"):
        parse_record(Point, {"name": 3, "size": [2, "x"]}, "a.json")
    with pytest.raises(ValueError, match=r"Point: Input should be .*got \[1\]"):
        parse_record(Point, [1], "a.json")


def test_json_and_hash_of_what_was_written(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"a": [1, 2.5, None]})
    assert read_json(tmp_path / "new" / "a.json") == {"a": [1, 2.5, None]}
    write_atomically(tmp_path / "b", b"abc")
    assert file_sha256(tmp_path / "b") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["b"]
