"""The public names of the package, and the cost of importing it."""

import json
import os
import subprocess
import sys

import pytest

import bpkd_sdk

PUBLIC = [
    "BPKDLoss", "CIRKDLoss", "CWDLoss", "CanonicalKDLoss", "Comparison", "DISTLoss", "EvaluationProtocol", "IFVDLoss",
    "Metrics", "NetworkSpec", "Prediction", "Predictor", "Profile", "SKDSLoss", "SegmentationDataset", "SegmentationOutput",
    "TrainingConfig", "TrainingResult", "as_dataset", "benchmark", "compare", "create_model", "distill", "evaluate", "list_models",
    "load_model", "open_dataset", "profile", "quantize", "reproduce", "save_model", "save_pretrained", "teach", "to_onnx",
    "to_tensorrt", "to_triton", "to_web", "train", "verify",
]  # fmt: skip


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_public_names():
    assert bpkd_sdk.__all__ == PUBLIC
    assert all(getattr(bpkd_sdk, name) is not None for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(bpkd_sdk))
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = bpkd_sdk.distil


@pytest.mark.parametrize("chosen", [None, "0"])
def test_the_telemetry_of_onnx_runtime_is_off_by_default(chosen, tmp_path):
    """ONNX Runtime's telemetry, which it disables in CI, starts with a file in the temporary folder."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"TMPDIR": str(tmp_path)} | ({"ORT_DISABLE_TELEMETRY": chosen} if chosen else {})
    code = "import os, bpkd_sdk, onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == (chosen or "1")
    if chosen is None:
        assert list(tmp_path.iterdir()) == []


def test_the_import_loads_no_optional_package_and_is_fast():
    code = """
import json, sys, time
import torch
start = time.perf_counter()
import bpkd_sdk
seconds = time.perf_counter() - start
loaded = [name for name in ("gradio", "onnx", "onnxruntime", "tensorrt", "timm", "torchvision") if name in sys.modules]
import bpkd_sdk.export.onnx, bpkd_sdk.export.benchmark.process, bpkd_sdk.serve.service.app
print(json.dumps([seconds, loaded, "torchvision" in sys.modules]))
"""
    seconds, loaded, torchvision_is_loaded = json.loads(in_a_new_process(code))
    assert loaded == []
    assert seconds < 0.5
    assert not torchvision_is_loaded  # its import takes longer than all others together


def test_training_needs_no_optional_package():
    code = """
import sys
for name in ("gradio", "onnx", "onnxruntime", "tensorrt", "matplotlib", "jinja2"):
    sys.modules[name] = None
sys.modules["jinja2"] = __import__("types").ModuleType("jinja2")  # torch itself may import it
import bpkd_sdk
bpkd_sdk.train, bpkd_sdk.distill, bpkd_sdk.evaluate, bpkd_sdk.create_model, bpkd_sdk.BPKDLoss
print("ok")
"""
    assert in_a_new_process(code).strip() == "ok"
