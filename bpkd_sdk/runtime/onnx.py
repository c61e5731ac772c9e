"""The `Runtime` that runs ONNX files of bpkd-sdk by ONNX Runtime.

Numpy arrays go in and come out without torch. torch tensors share their memory with ONNX Runtime, so that nothing is
copied. On a CPU the runtime opens a session of the faster model with the same values that the file contains, see
`bpkd_sdk.runtime.onnx_file`. On a GPU, ONNX Runtime captures a CUDA graph of a file that takes one shape only.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bpkd_sdk.arrays import Array
from bpkd_sdk.errors import import_optional, warn
from bpkd_sdk.hub import ONNX_FILE, find_file, is_on_hub
from bpkd_sdk.runtime.base import AcceptedImages, Runtime
from bpkd_sdk.runtime.device import SETTING_UP, Device, choose_onnx_device
from bpkd_sdk.runtime.onnx_file import cpu_model, read_onnx
from bpkd_sdk.spec import NetworkSpec

if TYPE_CHECKING:
    import torch
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
        device: "auto" (a CUDA GPU if ONNX Runtime can use one, otherwise the CPU), "cpu" or a CUDA device; see
            `choose_onnx_device`.
        threads: Number of threads of ONNX Runtime on the CPU; None: ONNX Runtime's default.
        as_written: Whether to run the file's own model on the CPU too.

    Attributes:
        path: The file.
        session: Session of ONNX Runtime.
        as_written: Whether the session runs the file's own model, as it always does on a GPU.
        replay: CUDA graph that calls replay; None on the CPU, for a file that takes more than one shape, and if part of
            the network runs on the CPU.

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
        accepts, chosen = _accepted_images(metadata), choose_onnx_device(device)
        self.replay = None
        if chosen.type == "cuda":
            nhwc = accepts.is_static and metadata["precision"] == "fp16"
            self.replay = _capture(self.path, chosen, nhwc) if accepts.is_static else None
            self.session = self.replay.session if self.replay else open_session(self.path, chosen, nhwc=nhwc)
            if self.session.get_providers()[0] != "CUDAExecutionProvider":
                problem = (
                    f"ONNX Runtime cannot use {chosen} for {path}. Run `bpkd doctor`: a GPU needs onnxruntime-gpu in "
                    "place of onnxruntime, built for the CUDA version whose libraries are installed."
                )
                if device != "auto":
                    raise RuntimeError(problem)
                warn(f"{problem} The file runs on the CPU.")
                chosen = Device("cpu")
        self.as_written = as_written or chosen.type == "cuda"
        if chosen.type != "cuda":
            source = self.path if as_written else cpu_model(content, self.path)
            del content  # ONNX Runtime copies the weights, so they are in memory twice already
            self.session = open_session(source, chosen, threads)
        super().__init__(str(path), NetworkSpec.from_dict(metadata["network"]), metadata, chosen, accepts)

    def model(self) -> bytes:
        """Return the ONNX model that the session runs: the file's content, or the faster model on a CPU."""
        content, _ = read_onnx(self.path)
        return content if self.as_written else cpu_model(content, self.path)

    def infer(self, inputs: Array) -> Array:
        """Return what the file's graph returns: uint8 masks (N, H, W), or float32 logits (N, C, H, W)."""
        try:
            return run_session(self.session, inputs) if self.replay is None else self.replay(inputs)
        except Exception as error:  # ONNX Runtime's own errors share no base class
            raise RuntimeError(f"{self.path} failed on images of shape {tuple(inputs.shape)}: {error}") from error


