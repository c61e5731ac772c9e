"""The facts about GPUs are those that nvidia-smi states, or the driver if nvidia-smi states nothing."""

import pytest

from bpkd_sdk import doctor
from bpkd_sdk.doctor import driver_version, examine, query_gpus
from bpkd_sdk.export.benchmark import environment

OUTPUT = "echo 'a GPU, 595.10'; echo 'another GPU, 595.10'"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Replace nvidia-smi by a script."""

    def write(script):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return write


def test_every_gpu_has_every_field(nvidia_smi):
    nvidia_smi(OUTPUT)
    assert query_gpus("name", "driver_version") == [("a GPU", "595.10"), ("another GPU", "595.10")]
    nvidia_smi('[ "$1" = --query-gpu=driver_version ] && echo 595.10')
    assert driver_version() == "595.10"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(None, id="missing"),
        pytest.param(
            "echo 'NVIDIA-SMI has failed because it could not communicate with the driver.'; exit 9", id="fails"
        ),
        pytest.param("exit 0", id="prints nothing"),
    ],
)
def test_the_driver_names_the_gpus_if_nvidia_smi_does_not(nvidia_smi, monkeypatch, script):
    if script is not None:
        nvidia_smi(script)
    monkeypatch.setattr(environment, "gpu_names", lambda: ["a GPU", "another GPU"])
    assert driver_version() == "unknown"
    assert environment.list_gpus() == [{"name": "a GPU"}, {"name": "another GPU"}]


@pytest.mark.parametrize("providers", [["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]])
@pytest.mark.parametrize("gpus", [[], ["a GPU"]])
def test_a_gpu_that_onnx_runtime_cannot_use_has_advice(nvidia_smi, monkeypatch, providers, gpus):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(doctor, "gpu_names", lambda: gpus)
    (finding,) = (finding for finding in examine() if finding.part == "ONNX Runtime")
    is_unused = len(providers) == 1 and gpus
    assert ("pip install onnxruntime-gpu" in finding.advice) == bool(is_unused)


def test_the_gpus_of_the_driver_are_found_without_torch(nvidia_smi):
    nvidia_smi(OUTPUT)
    findings = {finding.part: finding for finding in examine()}
    assert findings["NVIDIA GPU"].found == "a GPU, another GPU; driver 595.10"
