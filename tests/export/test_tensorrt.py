"""Engines compiled by TensorRT for RTX, which needs no GPU; they are audited and described, but never executed."""

import hashlib
import json
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import bpkd_sdk
from benchmarks.networks import fitted, to_int8
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import compilation, tensorrt, to_onnx
from bpkd_sdk.export.onnx import seal_onnx
from bpkd_sdk.export.quantization import quantize
from bpkd_sdk.export.tensorrt import to_tensorrt
from bpkd_sdk.runtime.manifest import load_manifest, manifest_path
from tests.networks import tiny
from tests.runtime.test_manifest import FACTS, claim_gpu

SIZE = (64, 96)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Export a tiny network to ONNX in each precision."""
    folder = tmp_path_factory.mktemp("onnx")
    network = tiny(9, width=16).eval()
    network.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=9, class_names=ShapesDataset().class_names)
    paths = {precision: folder / f"{precision}.onnx" for precision in ("fp32", "fp16", "int8")}
    for precision in ("fp32", "fp16"):
        to_onnx(network, paths[precision], input_size=SIZE, precision=precision)
    data = ShapesDataset("val", length=4, size=SIZE)
    quantize(paths["fp32"], paths["int8"], data, max_boundary_loss=1.0)
    return paths


def small_file(path, *, sides=("height", "width"), batch="batch", operator="Relu", facts=FACTS):
    """Write an ONNX file with metadata of bpkd-sdk: one convolution and one other operator."""
    weights = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"], name="net/conv", pads=[1, 1, 1, 1]),
        helper.make_node(operator, ["a"], ["logits"], name="net/last"),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, channels, *sides])]
        for name, channels in (("images", 3), ("logits", 4))
    ]
    graph = helper.make_graph(nodes, "g", *ends, [weights])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(seal_onnx(proto, facts))
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_of_each_precision(compiler, files, tmp_path, precision):
    report = to_tensorrt(files[precision], tmp_path / "m.engine", hardware="sm86", workspace_mb=256)
    expected = {"fp32": {"FLOAT": 3}, "fp16": {"HALF": 3}, "int8": {"FLOAT": 2, "INT8": 1}}[precision]
    assert report.manifest.layers == {"CONVOLUTION": expected}
    assert report.manifest.precision == precision
    assert report.size == report.path.stat().st_size > 1000
    assert sorted(tmp_path.iterdir()) == [report.path, manifest_path(report.path)]


def test_the_manifest_describes_the_engine(compiler, files, tmp_path):
    path = to_tensorrt(files["fp16"], tmp_path / "m.plan", batch_sizes=(1, 2, 4), hardware=["sm86", "sm89"]).path
    found = load_manifest(path)
    assert (found.backend, found.build) == ("tensorrt_rtx", compiler.__version__)
    assert found.targets == ("sm86", "sm89")
    assert found.inputs == {
        "images": {"dtype": "UINT8", "min": [1, *SIZE, 3], "opt": [2, *SIZE, 3], "max": [4, *SIZE, 3]}
    }
    assert found.outputs == {"masks": {"dtype": "UINT8", "shape": [-1, *SIZE]}}
    assert found.onnx_sha256 == hashlib.sha256(files["fp16"].read_bytes()).hexdigest()
    assert found.plan_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.facts["network"]["class_names"] == list(ShapesDataset().class_names)
    assert found.facts["parity"]["agreement"] > 0.99


def test_a_network_of_another_library_compiles_in_every_precision(compiler, tmp_path):
    network = fitted("smp/FPN/tu-test_efficientnet", (96, 128))
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    files = {precision: tmp_path / f"{precision}.onnx" for precision in ("fp32", "fp16", "int8")}
    to_onnx(network, files["fp32"], input_size=(96, 128), dynamic_batch=False)
    to_onnx(network, files["fp16"], input_size=(96, 128), precision="fp16")
    quantized = to_int8(files["fp32"], files["int8"], ends=True)
    for precision, type_ in (("fp32", "FLOAT"), ("fp16", "HALF"), ("int8", "INT8")):
        found = to_tensorrt(files[precision], tmp_path / f"{precision}.engine", hardware="sm89").manifest
        assert found.layers["CONVOLUTION"] == {type_: convolutions}
        assert found.inputs["images"]["max"][0] == (8 if precision == "fp16" else 1)
    assert quantized >= convolutions


def test_a_range_of_sizes(compiler, tmp_path):
    path = small_file(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="images of any size, but an engine needs a range: pass `input_sizes`"):
        to_tensorrt(path, tmp_path / "m.engine")
    sizes = ((32, 64), (64, 128), (128, 256))
    report = to_tensorrt(path, tmp_path / "m.engine", input_sizes=sizes, batch_sizes=(2, 2, 2))
    assert report.manifest.inputs["images"]["max"] == [2, 3, 128, 256]
    assert report.manifest.targets == ("sm80+",)
    with pytest.raises(ValueError, match=r"height of 1 <= smallest <= best <= largest, but got \(64, 32, 128\)"):
        to_tensorrt(path, tmp_path / "m.engine", input_sizes=(sizes[1], sizes[0], sizes[2]))
    fixed = small_file(tmp_path / "fixed.onnx", sides=(32, 32), batch=1)
    with pytest.raises(ValueError, match=r"takes a batch of 1 only, but got \(1, 2, 4\)"):
        to_tensorrt(fixed, tmp_path / "m.engine", batch_sizes=(1, 2, 4))


def test_a_file_of_another_precision_than_stated_is_refused(compiler, files, tmp_path):
    proto = onnx.load(files["fp32"])
    facts = json.loads(next(entry.value for entry in proto.metadata_props if entry.key == "bpkd"))
    for precision in ("fp16", "int8"):
        claim = {"precision": precision, "quantization": {"quantized": 2}}
        (tmp_path / "m.onnx").write_bytes(seal_onnx(proto, facts | claim))
        with pytest.raises(RuntimeError, match=f"states that it is {precision}.*but they are 3 FLOAT. No engine was"):
            to_tensorrt(tmp_path / "m.onnx", tmp_path / "m.engine")
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        pytest.param(FACTS | {"verified": False}, "does not agree with torch.*no engine is made", id="unverified"),
        pytest.param(FACTS | {"precision": "fp8"}, "`precision` to be one of .*but got 'fp8'", id="precision"),
        pytest.param(FACTS | {"precision": "int8"}, "lacks quantization.*export it again", id="quantization"),
        pytest.param({"precision": "fp32"}, "lacks network, input_size", id="not whole"),
        pytest.param([], r"it is \[\], not an object", id="list"),
    ],
)
def test_a_file_with_unsuitable_metadata_is_refused(tmp_path, facts, reason):
    path = small_file(tmp_path / "m.onnx", facts=facts)
    with pytest.raises(ValueError, match=f"m.onnx.*{reason}"):
        to_tensorrt(path, tmp_path / "m.engine")
    assert list(tmp_path.iterdir()) == [path]


def test_parser_errors_name_the_node(compiler, tmp_path):
    path = small_file(tmp_path / "m.onnx", operator="Det", sides=(4, 4))
    with pytest.raises(RuntimeError, match=r"node 1 'net/last' \(Det\): .*UNSUPPORTED_NODE.*checkDet"):
        to_tensorrt(path, tmp_path / "m.engine")
    assert list(tmp_path.iterdir()) == [path]


def test_compiler_errors_are_reported(compiler, tmp_path, monkeypatch):
    path = small_file(tmp_path / "m.onnx", sides=(8, 8))
    monkeypatch.setattr(compilation.Compilation, "_select_capabilities", select_this_machine)
    with pytest.raises(RuntimeError, match="could not compile.*m.onnx:\n.*CUDA driver"):
        to_tensorrt(path, tmp_path / "m.engine")
    assert list(tmp_path.iterdir()) == [path]


def select_this_machine(self, hardware):
    self.config.num_compute_capabilities = 1
    self.config.set_compute_capability(self.trt.ComputeCapability.CURRENT, 0)
    return ("sm80+",)


def test_a_gpu_without_engines_is_not_selected(compiler, tmp_path, monkeypatch):
    """On a machine with a data-centre GPU (sm90), engines for other GPUs are compiled but not loaded."""
    path = small_file(tmp_path / "m.onnx", sides=(8, 8))
    for module in (compilation, tensorrt):
        monkeypatch.setattr(module, "capability", lambda: "sm90")
    monkeypatch.setattr(tensorrt, "_describe_gpu", lambda: None)
    with pytest.raises(ValueError, match="hardware='current' is sm90 here.*only for sm75.*backend='tensorrt'"):
        to_tensorrt(path, tmp_path / "m.engine", hardware="current")
    for hardware in (None, ["sm86"]):
        assert to_tensorrt(path, tmp_path / "m.engine", hardware=hardware).manifest.inspected == {}


@pytest.mark.parametrize("fails", ["m.engine.json", "m.engine"])
@pytest.mark.parametrize("before", [False, True], ids=["first", "over another"])
def test_a_file_that_cannot_be_written_leaves_the_old_files(compiler, tmp_path, monkeypatch, fails, before):
    path, target = small_file(tmp_path / "m.onnx", sides=(8, 8)), tmp_path / "m.engine"
    if before:
        to_tensorrt(path, target, batch_sizes=(1, 1, 2))
    kept = {file: file.read_bytes() for file in tmp_path.iterdir()}
    full = Full(fails)
    monkeypatch.setattr(tensorrt, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        to_tensorrt(path, target)
    assert full.failed
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == kept


class Full:
    """Function that writes files, except the first file of one name, for which the disk is full."""

    def __init__(self, name):
        self.name, self.failed, self.write = name, False, tensorrt.write_atomically

    def __call__(self, path, content):
        if path.name == self.name and not self.failed:
            self.failed = True
            raise OSError("No space left on device")
        self.write(path, content)


def test_bad_arguments(compiler, files, tmp_path):
    with pytest.raises(ValueError, match=r"suffix.*'.engine', '.plan'.*'.trt'"):
        to_tensorrt(files["fp32"], tmp_path / "m.trt")
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        to_tensorrt(tmp_path / "none.onnx", tmp_path / "m.engine")
    with pytest.raises(ValueError, match="`hardware`.*'sm86'.*'sm90'. Did you mean"):
        to_tensorrt(files["fp32"], tmp_path / "m.engine", hardware=["sm86", "sm90"])
    with pytest.raises(ValueError, match="neither version-compatible plans"):
        to_tensorrt(files["fp32"], tmp_path / "m.engine", version_compatible=True)
    with pytest.raises(ValueError, match="nor a timing cache"):
        to_tensorrt(files["fp32"], tmp_path / "m.engine", timing_cache=tmp_path / "cache")
    (tmp_path / "cut.onnx").write_bytes(files["fp32"].read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut.onnx (is not a readable ONNX file|has been altered)"):
        to_tensorrt(tmp_path / "cut.onnx", tmp_path / "m.engine")
    (tmp_path / "altered.onnx").write_bytes(files["fp32"].read_bytes().replace(b"fp32", b"fp16", 1))
    with pytest.raises(ValueError, match=r"altered.onnx has been altered since bpkd-sdk wrote it"):
        to_tensorrt(tmp_path / "altered.onnx", tmp_path / "m.engine")
    proto = onnx.load(files["fp32"])
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="no metadata of bpkd-sdk"):
        to_tensorrt(tmp_path / "foreign.onnx", tmp_path / "m.engine")
    assert {file.suffix for file in tmp_path.iterdir()} == {".onnx"}


def test_named_gpus_select_tensorrt_for_rtx(compiler, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", compiler)
    path = small_file(tmp_path / "m.onnx", sides=(8, 8))
    report = to_tensorrt(path, tmp_path / "m.engine", hardware=["sm86", "sm89"])
    assert (report.manifest.backend, report.manifest.targets) == ("tensorrt_rtx", ("sm86", "sm89"))
    claim_gpu(monkeypatch, (8, 6))
    for hardware in ("sm86", ["sm86", "sm89"]):
        with pytest.raises(ValueError, match="`hardware` is one of none, .*but got sm86.*backend='tensorrt_rtx'"):
            to_tensorrt(path, tmp_path / "m.engine", hardware=hardware, backend="tensorrt")


@pytest.mark.filterwarnings("ignore:.*Timing cache:DeprecationWarning")
def test_tensorrt_follows_the_same_steps(compiler, tmp_path, monkeypatch):
    """The bindings of TensorRT for RTX, which equal TensorRT's, replace them, and a GPU is claimed."""
    path = small_file(tmp_path / "m.onnx", sides=(8, 8))
    monkeypatch.setitem(sys.modules, "tensorrt", compiler)
    with pytest.raises(RuntimeError, match="builds on the GPU that will run.*backend='tensorrt_rtx'"):
        to_tensorrt(path, tmp_path / "m.engine", backend="tensorrt")
    claim_gpu(monkeypatch, (8, 6))
    monkeypatch.setattr(compilation.Compilation, "inspect", lambda *_: {"net/conv": "FLOAT"})
    cache = tmp_path / "timings"
    report = to_tensorrt(path, tmp_path / "m.engine", timing_cache=cache, hardware="ampere_plus")
    assert (report.manifest.backend, report.manifest.targets) == ("tensorrt", ("sm80+",))
    assert report.manifest.device["name"] == "a GPU"
    assert cache.stat().st_size > 0
    assert to_tensorrt(path, tmp_path / "m.engine", timing_cache=cache).manifest.targets == ("sm86",)
