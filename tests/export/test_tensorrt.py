"""Engines: compiled for real by TensorRT for RTX, which needs no GPU; audited, described, checked before use."""

import dataclasses
import hashlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import audit, compilation, qdq, to_onnx
from bpkd_sdk.export.quantize import quantize
from bpkd_sdk.export.tensorrt import to_tensorrt
from bpkd_sdk.runtime.backend import capability, open_backend
from bpkd_sdk.runtime.manifest import EngineManifest, check_engine, load_manifest, manifest_path
from tests.networks import tiny

SIZE = (64, 96)


@pytest.fixture(scope="session")
def compiler():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is made for Linux on x86-64 only")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny network as ONNX, in each precision."""
    folder = tmp_path_factory.mktemp("onnx")
    network = tiny(9, width=16).eval()
    network.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=9, class_names=ShapesDataset().class_names)
    paths = {precision: folder / f"{precision}.onnx" for precision in ("fp32", "fp16", "int8")}
    for precision in ("fp32", "fp16"):
        to_onnx(network, paths[precision], input_size=SIZE, precision=precision)
    data = ShapesDataset("val", length=4, size=SIZE)
    quantize(paths["fp32"], paths["int8"], data, max_boundary_loss=1.0)
    return paths


def small_file(path, *, precision="fp32", sides=("height", "width"), batch="batch", operator="Relu"):
    """An ONNX file with metadata of ours: one convolution and one other operator."""
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
    helper.set_model_props(proto, {"bpkd": json.dumps({"precision": precision, "preprocess": False})})
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_of_each_precision(compiler, files, tmp_path, precision):
    report = to_tensorrt(files[precision], tmp_path / "m.engine", hardware="sm86", workspace_mb=256)
    expected = {"fp32": {"FLOAT": 3}, "fp16": {"HALF": 3}, "int8": {"FLOAT": 2, "INT8": 1}}[precision]
    assert report.manifest.layers == {"CONVOLUTION": expected}
    assert report.manifest.precision == precision
    assert report.size == report.path.stat().st_size > 1000
    assert sorted(tmp_path.iterdir()) == [report.path, manifest_path(report.path)]


def test_the_manifest_says_what_the_engine_is(compiler, files, tmp_path):
    path = to_tensorrt(files["fp16"], tmp_path / "m.plan", batch=(1, 2, 4), hardware=["sm86", "sm89"]).path
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
    assert found.facts["agreement"] > 0.99


def all_int8(source, path):
    """Every layer of a float32 file in int8, without measuring what that does."""
    proto = onnx.load(source)
    layers = qdq.find_layers(proto)
    tensors = qdq.measured_ranges(layers)
    facts = json.loads(proto.metadata_props[0].value)
    images = np.random.default_rng(0).integers(0, 256, (1, *facts["input_size"], 3), np.uint8)
    session = onnxruntime.InferenceSession(qdq.with_ranges(proto, tensors).SerializeToString())
    ranges = dict(zip(tensors, map(float, session.run(None, {"images": images})), strict=True))
    result = qdq.quantized(proto, layers, ranges)
    facts |= {"precision": "int8", "quantization": {"quantized": len(layers)}}
    result.metadata_props[0].value = json.dumps(facts)
    onnx.save(result, path)
    return len(layers)


@pytest.mark.parametrize(
    "name", ["pspnet_r18", "hrnetv2p_w18s", "deeplabv3plus_mv2", "isanet_r18", "smp/FPN/tu-mobilenetv3_small_050"]
)
def test_networks_compile_in_every_precision(compiler, tmp_path, name):
    torch.manual_seed(0)
    network = bpkd_sdk.create_model(name, 19).eval()
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    files = {precision: tmp_path / f"{precision}.onnx" for precision in ("fp32", "fp16", "int8")}
    to_onnx(network, files["fp32"], input_size=(96, 128), dynamic_batch=False)
    to_onnx(network, files["fp16"], input_size=(96, 128), precision="fp16")
    quantized = all_int8(files["fp32"], files["int8"])
    for precision, type_ in (("fp32", "FLOAT"), ("fp16", "HALF"), ("int8", "INT8")):
        found = to_tensorrt(files[precision], tmp_path / f"{precision}.engine", hardware="sm89").manifest
        assert found.layers["CONVOLUTION"] == {type_: convolutions}
        assert found.inputs["images"]["max"][0] == (8 if precision == "fp16" else 1)
    assert quantized >= convolutions


def test_a_range_of_sizes(compiler, tmp_path):
    path = small_file(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="images of any size, but an engine needs a range: pass `size`"):
        to_tensorrt(path, tmp_path / "m.engine")
    sizes = ((32, 64), (64, 128), (128, 256))
    report = to_tensorrt(path, tmp_path / "m.engine", size=sizes, batch=(2, 2, 2))
    assert report.manifest.inputs["images"]["max"] == [2, 3, 128, 256]
    assert report.manifest.targets == ("sm80+",)
    with pytest.raises(ValueError, match=r"height of 1 <= least <= best <= largest, but got \(64, 32, 128\)"):
        to_tensorrt(path, tmp_path / "m.engine", size=(sizes[1], sizes[0], sizes[2]))
    fixed = small_file(tmp_path / "fixed.onnx", sides=(32, 32), batch=1)
    with pytest.raises(ValueError, match=r"takes a batch of 1 only, but got \(1, 2, 4\)"):
        to_tensorrt(fixed, tmp_path / "m.engine", batch=(1, 2, 4))


