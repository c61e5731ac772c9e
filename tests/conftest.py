import os
import sys
from pathlib import Path

import pytest

from bpkd_sdk import cli

ROOT = Path(__file__).parents[1]

os.environ["COLUMNS"] = "200"  # what is printed wraps the same everywhere, whatever the paths' lengths


def missing(what: str) -> None:
    """Skip where something is not installed; in CI, which installs everything, fail instead."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


def _shared(variable: str, *below: str) -> Path:
    path = Path(os.environ[variable]) if variable in os.environ else ROOT.parent.joinpath("shared", *below)
    if not path.is_dir():
        pytest.skip(f"no folder {path}: set {variable} to where it lies")
    return path


@pytest.fixture(scope="session")
def reference() -> Path:
    """Fixtures made with the original authors' code."""
    return _shared("BPKD_REFERENCE", "reference")


@pytest.fixture(scope="session")
def camvid() -> Path:
    """CamVid, 480x360, 11 classes."""
    return _shared("BPKD_CAMVID", "data", "camvid")


@pytest.fixture
def bpkd(capfd, monkeypatch):
    """The command, as a user types it: from arguments to exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bpkd", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capfd.readouterr()

    return run


@pytest.fixture(scope="session")
def triton(tmp_path_factory):
    """A Triton server with an empty model repository."""
    from tests.tritonserver import serving

    with serving(tmp_path_factory.mktemp("triton")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory):
    """The ONNX files "batch", "any" and "bare" of `export_tiny`."""
    from tests.tritonserver import export_tiny

    return export_tiny(tmp_path_factory.mktemp("onnx"))
