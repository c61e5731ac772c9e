"""Command `bpkd serve`, in a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

import bpkd_sdk
from tests.serve.cases import encoded, wait_until

TOKEN = "a long secret"  # noqa: S105


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    bpkd_sdk.save_model(bpkd_sdk.create_model("smp/Linknet/tu-test_resnet", 4), path)
    return path


def test_bpkd_serve_serves_until_sigterm(checkpoint, tmp_path):
    (tmp_path / "none.engine").touch()
    command = [
        sys.executable, "-m", "bpkd_sdk.cli", "serve", checkpoint, "--student", tmp_path / "none.engine",
        "--teacher", checkpoint, "--no-demo", "--port", "0", "--device", "cpu", "--max-megapixels", "1",
    ]  # fmt: skip
    environment = os.environ | {"BPKD_TOKEN": TOKEN, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        summary = ""
        while "Stop with" not in summary:
            line = server.stdout.readline()
            assert line, server.stderr.read()
            summary += line
        url = re.search(r"http://127.0.0.1:\d+", summary)[0]
        assert "requires a token or a password" in summary
        assert "not served" in summary
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client, ThreadPoolExecutor(6) as pool:
            wait_until(lambda: client.get("/readyz").status_code == 200)
            assert len(client.get("/v1/models").json()) == 2
            assert client.get("/").headers["location"] == "/docs"
            assert client.post("/v1/segment", content=encoded(np.zeros((1001, 1000), np.uint8))).status_code == 413
            noise = encoded(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8))
            responses = [pool.submit(client.post, "/v1/segment", content=noise) for _ in range(6)]
            wait_until(lambda: "bpkd_accepted_requests 6.0" in client.get("/metrics").text)
            server.send_signal(signal.SIGTERM)
            assert [response.result().status_code for response in responses] == [200] * 6
        out, errors = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    assert "Stopped." in out
    assert re.search("none.engine is not served: .*none.engine is of the format TensorRT, which runs on cuda", errors)
    assert "There is no NVIDIA GPU" in errors
    assert "Traceback" not in errors
    assert TOKEN not in summary + out + errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "A server on 0.0.0.0 can be reached from other machines, but no credentials are set"),
        (["--token", ""], "The token is empty, which would accept every request"),
        (["--user", "ann"], "Expected a user and a password, but got only one of them"),
        (["--host", "203.0.113.1", "--insecure"], "Cannot listen on 203.0.113.1, port 7860"),
        (["--port", "{taken}"], "Choose another --port; 0 takes any that is free"),
        (["--port", "0"], "Expected at least one network, but none could be opened"),
    ],
    ids=["address", "token", "user", "address of another", "port", "network"],
)
def test_bpkd_serve_refuses(bpkd, tmp_path, options, message):
    (tmp_path / "none.onnx").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = [option.format(taken=taken.getsockname()[1]) for option in options]
        code, _, err = bpkd("serve", tmp_path / "none.onnx", *options)
    assert code == 1
    assert message in err
