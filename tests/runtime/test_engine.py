"""Engines on many threads, with stand-ins for CUDA and TensorRT that run on the CPU; no engine is executed."""

import ctypes
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch

from bpkd_sdk.runtime.engine import EngineRuntime
from tests.runtime.test_manifest import FACTS, claim_gpu, engine

SHAPE = (1, 8, 8, 3)
THREADS = 4


class Machine:
    """Stand-in for a GPU and TensorRT, whose engine returns the images' red channel as masks."""

    def __init__(self):
        self._waiting = threading.Lock()
        self._thread = threading.local()
        self.disturbed = False

    @contextmanager
    def alone(self):
        """Wait for the whole device, and record whether two threads do so at the same time."""
        if not self._waiting.acquire(blocking=False):
            self.disturbed = True
            self._waiting.acquire()
        time.sleep(0.01)  # so that other threads arrive
        yield
        self._waiting.release()

    def execute(self, images, masks):
        def kernel():
            bytes_of = (ctypes.c_uint8 * torch.Size(SHAPE).numel()).from_address(images)
            (ctypes.c_uint8 * len(bytes_of[::3])).from_address(masks)[:] = bytes_of[::3]

        self._thread.kernel = kernel
        kernel()

    @contextmanager
    def record(self, graph, **_):
        with self.alone():
            yield
        graph.replay = self._thread.kernel

    def deserialize_cuda_engine(self, plan):
        with self.alone():
            return self

    def create_execution_context(self):
        with self.alone():
            return Context(self)


class Context:
    def __init__(self, machine):
        self.machine, self.addresses = machine, {}
        self.set_tensor_address = self.addresses.__setitem__

    def set_input_shape(self, name, shape):
        self.shape = shape

    def get_tensor_shape(self, name):
        return self.shape[:3]

    def execute_async_v3(self, stream):
        self.machine.execute(**self.addresses)
        return True


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    trt = ModuleType("tensorrt")
    trt.__version__, trt.Runtime, trt.ILogger = "11.4.0.1", lambda log: machine, object
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    claim_gpu(monkeypatch, (8, 6))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: Mock())
    monkeypatch.setattr(torch.cuda, "graph", machine.record)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    return machine


@pytest.fixture
def path(tmp_path):
    """Write an engine for one shape, from image to mask."""
    shapes = {key: list(SHAPE) for key in ("min", "opt", "max")}
    return engine(
        tmp_path,
        inputs={"images": {"dtype": "UINT8", **shapes}},
        outputs={"masks": {"dtype": "UINT8", "shape": list(SHAPE[:3])}},
        facts=FACTS | {"preprocess": True, "argmax": True},
    )


def images(value):
    return torch.full(SHAPE, value, dtype=torch.uint8)


def test_threads_set_up_one_at_a_time(machine, path):
    first = EngineRuntime(path)
    start = threading.Barrier(THREADS)

    def work(index):
        start.wait()
        runtime = EngineRuntime(path) if index % 2 else first
        return [runtime.infer(images(value)) for value in (index, index + 100)]

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(work, range(THREADS)))
    assert not machine.disturbed
    for index, found in enumerate(results):
        assert [mask.unique().tolist() for mask in found] == [[index], [index + 100]]


@pytest.mark.parametrize("modes", [(True, False), (False, True)], ids=["inference mode first", "inference mode later"])
def test_calls_in_and_out_of_inference_mode(machine, path, modes):
    runtime = EngineRuntime(path)
    for value, mode in enumerate(modes):
        with torch.inference_mode(mode):
            masks = runtime.infer(images(value))
        assert masks.unique().tolist() == [value]
    assert masks.is_inference() == modes[-1]


def test_the_named_gpu_is_checked(machine, path, monkeypatch):
    claim_gpu(monkeypatch, (8, 6), (8, 9))
    assert EngineRuntime(path, "cuda").device == "cuda:0"
    with pytest.raises(RuntimeError, match="built for sm86 .*the GPU here is sm89"):
        EngineRuntime(path, "cuda:1")
    with pytest.raises(ValueError, match="runs on an NVIDIA GPU only, but got device='cpu'"):
        EngineRuntime(path, "cpu")
