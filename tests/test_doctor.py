"""What is said of the GPUs is what nvidia-smi says, if it says anything."""

import pytest
import torch

from bpkd_sdk.doctor import driver_version, query_gpus
from bpkd_sdk.export.benchmark.facts import gpus

ANSWER = "echo 'a GPU, 595.10'; echo 'another GPU, 595.10'"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a script in nvidia-smi's place."""

    def write(script):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return write


def test_every_gpu_is_asked_for_every_field(nvidia_smi):
    nvidia_smi(ANSWER)
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
        pytest.param("exit 0", id="says nothing"),
    ],
)
def test_without_an_answer_torch_tells_the_gpus(nvidia_smi, monkeypatch, script):
    if script is not None:
        nvidia_smi(script)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", "GPU {}".format)
    assert driver_version() == "unknown"
    assert gpus() == [{"name": "GPU 0"}, {"name": "GPU 1"}]