def test_a_file_that_is_not_what_it_says_is_refused(compiler, files, tmp_path):
    for precision, found in (("fp16", "3 FLOAT"), ("int8", "3 FLOAT")):
        proto = onnx.load(files["fp32"])
        facts = json.loads(proto.metadata_props[0].value)
        facts |= {"precision": precision, "quantization": {"quantized": 2}}
        proto.metadata_props[0].value = json.dumps(facts)
        onnx.save(proto, tmp_path / "m.onnx")
        with pytest.raises(RuntimeError, match=f"says that it is {precision}.*but they are {found}. No engine was"):
            to_tensorrt(tmp_path / "m.onnx", tmp_path / "m.engine")
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]


def test_parser_errors_name_the_node(compiler, tmp_path):
    path = small_file(tmp_path / "m.onnx", operator="Det", sides=(4, 4))
    with pytest.raises(RuntimeError, match=r"node 1 'net/last' \(Det\): .*UNSUPPORTED_NODE.*checkDet"):
        to_tensorrt(path, tmp_path / "m.engine")
    assert list(tmp_path.iterdir()) == [path]


def test_compiler_errors_come_back(compiler, tmp_path, monkeypatch):
    path = small_file(tmp_path / "m.onnx", sides=(8, 8))
    monkeypatch.setattr(compilation.Compilation, "_aim_rtx", aim_at_this_machine)
    with pytest.raises(RuntimeError, match="could not compile.*m.onnx:\n.*CUDA driver"):
        to_tensorrt(path, tmp_path / "m.engine")
    assert list(tmp_path.iterdir()) == [path]


def aim_at_this_machine(self, hardware):
    self.config.num_compute_capabilities = 1
    self.config.set_compute_capability(self.trt.ComputeCapability.CURRENT, 0)
    return ("sm80+",)


def test_a_manifest_that_cannot_be_written_leaves_nothing(compiler, tmp_path):
    path = small_file(tmp_path / "m.onnx", sides=(8, 8))
    manifest_path(tmp_path / "m.engine").mkdir()
    with pytest.raises(OSError, match="m.engine.json"):
        to_tensorrt(path, tmp_path / "m.engine")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.engine.json", "m.onnx"]


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
    (tmp_path / "cut.onnx").write_bytes(files["fp32"].read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable ONNX file"):
        to_tensorrt(tmp_path / "cut.onnx", tmp_path / "m.engine")
    proto = onnx.load(files["fp32"])
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="no metadata of bpkd-sdk"):
        to_tensorrt(tmp_path / "foreign.onnx", tmp_path / "m.engine")
    assert {file.suffix for file in tmp_path.iterdir()} == {".onnx"}


