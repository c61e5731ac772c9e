"""A TensorRT or TensorRT for RTX engine as a `Runtime`, in torch's device buffers.

Each thread has an execution context and a stream of its own. Where the engine takes one shape only, the launch of all
its kernels is recorded once as a CUDA graph and then replayed.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpkd_sdk.models.spec import NetworkSpec
from bpkd_sdk.runtime.base import Accepts, Runtime, choose_device
from bpkd_sdk.runtime.manifest import EngineManifest, check_engine, open_backend, trt_log
from bpkd_sdk.runtime.recording import SETTING_UP, Recording, run_on


class EngineRuntime(Runtime):
    """An engine of `bpkd_sdk.export.to_tensorrt`, checked against its manifest before it is loaded.

    Args:
        path: The plan; its manifest lies beside it.
        device: "auto" or a CUDA device.
        trusted: Allow a version-compatible plan, which carries code that runs on this machine's processor.

    Raises:
        FileNotFoundError: If there is no such engine.
        ValueError: If there is no readable manifest, the plan is not the one it describes, or the device is no GPU.
        RuntimeError: If the engine cannot run here; every reason is listed, with what to do.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "auto", *, trusted: bool = False) -> None:
        where = choose_device(device, ("cpu", "cuda"))
        self.manifest = check_engine(path, trusted=trusted, device=where if where.type == "cuda" else None)
        if where.type != "cuda":
            raise ValueError(f"{path} is an engine and runs on an NVIDIA GPU only, but got device={str(device)!r}.")
        _, self._trt = open_backend(self.manifest.backend)
        facts, accepts = self.manifest.facts, accepted(self.manifest)
        super().__init__(str(path), NetworkSpec.from_dict(facts["network"]), facts, where, accepts)
        self._engine = self._load(Path(path), trusted)
        self._threads = threading.local()

    def _load(self, path: Path, trusted: bool) -> Any:
        with SETTING_UP, torch.cuda.device(self.device):
            self._runtime = self._trt.Runtime(trt_log(self._trt))  # must outlive the engine
            self._runtime.engine_host_code_allowed = trusted and self.manifest.version_compatible
            engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            told = "; ".join(trt_log(self._trt).messages)
            raise RuntimeError(f"{self.manifest.backend} cannot load {path} on {self.device}: {told}")
        return engine

    def infer(self, inputs: Tensor) -> Tensor:
        """What the engine returns: uint8 masks (N, H, W), or float32 logits (N, C, H, W)."""
        with torch.cuda.device(self.device):
            if not hasattr(self._threads, "lane"):
                with SETTING_UP:
                    self._threads.lane = _Lane(self._trt, self._engine, self.manifest, static=self.accepts.is_static)
            lane: _Lane = self._threads.lane
            return lane.run(inputs)


class _Lane:
    """One thread's context, stream and buffers."""

    def __init__(self, trt: Any, engine: Any, manifest: EngineManifest, *, static: bool) -> None:
        self.trt = trt
        self.input, self.output = next(iter(manifest.inputs)), next(iter(manifest.outputs))
        self.dtype = _DTYPES[manifest.outputs[self.output]["dtype"]]
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.context = engine.create_execution_context()
        self.static = static
        self.recording: Recording | None = None

    def run(self, inputs: Tensor) -> Tensor:
        if not self.static:
            return run_on(self.stream, self._enqueue, inputs)
        if self.recording is None:
            self.recording = Recording(self.stream, self._enqueue, inputs)
        return self.recording(inputs)

    def _enqueue(self, inputs: Tensor) -> Tensor:
        self.context.set_input_shape(self.input, tuple(inputs.shape))
        output = torch.empty(tuple(self.context.get_tensor_shape(self.output)), dtype=self.dtype, device=inputs.device)
        self.context.set_tensor_address(self.input, inputs.data_ptr())
        self.context.set_tensor_address(self.output, output.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"The engine failed: {'; '.join(trt_log(self.trt).messages)}")
        return output


_DTYPES = {"UINT8": torch.uint8, "FLOAT": torch.float32}


def accepted(manifest: EngineManifest) -> Accepts:
    """The images that an engine takes."""
    (shapes,) = manifest.inputs.values()
    ranges = list(zip(shapes["min"], shapes["max"], strict=True))
    row = 1 if manifest.facts["preprocess"] else 2
    return Accepts(ranges[0], ranges[row], ranges[row + 1])
