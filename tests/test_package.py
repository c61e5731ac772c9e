"""The public surface, and what importing it costs."""

import json
import subprocess
import sys

import pytest

import bpkd_sdk

PUBLIC = [
    "Comparison", "Metrics", "NetworkSpec", "Profile", "SegmentationDataset", "SegmentationOutput", "TrainingResult",
    "compare", "create_model", "distill", "evaluate", "list_models", "load_model", "open_dataset", "profile", "reproduce",
    "save_model", "train",
]  # fmt: skip


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_public_names():
    assert bpkd_sdk.__all__ == PUBLIC
    assert all(getattr(bpkd_sdk, name) is not None for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(bpkd_sdk))
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = bpkd_sdk.distil


def test_import_loads_no_optional_package_and_is_quick():
    code = """
import json, sys, time
import torch
start = time.perf_counter()
import bpkd_sdk
seconds = time.perf_counter() - start
loaded = [name for name in ("gradio", "onnx", "onnxruntime", "tensorrt", "timm", "torchvision") if name in sys.modules]
print(json.dumps([seconds, loaded]))
"""
    seconds, loaded = json.loads(in_a_new_process(code))
    assert loaded == []
    assert seconds < 0.5


def test_training_needs_no_optional_package():
    code = """
import sys
for name in ("gradio", "onnx", "onnxruntime", "tensorrt", "matplotlib", "jinja2"):
    sys.modules[name] = None
sys.modules["jinja2"] = __import__("types").ModuleType("jinja2")  # torch itself may want it
import bpkd_sdk
bpkd_sdk.train, bpkd_sdk.distill, bpkd_sdk.evaluate, bpkd_sdk.create_model
print("ok")
"""
    assert in_a_new_process(code).strip() == "ok"
