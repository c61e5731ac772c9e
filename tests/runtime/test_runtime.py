"""All formats give the same masks for the same images."""

import hashlib
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import bpkd_sdk
from bpkd_sdk.data.shapes import render
from bpkd_sdk.export import to_onnx
from bpkd_sdk.runtime import FORMATS, AcceptedImages, TorchRuntime, find_format, open_runtime
from bpkd_sdk.runtime.device import Device, choose_device
from bpkd_sdk.runtime.manifest import EngineManifest, manifest_path
from bpkd_sdk.runtime.onnx import OnnxRuntime

NETWORK = "smp/PSPNet/tu-test_resnet"
SIZE = (64, 96)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return bpkd_sdk.create_model(NETWORK, 9).eval()


@pytest.fixture(scope="module")
def files(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    bpkd_sdk.save_model(network, folder / "m.safetensors")
    to_onnx(network, folder / "m.onnx", input_size=SIZE)
    to_onnx(network, folder / "bare.onnx", input_size=SIZE, preprocess=False, argmax=False)
    to_onnx(network, folder / "one.onnx", input_size=SIZE, dynamic_batch=False)
    return folder


def scenes(count):
    return np.stack([render(0, "runtime", index, SIZE)[0] for index in range(count)])


@pytest.fixture(scope="module")
def expected(network):
    """Compute class ids in float64, step by step."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inputs = torch.from_numpy(((scenes(4) / 255 - mean) / std).transpose(0, 3, 1, 2))
    twin = bpkd_sdk.create_model(NETWORK, 9).double().eval()
    twin.load_state_dict(network.state_dict())
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(twin(inputs), SIZE, mode="bilinear", align_corners=False)
    return logits.numpy()


@pytest.mark.parametrize("name", ["m.safetensors", "m.onnx", "bare.onnx"])
def test_every_format_gives_the_same_masks(files, expected, name):
    runtime = open_runtime(files / name, "cpu")
    masks = runtime(scenes(4))
    assert (masks.dtype, masks.shape) == (np.uint8, (4, *SIZE))
    assert (masks == expected.argmax(1)).mean() > 0.9999
    stages = runtime.masks(runtime.infer(runtime.prepare(torch.from_numpy(scenes(4)))))
    np.testing.assert_array_equal(stages.numpy(), masks)
    turned = torch.from_numpy(scenes(4)).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(runtime.segment(turned).numpy(), masks)
    if name == "m.onnx":
        with pytest.raises(ValueError, match="returns masks, not logits; export the network with argmax=False"):
            runtime.logits(turned)
    else:
        np.testing.assert_allclose(runtime.logits(turned).numpy(), expected, atol=2e-5 * np.abs(expected).max())


def test_results_are_not_overwritten(files):
    """Outputs share memory with ONNX Runtime; a later call must not write into an earlier output."""
    runtime = open_runtime(files / "m.onnx", "cpu")
    first = runtime(scenes(1))
    kept = first.copy()
    others = [runtime(255 - scenes(1)) for _ in range(3)]
    assert any((other != kept).any() for other in others)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("name", ["m.safetensors", "m.onnx"])
def test_threads_do_not_disturb_each_other(files, name):
    runtime = open_runtime(files / name, "cpu")
    images = scenes(4)
    alone = [runtime(image[None]) for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda index: runtime(images[index % 4][None]), range(64)))
    for index, masks in enumerate(together):
        np.testing.assert_array_equal(masks, alone[index % 4])


def test_images_that_an_artifact_does_not_accept(files):
    fixed = open_runtime(files / "one.onnx", "cpu")
    assert fixed.accepts == AcceptedImages((1, 1), (64, 64), (96, 96))
    assert fixed.accepts.is_static
    assert not open_runtime(files / "m.onnx", "cpu").accepts.is_static
    with pytest.raises(
        ValueError, match="one.onnx takes 1 image.s. at a time, but got 2. Export with dynamic_batch=True"
    ):
        fixed(scenes(2))
    with pytest.raises(
        ValueError, match="takes images of 64 x 96 .height x width., but got 96 x 64. .*input_size=.96, 64"
    ):
        fixed(scenes(1).transpose(0, 2, 1, 3))
    engine = AcceptedImages((1, 8), (256, 512), (256, 1024))
    assert engine.takes_size(256, 1024)
    with pytest.raises(ValueError, match="m.engine takes images of 256 to 512 x 256 to 1024 .*, but got 64 x 96"):
        engine.check(torch.from_numpy(scenes(1)), "m.engine")
    with pytest.raises(ValueError, match="takes 1 to 8 image.s. at a time, but got 9. Split the batch"):
        engine.check(torch.zeros(9, 256, 256, 3, dtype=torch.uint8), "m.engine")


def test_a_module_stays_on_its_device(network):
    runtime = TorchRuntime(network.double())
    assert runtime.metadata["precision"] == "float64"
    assert runtime.device == "cpu"
    assert open_runtime(runtime) is runtime
    assert runtime(scenes(1)).shape == (1, *SIZE)
    network.float()


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("gpu", ValueError, "one of {'auto', 'cpu', 'cuda', 'mps'}, but got 'gpu'"),
        pytest.param(
            "cuda:7",
            RuntimeError,
            "torch sees [0-7] CUDA devices. Run `bpkd doctor`",
            marks=pytest.mark.skipif(torch.cuda.device_count() > 7, reason="this machine has that many GPUs"),
        ),
    ],
)
def test_devices_that_are_not_present(device, error, message):
    with pytest.raises(error, match=message):
        choose_device(device)


def test_a_gpu_without_an_index_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for device in ("auto", "cuda", torch.device("cuda")):
        assert choose_device(device) == "cuda:1"
    assert choose_device("cuda:0") == "cuda:0"


def test_auto_is_the_accelerator_where_the_runtime_supports_it(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert choose_device("auto") == "mps"
    assert choose_device("auto", ("cpu", "cuda")) == "cpu"
    with pytest.raises(ValueError, match="one of {'auto', 'cpu', 'cuda'}, but got 'mps'"):
        choose_device("mps", ("cpu", "cuda"))


def test_one_thread_does_not_wait_for_the_others(monkeypatch, network):
    """Only this thread's stream is waited for; a wait for the device breaks a CUDA graph that another thread records."""
    stream = Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", {"cuda:1": stream}.get)
    monkeypatch.setattr(torch.cuda, "synchronize", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    runtime = TorchRuntime(network, "cpu")
    runtime.synchronize()
    assert not stream.synchronize.called
    runtime.device = Device("cuda:1")
    runtime.synchronize()
    stream.synchronize.assert_called_once_with()


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="torch uses the GPU of this machine")
def test_a_torch_without_cuda_does_not_stop_a_session_of_onnxruntime_on_a_gpu(network):
    runtime = TorchRuntime(network, "cpu")
    runtime.device = Device("cuda:0")
    runtime.synchronize()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_reason_why_an_engine_cannot_run_is_stated(tmp_path, files):
    plan = b"plan"
    facts = OnnxRuntime(files / "m.onnx", "cpu").metadata
    described = {"dtype": "UINT8", "min": [1, 64, 96, 3], "opt": [1, 64, 96, 3], "max": [8, 64, 96, 3]}
    described_masks = {"dtype": "UINT8", "shape": [-1, 64, 96]}
    manifest = EngineManifest(
        "tensorrt_rtx", "0.1", False, ("sm86",), None, {"images": described}, {"masks": described_masks}, "fp32",
        {}, {}, 4, hashlib.sha256(plan).hexdigest(), "", facts,
    )  # fmt: skip
    (tmp_path / "m.engine").write_bytes(plan)
    manifest_path(tmp_path / "m.engine").write_text(manifest.to_json())
    with pytest.raises(RuntimeError, match="(?s)cannot run here.*built by tensorrt_rtx 0.1.*sees no NVIDIA GPU here"):
        open_runtime(tmp_path / "m.engine")
    (tmp_path / "m.engine").write_bytes(b"plum")
    with pytest.raises(ValueError, match="not the plan that its manifest describes"):
        open_runtime(tmp_path / "m.engine")


@pytest.mark.parametrize(
    ("source", "device", "supported"),
    [
        pytest.param("m.engine", "cpu", "TensorRT, which runs on cuda", id="engine"),
        pytest.param("m.onnx", "mps", "ONNX, which runs on cpu or cuda", id="ONNX"),
        pytest.param("m.safetensors", "gpu", "checkpoint, which runs on cpu or cuda or mps", id="no device"),
    ],
)
def test_devices_that_a_format_does_not_support(source, device, supported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(source).touch()
    with pytest.raises(ValueError, match=f"{source} is of the format {supported}, but got device='{device}'"):
        open_runtime(source, device)


def test_formats_are_found_by_name():
    for suffix, name in {
        "a/b.safetensors": "checkpoint",
        "b.int8.onnx": "ONNX",
        "b.pth": "OpenMMLab",
        "b.plan": "TensorRT",
        "triton://host:8000/model": "Triton",
    }.items():
        assert find_format(suffix).name == name
    with pytest.raises(ValueError, match=r"ends in one of .safetensors, .*but got 'm.onx'.* Did you mean '.onnx'"):
        find_format("m.onx")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {extra for row in FORMATS for extra in row.extras} <= project["optional-dependencies"].keys()
    assert len({suffix for row in FORMATS for suffix in row.suffixes}) == sum(len(row.suffixes) for row in FORMATS)
