"""The client of a real Triton server: the masks of the local file, from any thread, and errors with their reason."""

import http.server
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bpkd_sdk.data.shapes import PALETTE, render
from bpkd_sdk.export import to_triton
from bpkd_sdk.runtime import open_runtime
from bpkd_sdk.runtime.triton import TritonRuntime, UnreachableError
from bpkd_sdk.serve import Predictor
from tests.bands import band_scene
from tests.tritonserver import scenes


@pytest.fixture(scope="module")
def served(tiny_onnx, triton):
    for name, path in tiny_onnx.items():
        to_triton(path, triton.repository, name=f"runtime_{name}", backend="python", max_queue_delay_us=5000)
        triton.load(f"runtime_{name}")
    return triton


@pytest.mark.parametrize("name", ["batch", "any", "bare"])
def test_a_url_segments_as_the_file_does(served, tiny_onnx, name):
    local, remote = open_runtime(tiny_onnx[name], "cpu"), open_runtime(served.url(f"runtime_{name}"))
    for count in (1,) if name == "bare" else (1, 3, 8):
        images = scenes(count)
        assert np.array_equal(remote(images), local(images))
    assert remote.spec == local.spec
    assert remote.spec.palette == PALETTE
    assert remote.metadata == local.metadata
    assert remote.device == "cpu"


def test_stages_and_logits(served, tiny_onnx):
    images = torch.from_numpy(scenes(1)).permute(0, 3, 1, 2)
    local, remote = open_runtime(tiny_onnx["bare"], "cpu"), open_runtime(served.url("runtime_bare"))
    torch.testing.assert_close(remote.logits(images), local.logits(images))
    assert torch.equal(remote.segment(images), local.segment(images))
    masks = open_runtime(served.url("runtime_batch")).segment(images)
    masks += 1  # the caller owns the result
    assert masks.dtype == torch.uint8


def test_images_of_four_channels_are_sent_as_float32(triton, bands):
    to_triton(bands.onnx, triton.repository, name="bands", backend="python")
    triton.load("bands")
    image = band_scene(200)[0].astype(np.float32)[None]
    remote = open_runtime(triton.url("bands"))
    assert np.array_equal(remote(image), open_runtime(bands.onnx, "cpu")(image))
    assert (remote.spec.in_channels, remote.spec.value_range) == (4, (0, 4095))


def test_one_runtime_in_sixteen_threads(served, tiny_onnx):
    images = scenes(64)
    remote = open_runtime(served.url("runtime_batch"))
    before = served.statistics("runtime_batch")["execution_count"]
    with ThreadPoolExecutor(16) as threads:
        masks = list(threads.map(lambda image: remote(image[None])[0], images))
    assert np.array_equal(masks, open_runtime(tiny_onnx["batch"], "cpu")(images))
    assert served.statistics("runtime_batch")["execution_count"] - before < 64


@pytest.mark.parametrize("name", ["batch", "any", "bare"])
def test_the_predictor_moves_to_a_server_without_change(served, tiny_onnx, name):
    local, remote = Predictor(tiny_onnx[name], "cpu"), Predictor(served.url(f"runtime_{name}"))
    images = [render(0, "val", index, size)[0] for index, size in enumerate([(64, 96), (100, 150), (48, 80)] * 4)]
    with ThreadPoolExecutor(12) as threads:
        predictions = list(threads.map(remote, images))
    for image, found in zip(images, predictions, strict=True):
        assert np.array_equal(found.mask, local(image).mask)
    for found, expected in zip(remote(images), local(images), strict=True):
        assert np.array_equal(found.mask, expected.mask)
        assert found.class_names == expected.class_names
    if name == "bare":
        confident = remote(images[0], confidence=True).confidence
        np.testing.assert_allclose(confident, local(images[0], confidence=True).confidence, atol=1e-5)


