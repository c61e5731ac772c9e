"""Triton Inference Server from the PyPI package nvidia-pytriton, and small models for its tests."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import bpkd_sdk
from bpkd_sdk.data.shapes import CLASS_NAMES, PALETTE, render
from bpkd_sdk.export import to_onnx
from tests.conftest import missing
from tests.networks import tiny

TIMEOUT = 60  # seconds for the server to start, and to stop
SIZE = (64, 96)


@dataclass(frozen=True)
class TritonServer:
    """Port of a running server, and its model repository.

    The server reads the repository only when `load` is called.
    """

    repository: Path
    http_port: int

    def client(self):
        import tritonclient.http as http

        return http.InferenceServerClient(f"127.0.0.1:{self.http_port}", connection_timeout=60, network_timeout=60)

    def load(self, name: str) -> None:
        with self.client() as client:
            client.load_model(name)

    def url(self, name: str) -> str:
        return f"triton://127.0.0.1:{self.http_port}/{name}"

    def statistics(self, name: str) -> dict:
        with self.client() as client:
            return client.get_inference_statistics(name)["model_stats"][0]


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[TritonServer]:
    """Start a server with an empty model repository in `folder`, wait until it is ready, and stop it at the end."""
    program, environment = find_server()
    server = TritonServer(folder / "repository", _free_port())
    server.repository.mkdir()
    command = [
        program,
        f"--model-repository={server.repository}",
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",
        f"--backend-directory={_copy_backends(program.parents[1], folder / 'backends')}",
        "--http-address=127.0.0.1",
        f"--http-port={server.http_port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--exit-timeout-secs=10",
    ]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, server, folder / "server.log")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def find_server() -> tuple[Path, dict[str, str]]:
    """Return the server program and its environment. Without nvidia-pytriton the test is skipped; in CI it fails."""
    package = importlib.util.find_spec("pytriton")
    if package is None:
        # --no-deps, because the wheel requires numpy 1 for code that the tests do not use.
        missing("no Triton server: pip install --no-deps --constraint constraints.txt nvidia-pytriton")
    root = Path(package.origin).parent
    first = {
        "LD_LIBRARY_PATH": [root.parent / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")],
        # The embedded Python of the server uses the environment of the first `python3` on the PATH.
        "PATH": [Path(sys.executable).parent, os.environ["PATH"]],
    }
    changes = {name: os.pathsep.join(map(str, paths)) for name, paths in first.items()}
    return root / "tritonserver" / "bin" / "tritonserver", os.environ | changes


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _copy_backends(root: Path, target: Path) -> Path:
    """Copy the python backend to `target`, with the stub program for this version of Python, and return the folder."""
    shutil.copytree(root / "backends", target)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = shutil.copy(root / "python_backend_stubs" / version / "triton_python_backend_stub", target / "python")
    Path(stub).chmod(0o755)
    return target


def _wait_until_ready(process: subprocess.Popen, server: TritonServer, log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), server.client() as client:
            if client.is_server_ready():
                return
        time.sleep(0.1)
    pytest.fail(f"The Triton server did not start:\n{log.read_text()}")


def export_tiny(folder: Path) -> dict[str, Path]:
    """Export networks as ONNX: dynamic batch; any size from 9 x 9; no batch axis, pre- or post-processing."""
    unpadded = nn.Sequential(nn.Conv2d(3, 16, 9), nn.ReLU(), nn.Conv2d(16, 9, 1))
    bare = {"dynamic_batch": False, "preprocess": False, "argmax": False}
    return {
        "batch": export(tiny(9, width=16), folder / "batch.onnx"),
        "any": export(unpadded, folder / "any.onnx", dynamic_size=True),
        "bare": export(tiny(9, width=16), folder / "bare.onnx", **bare),
    }


def export(network: nn.Module, path: Path, **options: bool) -> Path:
    facts = {"class_names": CLASS_NAMES, "palette": PALETTE, "mean": (0.4, 0.5, 0.6)}
    network.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=9, **facts)
    return to_onnx(network.eval(), path, input_size=SIZE, **options).path


def scenes(count: int, size: tuple[int, int] = SIZE, split: str = "val") -> np.ndarray:
    """Return generated images, uint8 (count, H, W, 3)."""
    return np.stack([render(0, split, index, size)[0] for index in range(count)])
