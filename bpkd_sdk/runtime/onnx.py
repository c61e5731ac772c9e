"""An ONNX file of ours as a `Runtime`, by ONNX Runtime on the CPU or a CUDA GPU.

Inputs and outputs are bound where they lie and shared with torch, so nothing is copied on the way in or out. On the CPU
a graph with the same values runs that is faster there: `as_uint8`, `put_classes_last`. On a GPU a file that takes one
shape only is recorded as a CUDA graph.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from bpkd_sdk.errors import check_choice, import_optional
from bpkd_sdk.models.spec import NetworkSpec
from bpkd_sdk.runtime.base import Accepts, Runtime, choose_device
from bpkd_sdk.runtime.onnx_cpu import as_uint8, put_classes_last
from bpkd_sdk.runtime.recording import Recording

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

METADATA_KEY = "bpkd"
SEAL_KEY = "bpkd_sha256"
SEAL_LENGTH = 64
_NEEDED = ("network", "input_size", "dynamic_batch", "preprocess", "argmax", "precision")


class OnnxRuntime(Runtime):
    """An ONNX file of `bpkd_sdk.export`.

    Args:
        path: The file.
        device: "auto": a CUDA GPU if torch sees one and ONNX Runtime can use it, otherwise the CPU.
        threads: Of ONNX Runtime on the CPU; None: its own choice.
        as_written: Run the file itself on the CPU, too.

    Attributes:
        path: The file.
        session: ONNX Runtime's.
        as_written: Whether the session is of the file itself, as always on a GPU.
        recording: The CUDA graph that calls replay; None on the CPU, for a file that takes more than one shape, and
            where part of the network runs on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a readable ONNX file with metadata of ours.
        RuntimeError: If the device was named and is not there.
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
        proto, facts = read_file(self.path)
        accepts, where = accepted(facts), choose_device(device, ("cpu", "cuda"))
        stream = torch.cuda.Stream(where) if where.type == "cuda" and accepts.is_static else None  # type: ignore[no-untyped-call]
        nhwc = accepts.is_static and facts["precision"] == "fp16"
        if where.type == "cuda":
            self.session = open_session(self.path, where, stream=stream, nhwc=nhwc)
            if self.session.get_providers()[0] != "CUDAExecutionProvider":
                problem = (
                    f"ONNX Runtime cannot use {where} for {path}. Run `bpkd doctor`: onnxruntime-gpu must be built for "
                    "the CUDA version whose libraries are installed."
                )
                if device != "auto":
                    raise RuntimeError(problem)
                warnings.warn(f"{problem} It runs on the CPU.", stacklevel=2)
                where, stream = torch.device("cpu"), None
        self.as_written = as_written or where.type == "cuda"
        if where.type != "cuda":
            model = self.path if as_written else for_cpu(proto, facts["precision"])
            self.session = open_session(model, where, threads)
        super().__init__(str(path), NetworkSpec.from_dict(facts["network"]), facts, where, accepts)
        self.recording = self._record(stream, nhwc) if stream is not None else None

    def model(self) -> bytes:
        """What the session was opened with: the file's content, or the graph for the CPU."""
        if self.as_written:
            return self.path.read_bytes()
        return for_cpu(read_file(self.path)[0], self.metadata["precision"])

    def infer(self, inputs: Tensor) -> Tensor:
        """What the file itself returns: uint8 masks (N, H, W), or float32 logits (N, C, H, W)."""
        try:
            return self.recording(inputs) if self.recording is not None else run_session(self.session, inputs)
        except Exception as error:  # ONNX Runtime's own errors share no base class
            raise RuntimeError(f"{self.path} failed on images of shape {tuple(inputs.shape)}: {error}") from error

    def _record(self, stream: torch.cuda.Stream, nhwc: bool) -> Recording | None:
        """The CUDA graph of one run; None where part of the network runs on the CPU, which a graph would leave out."""
        if not runs_on_gpu_alone(self.path, self.device, nhwc):
            return None
        (height, width), session = self.metadata["input_size"], self.session
        inputs = self.prepare(torch.zeros(1, height, width, 3, dtype=torch.uint8))
        try:
            return Recording(stream, lambda inputs: run_session(session, inputs, wait=False), inputs)
        except Exception as error:  # ONNX Runtime's own errors share no base class
            warnings.warn(f"{self.path} runs without a CUDA graph, so more slowly: {error}", stacklevel=3)
            self.session = open_session(self.path, self.device, nhwc=nhwc)
            return None


def runs_on_gpu_alone(path: Path, device: torch.device, nhwc: bool) -> bool:
    """Whether ONNX Runtime runs every node of a file on a CUDA GPU; only then does it agree to a CUDA graph."""
    try:
        open_session(path, device, nhwc=nhwc, own_graph=True)
    except ValueError:
        return False
    return True