def test_which_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.1"))
    assert open_backend(None)[0] == "tensorrt"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    assert open_backend(None)[0] == "tensorrt_rtx"
    with pytest.raises(ImportError, match=r"'tensorrt'.*bpkd-sdk\[tensorrt\]"):
        open_backend("tensorrt")
    with pytest.raises(ValueError, match="`backend`.*'trt'"):
        open_backend("trt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ImportError, match=r"bpkd-sdk\[tensorrt\].*without a GPU: .*bpkd-sdk\[tensorrt-rtx\]"):
        open_backend(None)


@pytest.mark.filterwarnings("ignore:.*Timing cache:DeprecationWarning")
def test_tensorrt_proper_takes_the_same_path(compiler, files, tmp_path, monkeypatch):
    """The bindings of TensorRT for RTX stand in for TensorRT's, which they equal, and a GPU is claimed."""
    monkeypatch.setitem(sys.modules, "tensorrt", compiler)
    with pytest.raises(RuntimeError, match="builds on the GPU that will run.*backend='tensorrt_rtx'"):
        to_tensorrt(files["fp16"], tmp_path / "m.engine", backend="tensorrt")
    claim_gpu(monkeypatch, (8, 6))
    cache = tmp_path / "timings"
    report = to_tensorrt(files["fp16"], tmp_path / "m.engine", timing_cache=cache, hardware="ampere_plus")
    assert (report.manifest.backend, report.manifest.targets) == ("tensorrt", ("sm80+",))
    assert report.manifest.device["name"] == "a GPU"
    assert cache.stat().st_size > 0
    assert to_tensorrt(files["fp16"], tmp_path / "m.engine", timing_cache=cache).manifest.targets == ("sm86",)
    with pytest.raises(ValueError, match="`hardware`.*'ampere_plus'.*'sm86'"):
        to_tensorrt(files["fp16"], tmp_path / "m.engine", hardware="sm86")


def claim_gpu(monkeypatch, version):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


INSPECTED = {
    "Layers": [
        {
            "Name": "/a/Conv + /a/Relu",
            "LayerType": "CaskConvolution",
            "Metadata": "[ONNX Layer: /a/Conv]\x1e[ONNX Layer: /a/Relu]",
            "Inputs": [{"Name": "x", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
        },
        {"Name": "/b/Conv", "Inputs": [{"Format/Datatype": "Float"}], "Outputs": [{"Format/Datatype": "Float"}]},
        {"Name": "/c/Conv", "Inputs": [{"Format/Datatype": "Int8"}], "Outputs": [{"Format/Datatype": "Float"}]},
        "only a name",
    ]
}


def test_what_the_inspector_says_is_believed():
    names = ["/a/Conv", "/b/Conv", "/c/Conv", "/d/Conv"]
    found = audit.engine_layers(json.dumps(INSPECTED), names)
    assert found == {"/a/Conv": "HALF", "/b/Conv": "FLOAT", "/c/Conv": "INT8"}
    audit.check_engine_layers(found, "int8")
    with pytest.raises(RuntimeError, match="not fp16 as asked for.*\n.*/b/Conv: FLOAT"):
        audit.check_engine_layers(found, "fp16")
    with pytest.raises(RuntimeError, match="not int8 as asked for"):
        audit.check_engine_layers({"/a/Conv": "FLOAT"}, "int8")
    audit.check_engine_layers({}, "fp16")


def engine(folder, **changes):
    """A plan of four bytes and its manifest."""
    path = folder / "m.engine"
    path.write_bytes(b"plan")
    facts = EngineManifest(
        backend="tensorrt",
        build="11.4.0.1",
        version_compatible=False,
        targets=("sm86",),
        device=None,
        inputs={},
        outputs={},
        precision="fp16",
        layers={},
        inspected={},
        plan_bytes=4,
        plan_sha256=hashlib.sha256(b"plan").hexdigest(),
        onnx_sha256="",
        facts={},
    )
    manifest_path(path).write_text(dataclasses.replace(facts, **changes).to_json())
    return path


@pytest.fixture
def here(monkeypatch):
    """A machine with TensorRT 11.4 and a GPU of compute capability 8.6."""
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.1"))
    claim_gpu(monkeypatch, (8, 6))
    return monkeypatch


def test_an_engine_that_can_run_here(here, tmp_path):
    assert check_engine(engine(tmp_path)).targets == ("sm86",)
    assert check_engine(engine(tmp_path, targets=("sm80+",)))
    assert check_engine(engine(tmp_path, build="11.2.9.9", version_compatible=True), trusted=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"build": "11.3.0.9"}, "built by tensorrt 11.3.0.9.*exactly that build.*11.4.0.1 is", id="build"),
        pytest.param(
            {"build": "10.9.0.1", "version_compatible": True}, "a later one of version 10, but 11.4", id="major version"
        ),
        pytest.param({"build": "11.5.0.1", "version_compatible": True}, "11.5.0.1 and runs with", id="newer build"),
        pytest.param({"targets": ("sm75", "sm89")}, "for sm75, sm89 .*the GPU here is sm86", id="other GPU"),
        pytest.param({"targets": ("sm89+",)}, r"for sm89\+.*hardware=\['sm86'\]", id="later GPU"),
        pytest.param({"version_compatible": True}, "code for this machine's processor.*trusted=True", id="host code"),
        pytest.param({"backend": "tensorrt_none"}, "needs the package 'tensorrt_none'", id="package"),
    ],
)
def test_an_engine_that_cannot_run_here_says_why(here, tmp_path, changes, reason):
    with pytest.raises(RuntimeError, match=f"m.engine cannot run here:\n.*{reason}"):
        check_engine(engine(tmp_path, **changes))


def test_every_reason_is_given(here, tmp_path):
    here.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="exactly that build(.|\n)*sees no NVIDIA GPU here. Use the ONNX file"):
        check_engine(engine(tmp_path, build="10.1"))


def test_engines_that_are_not_whole(here, tmp_path):
    with pytest.raises(FileNotFoundError, match="no engine at"):
        load_manifest(tmp_path / "none.engine")
    path = engine(tmp_path)
    path.write_bytes(b"plam")
    with pytest.raises(ValueError, match="not the plan that its manifest describes.*cut short, altered or replaced"):
        check_engine(path)
    text = manifest_path(path).read_text()
    for wrong in (text[:50], "[]", text.replace("bpkd-engine/1", "bpkd-engine/9"), text.replace("targets", "goals")):
        manifest_path(path).write_text(wrong)
        with pytest.raises(ValueError, match="not a manifest that this version of bpkd-sdk can read"):
            load_manifest(path)
    manifest_path(path).unlink()
    with pytest.raises(ValueError, match=r"no manifest beside it \(m.engine.json\)"):
        check_engine(path)


def test_capability_of_this_machine(monkeypatch):
    claim_gpu(monkeypatch, (12, 0))
    assert capability() == "sm120"
