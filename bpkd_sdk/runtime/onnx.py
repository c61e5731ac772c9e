"""The `Runtime` that runs ONNX files of bpkd-sdk by ONNX Runtime.

ONNX Runtime shares the memory of inputs and outputs with torch, so nothing is copied on the way in or out. On a CPU the
runtime opens a session of the faster model with the same values that the file contains, see
`bpkd_sdk.runtime.onnx_file`. On a GPU it records a CUDA graph of a file that takes one shape only.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from bpkd_sdk.errors import import_optional
from bpkd_sdk.runtime.base import AcceptedImages, Runtime, choose_device
from bpkd_sdk.runtime.onnx_file import cpu_model, read_onnx
from bpkd_sdk.runtime.recording import Recording
from bpkd_sdk.spec import NetworkSpec

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def _accepted_images(metadata: Mapping[str, Any]) -> AcceptedImages:
    """Return the images that an ONNX file with this metadata accepts."""
    batch_sizes = (1, None) if metadata["dynamic_batch"] else (1, 1)
    if metadata.get("dynamic_size", False):
        return AcceptedImages(batch_sizes)
    height, width = metadata["input_size"]
    return AcceptedImages(batch_sizes, (height, height), (width, width))


class OnnxRuntime(Runtime):
    """An ONNX file of `bpkd_sdk.export`, run by ONNX Runtime.

    Args:
        path: The file.
        device: "auto" (a CUDA GPU if torch sees one and ONNX Runtime can use it, otherwise the CPU), "cpu" or a CUDA
            device.
        threads: Number of threads of ONNX Runtime on the CPU; None: ONNX Runtime's default.
        as_written: Whether to run the file's own model on the CPU too.

    Attributes:
        path: The file.
        session: Session of ONNX Runtime.
        as_written: Whether the session runs the file's own model, as it always does on a GPU.
        recording: CUDA graph that calls replay; None on the CPU, for a file that takes more than one shape, and if part
            of the network runs on the CPU.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a readable ONNX file with metadata of bpkd-sdk.
        RuntimeError: If the device is named and not present.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device = "auto",
        *,
        threads: int | None = None,
        as_written: bool = False,
    ) -> None:
        self.path = Path(path)
        content, metadata = read_onnx(self.path)
        accepts, chosen = _accepted_images(metadata), choose_device(device, ("cpu", "cuda"))
        stream = torch.cuda.Stream(chosen) if chosen.type == "cuda" and accepts.is_static else None  # type: ignore[no-untyped-call]
        nhwc = accepts.is_static and metadata["precision"] == "fp16"
        if chosen.type == "cuda":
            self.session = open_session(self.path, chosen, stream=stream, nhwc=nhwc)
            if self.session.get_providers()[0] != "CUDAExecutionProvider":
                problem = (
                    f"ONNX Runtime cannot use {chosen} for {path}. Run `bpkd doctor`: onnxruntime-gpu must be built "
                    "for the CUDA version whose libraries are installed."
                )
                if device != "auto":
                    raise RuntimeError(problem)
                warnings.warn(f"{problem} The file runs on the CPU.", stacklevel=2)
                chosen, stream = torch.device("cpu"), None
        self.as_written = as_written or chosen.type == "cuda"
        if chosen.type != "cuda":
            source = self.path if as_written else cpu_model(content, self.path)
            del content  # ONNX Runtime copies the weights, so they are in memory twice already
            self.session = open_session(source, chosen, threads)
        super().__init__(str(path), NetworkSpec.from_dict(metadata["network"]), metadata, chosen, accepts)
        self.recording = self._record(stream, nhwc) if stream is not None else None

    def model(self) -> bytes:
        """Return the ONNX model that the session runs: the file's content, or the faster model on a CPU."""
        content, _ = read_onnx(self.path)
        return content if self.as_written else cpu_model(content, self.path)

    def infer(self, inputs: Tensor) -> Tensor:
        """Return what the file's graph returns: uint8 masks (N, H, W), or float32 logits (N, C, H, W)."""
        try:
            return self.recording(inputs) if self.recording is not None else run_session(self.session, inputs)
        except Exception as error:  # ONNX Runtime's own errors share no base class
            raise RuntimeError(f"{self.path} failed on images of shape {tuple(inputs.shape)}: {error}") from error

    def _record(self, stream: torch.cuda.Stream, nhwc: bool) -> Recording | None:
        """Record one run as a CUDA graph; None if part of the network runs on the CPU, which the graph would omit."""
        if not runs_on_gpu_alone(self.path, self.device, nhwc):
            return None
        (height, width), session = self.metadata["input_size"], self.session
        inputs = self.prepare(self.spec.pixels.canonical(torch.zeros(1, height, width, self.spec.in_channels).byte()))
        try:
            return Recording(stream, lambda inputs: run_session(session, inputs, wait=False), inputs)
        except Exception as error:  # ONNX Runtime's own errors share no base class
            warnings.warn(f"{self.path} runs without a CUDA graph, so more slowly: {error}", stacklevel=3)
            self.session = open_session(self.path, self.device, nhwc=nhwc)
            return None


