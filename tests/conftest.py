"""Fixtures of all tests."""

import os
import sys
from functools import cache
from pathlib import Path

import pytest

from bpkd_sdk import cli

ROOT = Path(__file__).parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"  # a download in a test fails at once instead of after many attempts
os.environ["COLUMNS"] = "200"  # wraps printed tables in the same way on all machines


def missing(what: str) -> None:
    """Skip a test if something is not installed; fail in CI, where everything is installed."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


def _shared(variable: str, *below: str) -> Path:
    path = Path(os.environ[variable]) if variable in os.environ else ROOT.parent.joinpath("shared", *below)
    if not path.is_dir():
        pytest.skip(f"no folder {path}: set {variable} to its path")
    return path


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of files that were computed with the code of the original authors."""
    return _shared("BPKD_REFERENCE", "reference")


@pytest.fixture(scope="session")
def camvid() -> Path:
    """Folder of CamVid, 480x360, 11 classes."""
    return _shared("BPKD_CAMVID", "data", "camvid")


@pytest.fixture(autouse=True)
def _operators_parsed_once():
    """After the first export, keep the table of ONNX operators, which torch otherwise makes in each export."""
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(module, "ONNXRegistry", None)  # private: a version of torch without it is only slower
    if registry is not None and not hasattr(registry.from_torchlib, "cache_info"):
        registry.from_torchlib = staticmethod(cache(registry.from_torchlib))


@pytest.fixture
def bpkd(capfd, monkeypatch):
    """Function that runs the command `bpkd` and returns its exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bpkd", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def shallow():
    """The zoo's networks with fewer blocks, for tests in which the depth is not the point."""
    from tests.networks import shallow_zoo

    with shallow_zoo():
        yield


@pytest.fixture(scope="session")
def triton(tmp_path_factory):
    """Triton server with an empty model repository."""
    from tests.tritonserver import serving

    with serving(tmp_path_factory.mktemp("triton")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory):
    """ONNX files "batch", "any" and "bare" of `export_tiny`."""
    from tests.tritonserver import export_tiny

    return export_tiny(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def bands(tmp_path_factory):
    """Folder of scenes with four channels of 12 bits, a student trained on it, and its exported file."""
    from tests.bands import train_on_bands

    return train_on_bands(tmp_path_factory.mktemp("bands"))
