import gc
import weakref

import numpy as np
import pytest
import torch

import bpkd_sdk
from bpkd_sdk.serve import Predictor, networks
from bpkd_sdk.serve.networks import open_networks
from tests.networks import tiny
from tests.serve.cases import SIZE, scene


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "student" / "last.safetensors"
    path.parent.mkdir()
    bpkd_sdk.save_model(bpkd_sdk.create_model("smp/Linknet/tu-test_resnet", 4), path)
    return path


def test_one_that_cannot_be_opened_does_not_stop_the_others(checkpoint, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    sources = [checkpoint, tmp_path / "missing.onnx", tmp_path / "broken.onnx", "student.pkl", str(checkpoint)]
    networks = open_networks(sources, "cpu")
    assert [network.predictor is None for network in networks] == [False, True, True, True, False]
    for network, reason in zip(
        networks[1:4], ["no ONNX file", "not a readable ONNX file", "Expected a file"], strict=True
    ):
        assert reason in network.problem
        assert str(tmp_path) not in network.problem
        assert network.bytes is None
        assert network.cost(SIZE) == (None, None)


def test_open_ones_stay_as_they_are(model):
    predictor = Predictor(model, "cpu")
    (network,) = open_networks([predictor])
    assert network.predictor is predictor
    assert open_networks([network]) == [network]


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
    ids=["files", "runs", "no folder", "same names", "the same twice", "server"],
)
def test_names_tell_networks_apart(paths, names):
    assert [network.name for network in open_networks(paths, "cpu")] == names


def test_cost_is_counted_without_running_the_network(checkpoint):
    (network,) = open_networks([checkpoint], "cpu")
    expected = bpkd_sdk.profile(bpkd_sdk.load_model(checkpoint), (96, 128))
    assert network.cost((90, 100)) == (expected.params, expected.macs)  # both sides are padded to multiples of 32
    assert network.bytes == checkpoint.stat().st_size
    assert next(network.predictor.runtime.module.parameters()).device == torch.device("cpu")


def test_latency_is_the_median_of_some_runs_of_each_size():
    calls = []
    predictor = Predictor(tiny(3).eval(), "cpu")
    predictor.runtime.module.register_forward_hook(lambda *_: calls.append(1))
    (network,) = open_networks([predictor])
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


def test_the_cost_of_a_size_is_counted_once_and_forgotten_with_the_network(monkeypatch):
    counted = []
    monkeypatch.setattr(networks, "count_cost", lambda runtime, size: counted.append(size) or (1, 2))
    (network,) = open_networks([tiny(3).eval()], "cpu")
    runtime = weakref.ref(network.predictor.runtime)
    assert [network.cost((48, 64)) for _ in range(3)] == [(1, 2)] * 3
    assert network.cost((64, 64)) == (1, 2)
    assert counted == [(48, 64), (64, 64)]
    del network
    gc.collect()
    assert runtime() is None
