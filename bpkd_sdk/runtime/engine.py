"""The `Runtime` of engines of TensorRT and TensorRT for RTX, with inputs and outputs in torch's device memory.

Each thread has its own execution context and stream. If the engine accepts one shape only, the launch of all its
kernels is recorded once as a CUDA graph and then replayed. The tests run this file with stand-ins for CUDA and
TensorRT; engines have not yet been executed on a GPU.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpkd_sdk.arrays import as_tensor
from bpkd_sdk.runtime.base import AcceptedImages, Runtime
from bpkd_sdk.runtime.device import SETTING_UP, choose_device
from bpkd_sdk.runtime.manifest import EngineManifest, check_engine, open_backend, trt_log
from bpkd_sdk.runtime.recording import Recording, run_on
from bpkd_sdk.spec import NetworkSpec


class EngineRuntime(Runtime):
    """An engine of `bpkd_sdk.export.to_tensorrt`; its manifest is checked before the engine is loaded.

    Args:
        path: The plan, with its manifest beside it.
        device: "auto" or a CUDA device.
        trusted: Whether a version-compatible plan is allowed, which contains code that runs on this machine's
            processor.

    Raises:
        FileNotFoundError: If the engine does not exist.
        ValueError: If there is no readable manifest, the plan is not the one that the manifest describes, or the device
            is not a GPU.
        RuntimeError: If the engine cannot run on this machine; the message lists every reason and what to do.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "auto", *, trusted: bool = False) -> None:
        chosen = choose_device(device, ("cpu", "cuda"))
        self.manifest = check_engine(path, trusted=trusted, device=chosen if chosen.type == "cuda" else None)
        if chosen.type != "cuda":
            raise ValueError(f"{path} is an engine and runs on an NVIDIA GPU only, but got device={str(device)!r}.")
        _, self._trt = open_backend(self.manifest.backend)
        metadata, accepts = self.manifest.facts, accepted_images(self.manifest)
        super().__init__(str(path), NetworkSpec.from_dict(metadata["network"]), metadata, chosen, accepts)
        self._engine = self._load(Path(path), trusted)
        self._threads = threading.local()

    def _load(self, path: Path, trusted: bool) -> Any:
        with SETTING_UP, torch.cuda.device(self.device):
            self._runtime = self._trt.Runtime(trt_log(self._trt))  # must outlive the engine
            self._runtime.engine_host_code_allowed = trusted and self.manifest.version_compatible
            engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            messages = "; ".join(trt_log(self._trt).messages)
            raise RuntimeError(f"{self.manifest.backend} cannot load {path} on {self.device}: {messages}")
        return engine

    def prepare(self, images: Any) -> Any:
        """Check images (N, H, W, channels), and return the engine's input as a tensor on its GPU."""
        return super().prepare(as_tensor(images))

    def infer(self, inputs: Tensor) -> Tensor:
        """Return the engine's output: uint8 masks (N, H, W), or float32 logits (N, C, H, W)."""
        with torch.cuda.device(self.device):
            if not hasattr(self._threads, "context"):
                with SETTING_UP:
                    self._threads.context = _ThreadContext(
                        self._trt, self._engine, self.manifest, static=self.accepts.is_static
                    )
            context: _ThreadContext = self._threads.context
            return context.run(inputs)


class _ThreadContext:
    """Execution context, stream and CUDA graph of one thread."""

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


def accepted_images(manifest: EngineManifest) -> AcceptedImages:
    """Return the images that an engine accepts."""
    (shapes,) = manifest.inputs.values()
    ranges = list(zip(shapes["min"], shapes["max"], strict=True))
    height = 1 if manifest.facts["preprocess"] else 2  # axis
    return AcceptedImages(ranges[0], ranges[height], ranges[height + 1])
