"""The precision of finished engines, as their inspector states it; the inspector is a stand-in."""

import json
import sys

import pytest

from bpkd_sdk.export import audit, to_tensorrt
from tests.export.test_tensorrt import small_file
from tests.runtime.test_manifest import claim_gpu

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
        {
            "Name": "cast + /image/Conv",
            "Metadata": "[ONNX Layer: cast]\x1e[ONNX Layer: /image/Conv]",
            "Inputs": [{"Format/Datatype": "Row major linear UINT8 format"}],
            "Outputs": [{"Format/Datatype": "Float"}],
        },
        {"Name": "/mask/Conv", "Inputs": [], "Outputs": [{"Format/Datatype": "UInt8"}]},
        {
            "Name": "/any/Conv",
            "Weights": {"Type": "Half", "Count": 9},
            "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}],
            "Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}],
        },
        {
            "Name": "/last/Conv",
            "Weights": {"Type": "Float"},
            "Inputs": [{"Format/Datatype": "Int8"}],
            "Outputs": [{"Format/Datatype": "Float"}],
        },
        "only a name",
    ]
}


def test_types_are_read_from_the_inspector():
    names = [f"/{name}/Conv" for name in ("a", "b", "c", "image", "mask", "any", "last", "none")]
    assert audit.engine_layers(json.dumps(INSPECTED), names) == {
        "/a/Conv": "HALF",
        "/b/Conv": "FLOAT",
        "/c/Conv": "INT8",
        "/image/Conv": "FLOAT",
        "/any/Conv": "HALF",
        "/last/Conv": "FLOAT",
    }


@pytest.mark.parametrize(
    ("precision", "parsed", "found", "problem"),
    [
        pytest.param("fp16", {"a": "HALF", "b": "HALF"}, {"a": "HALF"}, None, id="fp16"),
        pytest.param("fp16", {"a": "HALF", "b": "HALF"}, {"a": "HALF", "b": "FLOAT"}, "not fp16.*\n  b: FLOAT", id="wide"),
        pytest.param("fp32", {"a": "FLOAT", "b": "FLOAT"}, {"a": "FLOAT", "b": "INT8"}, "not fp32.*\n  b: INT8", id="fp32"),
        pytest.param("fp32", {"a": "FLOAT"}, {}, "names no FLOAT layer among 1", id="nothing"),
        pytest.param("int8", {"a": "FLOAT", "b": "INT8"}, {"a": "FLOAT", "b": "INT8"}, None, id="int8"),
        pytest.param("int8", {"a": "FLOAT", "b": "INT8"}, {"a": "INT8", "b": "INT8"}, None, id="int8 beside float"),
        pytest.param(
            "int8", {"a": "INT8", "b": "INT8"}, {"a": "INT8", "b": "FLOAT"}, "not int8.*\n  b: FLOAT", id="one of two"
        ),
        pytest.param("int8", {"a": "FLOAT", "b": "INT8"}, {"a": "FLOAT"}, "names no INT8 layer among 2", id="none int8"),
        pytest.param("int8", {"a": "FLOAT", "b": "INT8"}, {"a": "HALF", "b": "INT8"}, "a: HALF", id="half beside int8"),
    ],
)  # fmt: skip
def test_an_engine_must_have_the_types_of_its_precision(precision, parsed, found, problem):
    if problem is None:
        audit.check_engine_layers(found, parsed, precision)
    else:
        with pytest.raises(RuntimeError, match=problem):
            audit.check_engine_layers(found, parsed, precision)


class Inspected:
    """Stand-in for TensorRT's runtime, engine and inspector, which describes the convolution of `small_file` as `kernel`."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.engine_host_code_allowed = False

    def __call__(self, log):
        return self

    def deserialize_cuda_engine(self, plan):
        # TensorRT refuses a version-compatible plan unless host code is allowed.
        return self if self.engine_host_code_allowed and self.kernel is not None else None

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, layout):
        return json.dumps({"Layers": [{"Name": "net/conv", **self.kernel}]})


@pytest.fixture
def on_a_gpu(compiler, monkeypatch):
    """Claim a GPU and TensorRT; return a function that sets the inspector's description of the kernel."""
    claim_gpu(monkeypatch, (8, 6))
    monkeypatch.setitem(sys.modules, "tensorrt", compiler)
    return lambda kernel: monkeypatch.setattr(compiler, "Runtime", Inspected(kernel))


def test_an_engine_of_the_right_precision_is_written(on_a_gpu, tmp_path):
    on_a_gpu({"Weights": {"Type": "Float"}})
    path = small_file(tmp_path / "m.onnx", sides=(8, 8))
    for hardware in (None, "ampere_plus"):
        report = to_tensorrt(path, tmp_path / "m.engine", backend="tensorrt", hardware=hardware)
        assert report.manifest.inspected == {"FLOAT": 1}


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        pytest.param(None, "cannot load the engine that it has built for this GPU.*no engine was written", id="load"),
        pytest.param({}, "inspector names no FLOAT layer among 1 .*no engine was written", id="nothing stated"),
        pytest.param(
            {"Weights": {"Type": "Half"}}, "is not fp32 as the ONNX file states(.|\n)*net/conv: HALF", id="another type"
        ),
    ],
)
def test_an_engine_without_proof_of_its_precision_is_not_written(on_a_gpu, tmp_path, kernel, reason):
    on_a_gpu(kernel)
    path = small_file(tmp_path / "m.onnx", sides=(8, 8))
    with pytest.raises(RuntimeError, match=reason):
        to_tensorrt(path, tmp_path / "m.engine", backend="tensorrt")
    assert list(tmp_path.iterdir()) == [path]


def test_an_engine_for_other_gpus_is_not_loaded(on_a_gpu, tmp_path):
    on_a_gpu(None)
    path = small_file(tmp_path / "m.onnx", sides=(8, 8))
    assert to_tensorrt(path, tmp_path / "m.engine", hardware="sm89").manifest.inspected == {}
    with pytest.raises(RuntimeError, match="tensorrt_rtx .* cannot load the engine"):
        to_tensorrt(path, tmp_path / "m.engine", hardware="sm86")
