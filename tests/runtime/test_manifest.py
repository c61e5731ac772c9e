"""Manifests of engines, and the reasons why an engine cannot run on a machine."""

import dataclasses
import hashlib
import sys
from types import SimpleNamespace

import pytest
import torch

import bpkd_sdk
from bpkd_sdk.runtime.manifest import (
    EngineManifest,
    capability,
    check_engine,
    load_manifest,
    manifest_path,
    open_backend,
)

FACTS = {
    "network": bpkd_sdk.NetworkSpec(name=None, num_classes=4).to_dict(),
    "input_size": [32, 32],
    "dynamic_batch": True,
    "preprocess": False,
    "argmax": False,
    "precision": "fp32",
}


def claim_gpu(monkeypatch, *versions):
    """Claim GPUs of these compute capabilities; the first is torch's current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(versions))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: versions[device.index if device else 0]
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def engine(folder, **changes):
    """Write a plan of four bytes and its manifest."""
    path = folder / "m.engine"
    path.write_bytes(b"plan")
    facts = EngineManifest(
        backend="tensorrt",
        build="11.4.0.1",
        version_compatible=False,
        targets=("sm86",),
        device=None,
        inputs={"images": {"dtype": "FLOAT", "min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [1, 3, 8, 8]}},
        outputs={"logits": {"dtype": "FLOAT", "shape": [-1, 4, 8, 8]}},
        precision="fp16",
        layers={},
        inspected={},
        plan_bytes=4,
        plan_sha256=hashlib.sha256(b"plan").hexdigest(),
        onnx_sha256="",
        facts=FACTS,
    )
    manifest_path(path).write_text(dataclasses.replace(facts, **changes).to_json())
    return path


@pytest.fixture
def here(monkeypatch):
    """Claim TensorRT 11.4, no TensorRT for RTX, and a GPU of compute capability 8.6."""
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.1"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
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
        pytest.param(
            {"targets": ("sm89+",)}, r"for sm89\+.*the GPU here is sm86. Build it again on this", id="later GPU"
        ),
        pytest.param(
            {"backend": "tensorrt_rtx", "targets": ("sm89",)}, r"again with hardware=\['sm86'\]", id="other GPU, RTX"
        ),
        pytest.param(
            {"version_compatible": True},
            r"code for this machine's processor.*EngineRuntime\(path, trusted=True\)",
            id="host code",
        ),
        pytest.param({"backend": "tensorrt_rtx"}, r"needs the package.*bpkd-sdk\[tensorrt-rtx\]", id="package"),
    ],
)
def test_the_reason_why_an_engine_cannot_run_is_stated(here, tmp_path, changes, reason):
    with pytest.raises(RuntimeError, match=f"m.engine cannot run here:\n(.|\n)*{reason}"):
        check_engine(engine(tmp_path, **changes))


def test_the_named_gpu_is_checked(here, tmp_path):
    claim_gpu(here, (8, 6), (8, 9))
    path = engine(tmp_path)
    assert check_engine(path, device=torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="the GPU here is sm89"):
        check_engine(path, device=torch.device("cuda", 1))


def test_a_gpu_that_the_backend_does_not_support(here, tmp_path):
    known = SimpleNamespace(__members__={"SM86": 3})
    here.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7", ComputeCapability=known))
    path = engine(tmp_path, backend="tensorrt_rtx", build="1.7", targets=("sm80+",))
    assert check_engine(path)
    claim_gpu(here, (9, 0))
    with pytest.raises(RuntimeError, match="tensorrt_rtx 1.7 runs on no GPU of the kind here, sm90. Use the ONNX file"):
        check_engine(path)


def test_every_reason_is_stated(here, tmp_path):
    here.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="exactly that build(.|\n)*sees no NVIDIA GPU here. Use the ONNX file"):
        check_engine(engine(tmp_path, build="10.1"))


def test_engines_that_are_incomplete(here, tmp_path):
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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"backend": "os"}, "`backend` to be one of .*'tensorrt_rtx'.*but got 'os'", id="backend"),
        pytest.param({"facts": {"precision": "fp16"}}, "it lacks network, input_size", id="facts"),
        pytest.param({"facts": "fp16"}, "facts: Input should be a valid.*got 'fp16'", id="facts of another type"),
        pytest.param({"inputs": {}}, "its inputs are {}, not one tensor with dtype, min, opt, max", id="inputs"),
        pytest.param({"inputs": {"images": {"dtype": "FLOAT"}}}, "its inputs are", id="shapes"),
        pytest.param({"outputs": {"m": {"dtype": "UINT8", "shape": [8, "x", 8]}}}, "its outputs are", id="lengths"),
        pytest.param({"targets": ("any+",)}, r"its targets are \('any\+',\)", id="targets"),
        pytest.param(
            {"targets": 86}, r"targets: Input should be a valid tuple \(got 86\)", id="targets of another type"
        ),
        pytest.param({"build": 11}, r"build: Input should be a valid string \(got 11\)", id="build"),
    ],
)
def test_a_manifest_that_is_not_valid(tmp_path, changes, reason):
    with pytest.raises(ValueError, match=f"(?s)m.engine.json is not a manifest.*{reason}.*Copy it again"):
        load_manifest(engine(tmp_path, **changes))


def test_capability_of_this_machine(monkeypatch):
    claim_gpu(monkeypatch, (12, 0))
    assert capability() == "sm120"


def test_the_choice_of_the_compiler(monkeypatch):
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
