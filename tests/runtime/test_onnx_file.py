"""ONNX files of bpkd-sdk are read without the package onnx, and the model for a CPU is a patch of the file's model."""

import base64
import hashlib
import json
import struct
import sys
import zlib

import numpy as np
import onnx
import pytest

import bpkd_sdk
from benchmarks.networks import to_int8
from bpkd_sdk.export import to_onnx
from bpkd_sdk.export.onnx import seal_onnx
from bpkd_sdk.export.onnx_cpu import optimize_for_cpu
from bpkd_sdk.runtime.onnx import OnnxRuntime
from bpkd_sdk.runtime.onnx_file import cpu_model, pack_onnx, read_onnx
from tests.networks import tiny

SIZE = (32, 48)
FACTS = {
    "network": bpkd_sdk.NetworkSpec(name=None, num_classes=2).to_dict(),
    "input_size": [8, 8],
    "precision": "fp32",
    **dict.fromkeys(("dynamic_batch", "preprocess", "argmax"), False),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    to_onnx(tiny(5, width=16).eval(), folder / "fp32.onnx", input_size=SIZE)
    to_int8(folder / "fp32.onnx", folder / "int8.onnx", ends=True)
    return folder


def reseal(content):
    """Return altered content with the hash that fits it."""
    return content[:-64] + hashlib.sha256(content[:-64]).hexdigest().encode()


def with_patch(content, patch):
    """Return the content of a file with another patch."""
    model = onnx.load_from_string(content)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {"bpkd": entries["bpkd"], "bpkd_cpu": patch, "bpkd_sha256": "0" * 64})
    return reseal(model.SerializeToString())


def packed(*steps, new=b""):
    table = b"".join(struct.pack("<QQQ", *step) for step in steps)
    return base64.b64encode(zlib.compress(struct.pack("<QQ", 0, len(steps)) + table + new)).decode()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_patch_makes_the_model_that_the_edits_for_a_cpu_make(files, precision):
    path = files / f"{precision}.onnx"
    edited = onnx.load(path)
    optimize_for_cpu(edited)
    content, metadata = read_onnx(path)
    patched = onnx.load_from_string(cpu_model(content, path))
    assert patched.graph == edited.graph != onnx.load(path).graph
    assert patched.opset_import == edited.opset_import
    (entry,) = patched.metadata_props
    assert json.loads(entry.value) == metadata


def test_the_masks_in_int8_equal_those_of_the_edited_model(files):
    edited = onnx.load(files / "int8.onnx")
    optimize_for_cpu(edited)
    (files / "edited.onnx").write_bytes(pack_onnx(*[edited.SerializeToString()] * 2, read_onnx(files / "int8.onnx")[1]))
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    expected = OnnxRuntime(files / "edited.onnx", "cpu", as_written=True)(images)
    np.testing.assert_array_equal(OnnxRuntime(files / "int8.onnx", "cpu")(images), expected)


def test_a_model_that_no_edit_makes_faster_gets_no_patch():
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]> g (float[2] x) => (float[2] y) { y = Relu (x) }
    """)
    content = seal_onnx(model, FACTS)
    assert b"bpkd_cpu" not in content
    assert cpu_model(content, "m.onnx") == content


def test_the_patch_contains_no_weights():
    rng = np.random.default_rng(0)
    weights = onnx.numpy_helper.from_array(rng.normal(size=(256, 256, 3, 3)).astype(np.float32), "w")
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        g (float[1, 256, 8, 8] x) => (int64[1, 16, 16] y) <int64[4] sizes = {1, 256, 16, 16}>
        { c = Conv <pads = [1, 1, 1, 1]> (x, w)  r = Resize <mode = "linear"> (c, "", "", sizes)
          y = ArgMax <axis = 1, keepdims = 0> (r) }
    """)
    model.graph.initializer.append(weights)
    content = seal_onnx(model, FACTS)
    assert len(content) - len(model.SerializeToString()) < 3000
    onnx.checker.check_model(cpu_model(content, "m.onnx"), full_check=True)


def test_files_run_without_the_package_onnx(files, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    expected = OnnxRuntime(files / "int8.onnx", "cpu")(images)
    monkeypatch.setitem(sys.modules, "onnx", None)
    np.testing.assert_array_equal(OnnxRuntime(files / "int8.onnx", "cpu")(images), expected)


@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        ("not base64!", "not readable"),
        (base64.b64encode(b"not zlib").decode(), "incorrect header check"),
        (base64.b64encode(zlib.compress(bytes(100))[:-6]).decode(), "cut off"),
        (base64.b64encode(zlib.compress(b"")).decode(), "requires a buffer"),
        (base64.b64encode(zlib.compress(bytes(10**9))).decode(), "longer than the file"),
        (packed((10**9, 1, 0)), "bytes that the file does not have"),
        (packed((0, 2**64 - 1, 0)), "bytes that the file does not have"),
        (packed((0, 1, 5), new=b"four"), "another length"),
        (packed((0, 1, 3), new=b"four"), "another length"),
        (packed(*[(0, 1000, 0)] * 500), "far longer than the file"),
        (base64.b64encode(zlib.compress(struct.pack("<QQ", 0, 2**63))).decode(), "another length"),
        (packed((0, 10, 0)), "made for another file"),
    ],
    ids=lambda value: None if len(value) > 40 else value,
)
def test_a_damaged_patch_is_refused(files, tmp_path, patch, problem):
    content = (files / "fp32.onnx").read_bytes()
    (tmp_path / "damaged.onnx").write_bytes(with_patch(content, patch))
    with pytest.raises(ValueError, match=problem):
        OnnxRuntime(tmp_path / "damaged.onnx", "cpu")
    OnnxRuntime(tmp_path / "damaged.onnx", "cpu", as_written=True)  # the file's own model is whole


def test_altered_files_are_refused_or_unchanged_in_what_is_read(files, tmp_path):
    """Bytes are changed, removed or repeated around the metadata, and the hash is made to fit."""
    path, rng = tmp_path / "altered.onnx", np.random.default_rng(0)
    content, metadata = read_onnx(files / "int8.onnx")
    expected = cpu_model(content, "int8.onnx")
    facts, patch, seal = (content.index(key) for key in (b"bpkd", b"bpkd_cpu", b"bpkd_sha256"))
    framing = [*range(4), *range(facts - 12, facts + 8), *range(patch - 8, patch + 14)]
    refused = 0
    for _ in range(150):
        at = rng.choice([*framing, *rng.integers(patch + 8, seal - 4, 20)])
        new = [rng.bytes(1), b"", content[at : at + 1] * 3][rng.integers(3)]
        path.write_bytes(reseal(content[:at] + new + content[at + 1 :]))
        try:
            read, found = read_onnx(path)
            model = cpu_model(read, path)
        except ValueError:
            refused += 1
        else:
            assert found == metadata
            assert model in (expected, read)  # the file's own model runs if the key of the patch was altered
    assert refused > 100


def test_a_file_cut_anywhere_is_refused(files, tmp_path):
    content, path = (files / "fp32.onnx").read_bytes(), tmp_path / "cut.onnx"
    path.touch()
    with pytest.raises(ValueError, match=r"cut.onnx is empty. Export it again"):
        read_onnx(path)
    for length in [1, 2, len(content) - 1, *np.random.default_rng(0).integers(3, len(content), 40)]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut.onnx"):
            read_onnx(path)
