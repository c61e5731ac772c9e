import gc
import weakref

import numpy as np
import pytest
import torch

import bpkd_sdk
from bpkd_sdk.serve import Predictor, build_demo, create_app, networks
from bpkd_sdk.serve.networks import ServedModel, open_models
from tests.networks import tiny
from tests.serve.cases import SIZE, network, scene


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "student" / "last.safetensors"
    path.parent.mkdir()
    bpkd_sdk.save_model(bpkd_sdk.create_model("smp/Linknet/tu-test_resnet", 4), path)
    return path


def test_a_network_that_cannot_be_opened_does_not_stop_the_others(checkpoint, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    sources = [checkpoint, tmp_path / "missing.onnx", tmp_path / "broken.onnx", "student.pkl", str(checkpoint)]
    models = open_models(sources, device="cpu")
    assert [model.name for model in models.students] == [f"{checkpoint} (1)", f"{checkpoint} (2)"]
    assert [model.name for model in models.unavailable] == ["missing.onnx", "broken.onnx", "student.pkl"]
    for model, reason in zip(
        models.unavailable, ["no ONNX file", "not a readable ONNX file", "no file or folder"], strict=True
    ):
        assert reason in model.reason
        assert str(tmp_path) not in model.reason


def test_a_predictor_is_used_as_it_is(model):
    predictor = Predictor(model, "cpu")
    (student,) = open_models([predictor]).students
    assert student.predictor is predictor


def test_networks_that_are_not_opened_are_refused(checkpoint):
    for build in (build_demo, create_app):
        with pytest.raises(TypeError, match=r"result of bpkd_sdk.serve.open_models.*but got list"):
            build([checkpoint])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.onnx", "b/y.onnx"], ["x.onnx", "y.onnx"]),
        (["runs/teacher/last.safetensors", "runs/student/best.safetensors"], ["teacher", "student"]),
        (["last.safetensors"], ["last.safetensors"]),
        (["a/x.onnx", "b/x.onnx"], ["a/x.onnx", "b/x.onnx"]),
        (["x.onnx", "x.onnx"], ["x.onnx (1)", "x.onnx (2)"]),
        (["triton://host:8001/street"], ["street"]),
    ],
    ids=["files", "runs", "no folder", "same names", "same path twice", "server"],
)
def test_names_are_unique(paths, names):
    models = open_models(paths, device="cpu")
    assert [model.name for model in models.unavailable] == names


def test_cost_is_counted_without_running_the_network(checkpoint):
    (network,) = open_models([checkpoint], device="cpu").students
    expected = bpkd_sdk.profile(bpkd_sdk.load_model(checkpoint), (96, 128))
    assert network.cost((90, 100)) == (expected.params, expected.macs)  # both sides are padded to multiples of 32
    assert network.file_bytes == checkpoint.stat().st_size
    assert next(network.predictor.runtime.module.parameters()).device == torch.device("cpu")


def test_latency_is_measured_once_for_each_image_size():
    calls = []
    predictor = Predictor(tiny(3).eval(), "cpu")
    predictor.runtime.module.register_forward_hook(lambda *_: calls.append(1))
    (network,) = open_models([predictor]).students
    image = scene(40, 50)
    latency = network.measure(image)
    assert network.latency == {(40, 50): latency}
    assert 0 < latency.inference < latency.total
    runs = len(calls)
    assert runs >= 1 + 3
    assert network.measure(image) == latency
    assert len(calls) == runs
    network.measure(np.zeros((64, 64, 3), np.uint8))
    assert len(calls) > runs


def test_costs_are_cached_for_each_size_and_released_with_the_network(monkeypatch):
    counted = []
    monkeypatch.setattr(networks, "count_cost", lambda runtime, size: counted.append(size) or (1, 2))
    (network,) = open_models([tiny(3).eval()], device="cpu").students
    runtime = weakref.ref(network.predictor.runtime)
    assert [network.cost((48, 64)) for _ in range(3)] == [(1, 2)] * 3
    assert network.cost((64, 64)) == (1, 2)
    assert counted == [(48, 64), (64, 64)]
    del network
    gc.collect()
    assert runtime() is None


@pytest.mark.parametrize(("fit", "windows"), [("slide", 6), ("resize", 1), ("pad", 1)])
def test_networks_are_opened_with_one_rule_for_sizes_and_count_all_windows(files, fit, windows):
    models = open_models([files / "masks.onnx"], device="cpu", fit=fit)
    served = models.students[0]
    assert served.predictor.fit == fit
    image = scene(96, 100)
    expected = Predictor(files / "masks.onnx", "cpu", fit=fit)(image).mask
    np.testing.assert_array_equal(served.predictor(image).mask, expected)
    module = ServedModel("module", Predictor(network(), "cpu", fit=fit))
    module.predictor.runtime.accepts = served.predictor.runtime.accepts
    assert module.cost((96, 100))[1] == windows * module.cost(SIZE)[1]
