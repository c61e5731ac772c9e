"""The facts about GPUs are those that nvidia-smi states, or torch if nvidia-smi states nothing."""

import pytest
import torch

from bpkd_sdk.doctor import driver_version, query_gpus
from bpkd_sdk.export.benchmark.environment import list_gpus

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
def test_torch_names_the_gpus_if_nvidia_smi_does_not(nvidia_smi, monkeypatch, script):
    if script is not None:
        nvidia_smi(script)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", "GPU {}".format)
    assert driver_version() == "unknown"
    assert list_gpus() == [{"name": "GPU 0"}, {"name": "GPU 1"}]
