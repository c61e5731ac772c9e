"""ONNX files run without torch, with the results that they have with torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import bpkd_sdk
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.runtime import device, open_runtime
from bpkd_sdk.runtime.device import Device
from bpkd_sdk.runtime.fit import fitted_bands
from bpkd_sdk.runtime.onnx import CudaGraphSession
from tests.networks import tiny
from tests.tritonserver import scenes

BLOCK_TORCH = """
import importlib.abc, json, sys, warnings
import numpy as np

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*runs on 9 windows")
"""


def without_torch(code, *arguments):
    process = subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH + code, *map(str, arguments)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


PREDICT = """
from bpkd_sdk.runtime import open_runtime
from bpkd_sdk.serve import Predictor

images, files, results = np.load(sys.argv[1]), json.loads(sys.argv[2]), {}
for name, source in files.items():
    results[f"{name} runtime"] = open_runtime(source)(images["whole"][:1])
    for fit in ("slide", "resize", "pad"):
        predictor = Predictor(source, fit=fit)
        for key in ("whole", "large"):
            results[f"{name} {fit} {key}"] = np.stack([found.mask for found in predictor(images[key])])
    results[f"{name} stream"] = np.stack([found.mask for found in predictor(iter(list(images["whole"])))])
    found = predictor(images["large"][0], **dict.fromkeys(["confidence", "entropy"], name == "bare"))
    assert found.mask.flags.writeable and found.timings.total > 0
results["confidence"], results["entropy"] = found.confidence, found.entropy
assert "torch" not in sys.modules
np.savez(sys.argv[3], **results)
print(json.dumps(str(predictor.runtime.device)))
"""


def test_an_exported_file_has_the_same_results_as_with_torch(tiny_onnx, tmp_path):
    images = {"whole": scenes(2), "large": scenes(1, (80, 110))}
    np.savez(tmp_path / "images.npz", **images)
    files = json.dumps({name: str(path) for name, path in tiny_onnx.items()})
    used = without_torch(PREDICT, tmp_path / "images.npz", files, tmp_path / "results.npz")
    assert used in ("cpu", "cuda:0")
    results = np.load(tmp_path / "results.npz")
    assert len(results.files) == 3 * 8 + 2
    tensors = {key: torch.from_numpy(value).permute(0, 3, 1, 2) for key, value in images.items()}
    for name, path in tiny_onnx.items():
        runtime = open_runtime(path, "cpu")
        assert agreement(results[f"{name} runtime"], runtime.segment(tensors["whole"][:1])) > 0.999
        assert agreement(results[f"{name} stream"], results[f"{name} pad whole"]) == 1
        for fit in ("slide", "resize", "pad"):
            for key, pixels in tensors.items():
                expected = EvaluationProtocol(fit).segment(runtime, pixels)
                assert agreement(results[f"{name} {fit} {key}"], expected) > 0.998
    p = torch.cat(list(fitted_bands(runtime, tensors["large"], "pad")), dim=2).softmax(1)[0]
    np.testing.assert_allclose(results["confidence"], p.amax(0), atol=1e-3)
    np.testing.assert_allclose(results["entropy"], -(p * p.log()).sum(0) / np.log(9), atol=1e-3)


def agreement(found, expected):
    return (found == np.asarray(expected)).mean()


def test_what_needs_torch_states_the_extra(tmp_path):
    bpkd_sdk.save_model(tiny(5), tmp_path / "m.safetensors")
    (tmp_path / "m.engine").touch()
    code = """
from bpkd_sdk.runtime import open_runtime
from bpkd_sdk.runtime.device import choose_device
messages = []
for source in (sys.argv[1], "torchvision/deeplabv3_resnet50", sys.argv[1].replace("safetensors", "engine"), print):
    try:
        open_runtime(source)
    except ImportError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""
    messages = without_torch(code, tmp_path / "m.safetensors")
    assert len(messages) == 4
    assert all("needs the package 'torch'" in message for message in messages)
    extras = ["train", "train", "tensorrt", "train"]
    assert [f"pip install 'bpkd-sdk[{extra}]'" in message for extra, message in zip(extras, messages, strict=True)] == [
        True
    ] * 4


def test_the_device_of_an_onnx_file(monkeypatch):
    import onnxruntime

    monkeypatch.setattr(device, "gpu_names", lambda: ["a GPU", "another GPU"])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    names = ("auto", "cpu", "cuda", "cuda:1", torch.device("cuda", 1))
    assert [device.choose_onnx_device(name) for name in names] == ["cuda:0", "cpu", "cuda:0", "cuda:1", "cuda:1"]
    with pytest.raises(RuntimeError, match="device='cuda:2' to be present, but the NVIDIA driver sees 2 GPUs"):
        device.choose_onnx_device("cuda:2")
    with pytest.raises(ValueError, match="one of {'auto', 'cpu', 'cuda'}, but got 'mps'"):
        device.choose_onnx_device("mps")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert device.choose_onnx_device() == "cpu"


def test_a_device_is_a_name_that_torch_accepts():
    gpu = Device("cuda:1")
    assert (gpu.type, gpu.index, str(gpu)) == ("cuda", 1, "cuda:1")
    assert torch.device(gpu) == torch.device("cuda", 1)
    assert (Device("cpu").type, Device("cpu").index) == ("cpu", None)
    assert torch.zeros(1, device=Device("cpu")).device.type == "cpu"


def test_the_buffers_of_a_cuda_graph_take_one_image_after_the_other(tiny_onnx):
    """On a CPU the session captures no graph, but has the same buffers, whose results are then not copied."""
    runtime = open_runtime(tiny_onnx["bare"], "cpu")
    replay = CudaGraphSession(runtime.session, Device("cpu"))
    for image in scenes(3):
        inputs = runtime.prepare(image[None])
        np.testing.assert_array_equal(replay(inputs), runtime.infer(inputs))
