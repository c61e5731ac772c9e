"""An ONNX file of ours as a `Runtime`, by ONNX Runtime on the CPU or a CUDA GPU.

Inputs and outputs are bound where they lie and shared with torch, so nothing is copied on the way in or out. On the CPU
an int8 file runs as uint8, with the same values.
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
from bpkd_sdk.runtime.base import Accepts, Runtime
from bpkd_sdk.runtime.device import choose_device
from bpkd_sdk.runtime.uint8 import as_uint8

if TYPE_CHECKING:
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

    Attributes:
        path: The file.
        session: ONNX Runtime's.
        model: What the session was opened with: the path, or the graph in uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a readable ONNX file with metadata of ours.
        RuntimeError: If the device was named and is not there.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "auto", *, threads: int | None = None) -> None:
        self.path = Path(path)
        where = choose_device(device)
        self.session = open_session(self.path, where, threads)
        if where.type == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            problem = (
                f"ONNX Runtime cannot use {where} for {path}. Run `bpkd doctor`: onnxruntime-gpu must be built for the "
                "CUDA version whose libraries are installed."
            )
            if device != "auto":
                raise RuntimeError(problem)
            warnings.warn(f"{problem} It runs on the CPU.", stacklevel=2)
            where = torch.device("cpu")
        facts = parse_facts(self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), path)
        check_seal(self.path)
        self.model: Path | bytes = self.path
        if facts["precision"] == "int8" and where.type == "cpu":
            self.model = _in_uint8(self.path)
            self.session = open_session(self.model, where, threads)
        super().__init__(str(path), NetworkSpec.from_dict(facts["network"]), facts, where, accepted(facts))

    def infer(self, inputs: Tensor) -> Tensor:
        """What the file itself returns: uint8 masks (N, H, W), or float32 logits (N, C, H, W)."""
        try:
            return run_session(self.session, inputs)
        except Exception as error:  # ONNX Runtime's own errors share no base class
            raise RuntimeError(f"{self.path} failed on images of shape {tuple(inputs.shape)}: {error}") from error


def _in_uint8(path: Path) -> bytes:
    onnx = import_optional("onnx", "export")
    content: bytes = as_uint8(onnx.load(path)).SerializeToString()
    return content


def accepted(facts: dict[str, Any]) -> Accepts:
    """The images that an ONNX file with this metadata takes."""
    height, width = facts["input_size"]
    batch = (1, None) if facts["dynamic_batch"] else (1, 1)
    return Accepts(batch) if facts.get("dynamic_size", False) else Accepts(batch, (height, height), (width, width))


def run_session(session: InferenceSession, inputs: Tensor) -> Tensor:
    """One input, one output; both stay on the input's device."""
    device, index = inputs.device.type, inputs.device.index or 0
    if device == "cuda":
        # ONNX Runtime works on a stream of its own, which knows nothing of torch's.
        torch.cuda.current_stream(inputs.device).synchronize()
    from onnxruntime import OrtValue

    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, OrtValue.from_dlpack(inputs.detach()))
    binding.bind_output(session.get_outputs()[0].name, device, index)
    session.run_with_iobinding(binding)
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
    source: Path | bytes, device: torch.device, threads: int | None = None, profile: Path | None = None
) -> InferenceSession:
    """Load an ONNX file, or the bytes of one, on a device; on the CPU where the GPU cannot be used.

    With `profile`, ONNX Runtime's profiler writes to a file whose path begins so.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an ONNX file.
    """
    onnxruntime = import_optional("onnxruntime", "export")
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"There is no ONNX file at {source}.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()  # the CUDA libraries that torch brought
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    model = str(source) if isinstance(source, Path) else source
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own errors share no base class
        raise ValueError(f"{source!s:.200} is not an ONNX file that ONNX Runtime can load ({error}).") from error