class CudaGraphSession:
    """A session that replays a CUDA graph, with one input and one output on the GPU at fixed addresses.

    ONNX Runtime captures a graph for each thread that calls it, so that one thread of this object makes all calls. See
    https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#using-cuda-graphs-preview.

    Args:
        session: Session that was opened with `cuda_graph`, for a model with one shape.
        device: GPU of the session.
    """

    def __init__(self, session: InferenceSession, device: Device) -> None:
        from onnxruntime import OrtValue

        self.session = session
        self._thread = ThreadPoolExecutor(1, "CUDA graph")
        self._binding = session.io_binding()
        (taken,), (returned,) = session.get_inputs(), session.get_outputs()
        self._input, self._output = (
            OrtValue.ortvalue_from_numpy(np.zeros(value.shape, _TYPES[value.type]), device.type, device.index or 0)
            for value in (taken, returned)
        )
        self._binding.bind_ortvalue_input(taken.name, self._input)
        self._binding.bind_ortvalue_output(returned.name, self._output)
        with SETTING_UP:  # the first run makes the buffers and captures the graph
            self._thread.submit(session.run_with_iobinding, self._binding).result()

    def __call__(self, inputs: Array) -> Array:
        """Return the output for an input: an array in host memory, or for a tensor one on the GPU."""
        if isinstance(inputs, np.ndarray):
            return self._thread.submit(self._run, inputs).result()
        import torch
        from torch.utils.dlpack import from_dlpack

        outputs = torch.empty_like(from_dlpack(self._output))
        torch.cuda.current_stream(inputs.device).synchronize()  # ONNX Runtime runs on another stream
        self._thread.submit(self._run_tensor, inputs, outputs).result()
        return outputs

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        self._input.update_inplace(inputs)
        self.session.run_with_iobinding(self._binding)
        return np.asarray(self._output.numpy())

    def _run_tensor(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        import torch
        from torch.utils.dlpack import from_dlpack

        stream = torch.cuda.current_stream(inputs.device)
        with torch.inference_mode():
            from_dlpack(self._input).copy_(inputs)
            stream.synchronize()
            self.session.run_with_iobinding(self._binding)
            outputs.copy_(from_dlpack(self._output))
            stream.synchronize()


_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


def _capture(path: Path, device: Device, nhwc: bool) -> CudaGraphSession | None:
    """Capture a CUDA graph of a file; None if part of the network runs on the CPU, which the graph would omit."""
    try:
        session = open_session(path, device, nhwc=nhwc, cuda_graph=True)
    except ValueError:
        return None
    if session.get_providers()[0] != "CUDAExecutionProvider":
        return None
    try:
        return CudaGraphSession(session, device)
    except Exception as error:  # ONNX Runtime's own errors share no base class
        warn(f"{path} runs without a CUDA graph, so more slowly: {error}")
        return None


def open_session(
    source: Path | bytes,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    *,
    profile: Path | None = None,
    nhwc: bool = False,
    cuda_graph: bool = False,
) -> InferenceSession:
    """Open a session of ONNX Runtime on a device, or on the CPU if ONNX Runtime cannot use the GPU.

    Args:
        source: An ONNX file or its bytes, which run as they are.
        device: The CPU or a CUDA GPU.
        threads: Number of threads on the CPU; None: ONNX Runtime's default.
        profile: First part of the path of the file that ONNX Runtime's profiler writes; None: no profile.
        nhwc: Whether convolutions run over (N, H, W, C) on a GPU, which its half-precision units require.
        cuda_graph: Whether ONNX Runtime captures a CUDA graph in the first run, or refuses the model if it cannot.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the source is not an ONNX model, or with `cuda_graph` if ONNX Runtime cannot make a CUDA graph.
    """
    onnxruntime, device = import_optional("onnxruntime"), Device(str(device))
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"There is no ONNX file at {source}.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4 if cuda_graph else 3
    # Without it, sums of products of int8 files overflow silently on x86 processors that lack VNNI instructions.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()  # loads the CUDA libraries that pip installed, for torch or by themselves
        cuda = {"enable_cuda_graph": str(int(cuda_graph)), "prefer_nhwc": str(int(nhwc))}
        if device.index:  # 0 is the default; ONNX Runtime 1.31 prints a warning if it is named
            cuda["device_id"] = str(device.index)
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    try:
        model = str(source) if isinstance(source, Path) else source
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own errors share no base class
        raise ValueError(f"{source!s:.200} is not an ONNX file that ONNX Runtime can load ({error}).") from error


def run_session(session: InferenceSession, inputs: Array) -> Array:
    """Run a session that has one input and one output.

    Args:
        session: Session of `open_session`.
        inputs: The input: a numpy array; or a tensor, on the device of the session.

    Returns:
        The output, of the same kind and on the same device. Tensors share their memory with ONNX Runtime.
    """
    (taken,), (returned,) = session.get_inputs(), session.get_outputs()
    if isinstance(inputs, np.ndarray):
        return np.asarray(session.run([returned.name], {taken.name: inputs})[0])
    import torch

    if inputs.device.type == "cpu":
        return torch.from_numpy(run_session(session, inputs.detach().numpy()))
    from onnxruntime import OrtValue
    from torch.utils.dlpack import from_dlpack

    torch.cuda.current_stream(inputs.device).synchronize()  # ONNX Runtime runs on another stream
    binding = session.io_binding()
    binding.bind_ortvalue_input(taken.name, OrtValue.from_dlpack(inputs.detach().contiguous()))
    binding.bind_output(returned.name, "cuda", inputs.device.index or 0)
    session.run_with_iobinding(binding)
    return from_dlpack(binding.get_outputs()[0])


def open_model_folder(folder: str, device: Any = "auto") -> OnnxRuntime:
    """Open the ONNX file of a model folder, which is downloaded if the folder is on the Hub (``hf://user/name``)."""
    runtime = OnnxRuntime(find_file(folder, ONNX_FILE), device)
    if is_on_hub(folder):
        runtime.name = folder.replace("hf:/", "hf://") if "://" not in folder else folder  # a Path drops a slash
    return runtime
