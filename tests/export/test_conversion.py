"""The commands export, benchmark and formats: the suffix and the precision determine what is written."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import bpkd_sdk
from bpkd_sdk.cli.deployment import parse_batch_sizes, parse_sizes
from bpkd_sdk.data.shapes import render
from bpkd_sdk.export import to_onnx
from bpkd_sdk.export.benchmark import BenchmarkReport
from bpkd_sdk.export.conversion import convert, plan_steps
from bpkd_sdk.runtime import FORMATS, find_format
from bpkd_sdk.runtime.manifest import load_manifest
from bpkd_sdk.runtime.onnx import OnnxRuntime
from tests.networks import tiny

SIZE = (64, 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversion")
    torch.manual_seed(0)
    model = bpkd_sdk.create_model("smp/FPN/tu-test_resnet", 9).eval()
    bpkd_sdk.save_model(model, folder / "m.safetensors")
    return folder


@pytest.fixture
def compiler():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is made for Linux on x86-64 only")


def test_a_checkpoint_becomes_an_engine_of_half_precision(bpkd, compiler, folder, tmp_path):
    code, out, err = bpkd(
        "export", folder / "m.safetensors", tmp_path / "m.engine", "--precision", "fp16", "--input-size", "64x96",
        "--no-dynamic-batch", "--hardware", "sm86",
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"ONNX: \d+\.\d+% of the pixels as in torch \(\d+\.\d+% at edges\)", out)
    assert re.search(r"Engine for sm86: layers with weights \d+ in fp16; compiled", out)
    manifest = load_manifest(tmp_path / "m.engine")
    assert manifest.precision == "fp16"
    assert manifest.inputs["images"]["max"] == [1, *SIZE, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"m.engine", "m.engine.json"}


def test_an_onnx_file_becomes_an_engine_of_int8(bpkd, compiler, tmp_path):
    network = tiny(9, width=16).eval()
    network.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=9)
    to_onnx(network, tmp_path / "m.onnx", input_size=SIZE, dynamic_size=True)
    code, out, err = bpkd(
        "export", tmp_path / "m.onnx", tmp_path / "m.plan", "--precision", "int8", "--data", "shapes", "--images", 4,
        "--max-boundary-loss", 1, "--input-sizes", "64x64,64x96,128x128", "--batch-sizes", "1,2,4",
        "--hardware", "sm86", "--hardware", "sm89",
    )  # fmt: skip
    assert code == 0, err
    assert "int8: 1 of 3 layers" in out
    rows = [line.split() for line in out.splitlines() if " Conv " in line]
    assert {row[0]: row[-1] for row in rows} == {"0": "fp32", "3": "int8", "6": "fp32"}
    edges = [float(row[2].rstrip("%")) for row in rows]
    assert edges == sorted(edges, reverse=True)
    assert edges[0] > 0
    manifest = load_manifest(tmp_path / "m.plan")
    assert manifest.layers == {"CONVOLUTION": {"FLOAT": 2, "INT8": 1}}
    assert {layer["name"] for layer in manifest.facts["quantization"]["layers"]} == {"0", "3", "6"}
    assert manifest.inputs["images"]["opt"] == [2, *SIZE, 3]
    assert manifest.targets == ("sm86", "sm89")
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.plan", "m.plan.json"}


def test_a_file_is_verified_on_further_images(bpkd, folder, tmp_path):
    """The file gets windows of images that are larger."""
    (tmp_path / "images/val").mkdir(parents=True)
    (tmp_path / "classes.json").write_text(json.dumps([str(index) for index in range(9)]))
    Image.fromarray(render(0, "val", 0, (128, 128))[0]).save(tmp_path / "images/val/a.png")
    with pytest.warns(UserWarning, match="on 6 windows of 64 x 96 for an image of 128 x 128"):
        code, _, err = bpkd(
            "export", folder / "m.safetensors", tmp_path / "m.onnx", "--input-size", "64x96", "--verify-on", tmp_path
        )
    assert code == 0, err
    runs = OnnxRuntime(tmp_path / "m.onnx").metadata["parity"]["runs"]
    assert [128, 128] in [run["size"] for run in runs]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("m.safetensors", {}, "not write files that end in .safetensors, .*; it writes .onnx, .engine, .plan"),
        ("m.pt", {}, "not write files that end in .pt, but got .*m.pt; it writes .onnx, .engine, .plan"),
        ("triton://host/m", {}, "not write the format Triton, .*`bpkd triton`"),
        ("m.tflite", {}, "ends in one of .safetensors.*but got '.*m.tflite'"),
        ("m.onnx", {"precision": "fp8"}, "`precision` to be one of {'fp32', 'fp16', 'int8'}, but got 'fp8'"),
        ("m.onnx", {}, "Option `input_size` is required by the export steps from m.safetensors to m.onnx: to_onnx."),
        (
            "m.onnx",
            {"input_size": SIZE, "workspace_mb": 8},
            "Option `workspace_mb` is not used by the export steps .*: to_onnx.",
        ),
        (
            "m.onnx",
            {"input_size": SIZE, "precision": "int8"},
            "Option `calibration_data` is required by the export steps .*: to_onnx, then quantize.",
        ),
        (
            "m.plan",
            {"input_size": SIZE, "force": True},
            "force=True keeps an ONNX file .* from which no further file is made",
        ),
        (
            "m.plan",
            {"input_size": SIZE, "images": 8},
            "Option `images` is not used by the export steps .*: to_onnx, then to_tensorrt.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_options_that_do_not_fit_the_steps_are_refused(folder, tmp_path, target, options, message):
    with pytest.raises(ValueError, match=message):
        convert(folder / "m.safetensors", target if "://" in target else tmp_path / target, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_keeps_its_precision():
    with pytest.raises(ValueError, match=r"m.onnx is an ONNX file already. Pass precision='int8', or an engine"):
        plan_steps("m.onnx", "n.onnx", None)
    with pytest.raises(ValueError, match="is an ONNX file and keeps its own precision"):
        plan_steps("m.onnx", "m.engine", "fp16")
    with pytest.raises(FileNotFoundError, match="no ONNX file at none.onnx"):
        convert("none.onnx", "m.engine")


@pytest.mark.parametrize("text", ["1,2", "1,2,x", "4"])
def test_a_range_of_batches(text):
    with pytest.raises(ValueError, match=f"like 1,4,8 .* but got '{text}'"):
        parse_batch_sizes(text)
    assert parse_batch_sizes("1,4,8") == (1, 4, 8)


def test_a_range_of_sizes():
    assert parse_sizes("32x48,64x96,64x128") == ((32, 48), (64, 96), (64, 128))
    with pytest.raises(ValueError, match="three sizes like .* but got '32x48'"):
        parse_sizes("32x48")


def test_benchmark_of_the_command_line(bpkd, folder, tmp_path):
    outputs = {kind: tmp_path / f"b.{kind}" for kind in ("json", "markdown", "html")}
    (tmp_path / "m.none").touch()
    options = [part for kind, path in outputs.items() for part in (f"--{kind}", path)]
    code, out, err = bpkd(
        "benchmark", folder / "m.safetensors", tmp_path / "m.none", "--input-size", "64x96", "--duration", 0.1, *options
    )
    assert code == 0, err
    assert "m.safetensors" in out
    report = BenchmarkReport.from_json(outputs["json"].read_text())
    assert report.input_size == SIZE
    assert [row.problem is None for row in report.rows] == [True, False]
    assert report.to_markdown() == outputs["markdown"].read_text()
    assert report.to_html() == outputs["html"].read_text()
    code, out, _ = bpkd("benchmark", tmp_path / "m.none", "--duration", 0.1)
    assert code == 1
    assert "m.none could not be measured here: ValueError: Expected a file" in " ".join(out.split())


def test_the_table_of_formats_is_the_documents(bpkd):
    code, out, _ = bpkd("formats", "--markdown")
    assert code == 0
    document = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    assert out in document
    for format_ in FORMATS:
        assert f"| {format_.name} |" in out
        assert all(find_format(f"m{suffix}") is format_ for suffix in format_.suffixes if suffix.startswith("."))
    code, out, _ = bpkd("formats")
    assert all(suffix in out for format_ in FORMATS for suffix in format_.suffixes)