def test_images_that_the_model_does_not_accept_are_not_sent(served):
    fixed, single = (open_runtime(served.url(f"runtime_{name}")) for name in ("batch", "bare"))
    before = served.statistics("runtime_batch")["inference_stats"]["fail"]["count"]
    with pytest.raises(ValueError, match=r"runtime_batch takes images of 64 x 96 .*but got 48 x 80"):
        fixed(scenes(1, (48, 80)))
    with pytest.raises(ValueError, match="takes 1 to 8 image.*but got 9. Split the batch"):
        fixed(scenes(9))
    with pytest.raises(ValueError, match="takes 1 image.*dynamic_batch=True"):
        single(scenes(2))
    assert served.statistics("runtime_batch")["inference_stats"]["fail"]["count"] == before


def test_the_servers_own_error_is_passed_on_and_the_next_image_served(served, tiny_onnx):
    remote = open_runtime(served.url("runtime_any"))
    with pytest.raises(RuntimeError, match=r"runtime_any failed on images of shape \(1, 8, 80, 3\): ONNX Runtime fail"):
        remote.infer(torch.zeros(1, 8, 80, 3, dtype=torch.uint8))
    images = scenes(1, (48, 80))
    assert np.array_equal(remote(images), open_runtime(tiny_onnx["any"], "cpu")(images))


def test_models_that_do_not_exist(served, tiny_onnx):
    with pytest.raises(ValueError, match=r"has no model 'runtime_bach'; it has .*Did you mean 'runtime_batch'"):
        open_runtime(served.url("runtime_bach"))
    to_triton(tiny_onnx["batch"], served.repository, name="not_loaded")
    with pytest.raises(RuntimeError, match="cannot run 'not_loaded': not loaded"):
        open_runtime(served.url("not_loaded"))
    with pytest.raises(Exception, match="unable to find backend"):
        served.load("not_loaded")
    with pytest.raises(RuntimeError, match="cannot run 'not_loaded': UNAVAILABLE, .*unable to find backend library"):
        open_runtime(served.url("not_loaded"))


def test_a_model_of_another_program(served):
    folder = served.repository / "foreign" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text("class TritonPythonModel: pass")
    ends = 'input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }'
    (folder.parent / "config.pbtxt").write_text(f'name: "foreign" backend: "python" {ends}')
    served.load("foreign")
    with pytest.raises(ValueError, match="/foreign has no metadata of bpkd-sdk"):
        open_runtime(served.url("foreign"))


def test_a_port_without_a_server():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(UnreachableError, match=rf"server at http://127.0.0.1:{port}/v2 cannot be reached.*refused"):
        open_runtime(f"triton://127.0.0.1:{port}/m")
    with pytest.raises(UnreachableError, match="cannot be reached.*Check that it is running"):
        open_runtime("triton://no-such-host.invalid/m")


def test_a_server_that_does_not_respond():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(UnreachableError, match=r"did not answer within 0.2 s.*wait longer with `timeout`"):
            TritonRuntime(f"triton://127.0.0.1:{listener.getsockname()[1]}/m", timeout=0.2)


def test_another_service_on_the_port():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RuntimeError, match="is not Triton's HTTP service"):
            open_runtime(f"triton://127.0.0.1:{server.server_port}/m")
        server.shutdown()


@pytest.mark.parametrize("url", ["triton://", "triton://host", "triton:///m", "triton://h:x/m", "triton://h/m/1/infer"])
def test_urls_of_another_form(url):
    with pytest.raises(ValueError, match="Expected a URL like triton://host:8000/model, but got"):
        open_runtime(url)


def test_the_server_chooses_the_device(monkeypatch):
    with pytest.raises(ValueError, match="`device`.*'auto', 'cpu'.*'cuda'"):
        open_runtime("triton://host/m", "cuda")
    monkeypatch.setitem(sys.modules, "tritonclient.http", None)
    with pytest.raises(ImportError, match=r"bpkd-sdk\[triton\]"):
        open_runtime("triton://host/m")