def read_file(path: Path) -> tuple[ModelProto, dict[str, Any]]:
    """The graph of an ONNX file of ours, and its metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, has no metadata of ours or was altered.
    """
    onnx = import_optional("onnx", "export")
    if not path.is_file():
        raise FileNotFoundError(f"There is no ONNX file at {path}.")
    try:
        proto = onnx.load(path)
    except Exception as error:  # protobuf's errors share no public base class
        raise ValueError(f"{path} is not a readable ONNX file ({error}). It may be truncated.") from error
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    facts = parse_facts(properties.get(METADATA_KEY), path)
    check_seal(path)
    return proto, facts


def for_cpu(proto: ModelProto, precision: str) -> bytes:
    """A graph with the same values that ONNX Runtime computes faster on a CPU; may change `proto`."""
    graph = as_uint8(proto) if precision == "int8" else proto
    put_classes_last(graph)
    content: bytes = graph.SerializeToString()
    return content


def accepted(facts: dict[str, Any]) -> Accepts:
    """The images that an ONNX file with this metadata takes."""
    height, width = facts["input_size"]
    batch = (1, None) if facts["dynamic_batch"] else (1, 1)
    return Accepts(batch) if facts.get("dynamic_size", False) else Accepts(batch, (height, height), (width, width))


def run_session(session: InferenceSession, inputs: Tensor, *, wait: bool = True) -> Tensor:
    """One input, one output; both stay on the input's device.

    With `wait=False` nobody waits for the GPU: for a session that was opened on torch's current stream.
    """
    onnxruntime = import_optional("onnxruntime", "export")
    device, index = inputs.device.type, inputs.device.index or 0
    options = onnxruntime.RunOptions()
    if not wait:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    elif device == "cuda":
        # ONNX Runtime works on a stream of its own, which knows nothing of torch's.
        torch.cuda.current_stream(inputs.device).synchronize()
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, onnxruntime.OrtValue.from_dlpack(inputs.detach()))
    binding.bind_output(session.get_outputs()[0].name, device, index)
    session.run_with_iobinding(binding, options)
    return from_dlpack(binding.get_outputs()[0])


def parse_facts(raw: str | None, name: object) -> dict[str, Any]:
    """The metadata of an artifact from its JSON text; ValueError if it is not there, not readable or not whole."""
    if raw is None:
        raise ValueError(f"{name} has no metadata of bpkd-sdk; write it with the functions of bpkd_sdk.export.")
    try:
        return check_facts(json.loads(raw))
    except ValueError as error:
        raise ValueError(f"The metadata of bpkd-sdk in {name} is not readable ({error}); export it again.") from error


def check_facts(facts: Any) -> dict[str, Any]:
    """The metadata of an artifact; ValueError if it is no such thing, or lacks something."""
    if not isinstance(facts, dict):
        raise ValueError(f"it is {facts!r:.40}, not an object")
    if missing := [key for key in _NEEDED if key not in facts]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    check_choice("precision", facts["precision"], ("fp32", "fp16", "int8"))
    if facts["precision"] == "int8" and not isinstance(facts.get("quantization"), dict):
        raise ValueError("it lacks quantization")
    NetworkSpec.from_dict(facts["network"])
    return facts


def check_seal(path: Path) -> None:
    """Raise ValueError for a file that was altered: its last 64 bytes are the SHA-256, in hex, of all before them."""
    digest, left = hashlib.sha256(), path.stat().st_size - SEAL_LENGTH
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
        told = file.read()
    if told != digest.hexdigest().encode():
        raise ValueError(
            f"{path} has been altered since bpkd-sdk wrote it: its content does not match the hash at its end. "
            "Export it again, or get the file anew from where it came from."
        )


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
    """Load an ONNX file, or the bytes of one, on a device; on the CPU where the GPU cannot be used.

    Args:
        source: The file or its bytes.
        device: The CPU or a CUDA GPU.
        threads: On the CPU; None: ONNX Runtime's own choice.
        profile: How the path begins that ONNX Runtime's profiler writes to; None: it does not.
        stream: Of torch, to work on; None: one of its own.
        nhwc: On a GPU, convolve over (N, H, W, C), which is what its units for half precision want.
        own_graph: Let ONNX Runtime make a CUDA graph, or refuse where it cannot.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an ONNX file, or there can be no graph of its own.
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
        onnxruntime.preload_dlls()  # the CUDA libraries that torch brought
        cuda = {"enable_cuda_graph": str(int(own_graph)), "prefer_nhwc": str(int(nhwc))}
        if device.index:  # the first is the default, and with a name ONNX Runtime 1.31 prints a warning
            cuda["device_id"] = str(device.index)
        if stream is not None:
            cuda["user_compute_stream"] = str(stream.cuda_stream)
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    model = str(source) if isinstance(source, Path) else source
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own errors share no base class
        raise ValueError(f"{source!s:.200} is not an ONNX file that ONNX Runtime can load ({error}).") from error