def runs_on_gpu_alone(path: Path, device: torch.device, nhwc: bool) -> bool:
    """Return whether ONNX Runtime runs every node of a file on a CUDA GPU, as its CUDA graphs require."""
    try:
        open_session(path, device, nhwc=nhwc, own_graph=True)
    except ValueError:
        return False
    return True


def open_session(
    source: Path | bytes,
    device: torch.device,
    threads: int | None = None,
    *,
    profile: Path | None = None,
    stream: torch.cuda.Stream | None = None,
    nhwc: bool = False,
    own_graph: bool = False,
) -> InferenceSession:
    """Open a session of ONNX Runtime on a device, or on the CPU if ONNX Runtime cannot use the GPU.

    Args:
        source: An ONNX file or its bytes, which run as they are.
        device: The CPU or a CUDA GPU.
        threads: Number of threads on the CPU; None: ONNX Runtime's default.
        profile: First part of the path of the file that ONNX Runtime's profiler writes; None: no profile.
        stream: CUDA stream of torch to run on; None: a stream of ONNX Runtime.
        nhwc: Whether convolutions run over (N, H, W, C) on a GPU, which its half-precision units require.
        own_graph: Whether ONNX Runtime makes a CUDA graph itself, or refuses the model if it cannot.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the source is not an ONNX model, or with `own_graph` if ONNX Runtime cannot make a CUDA graph.
    """
    onnxruntime = import_optional("onnxruntime", "export")
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"There is no ONNX file at {source}.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4 if own_graph else 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()  # loads the CUDA libraries that torch installed
        cuda = {"enable_cuda_graph": str(int(own_graph)), "prefer_nhwc": str(int(nhwc))}
        if device.index:  # 0 is the default; ONNX Runtime 1.31 prints a warning if it is named
            cuda["device_id"] = str(device.index)
        if stream is not None:
            cuda["user_compute_stream"] = str(stream.cuda_stream)
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    try:
        model = str(source) if isinstance(source, Path) else source
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own errors share no base class
        raise ValueError(f"{source!s:.200} is not an ONNX file that ONNX Runtime can load ({error}).") from error


def run_session(session: InferenceSession, inputs: Tensor, *, wait: bool = True) -> Tensor:
    """Run a session that has one input and one output; both stay on the input's device.

    Args:
        session: Session of `open_session`.
        inputs: The input.
        wait: Whether to wait for the GPU; False only for a session that was opened on torch's current stream.
    """
    onnxruntime = import_optional("onnxruntime", "export")
    device, index = inputs.device.type, inputs.device.index or 0
    options = onnxruntime.RunOptions()
    if not wait:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    elif device == "cuda":
        # ONNX Runtime runs on another stream, which does not wait for torch's.
        torch.cuda.current_stream(inputs.device).synchronize()
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, onnxruntime.OrtValue.from_dlpack(inputs.detach()))
    binding.bind_output(session.get_outputs()[0].name, device, index)
    session.run_with_iobinding(binding, options)
    return from_dlpack(binding.get_outputs()[0])
