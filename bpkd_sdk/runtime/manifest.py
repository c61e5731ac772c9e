"""What an engine says about itself: a JSON file beside the plan, read before the plan is.

A plan is opaque and runs only with the build and on the GPUs it was made for; the runtime says "deserialization failed"
whatever is wrong. So the facts lie beside it, and `check_engine` says which of them does not hold here and what to do.
The plan itself stays as the builder wrote it, because trtexec and Triton load nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from bpkd_sdk.errors import check_choice, import_optional, listed
from bpkd_sdk.runtime.onnx import check_metadata

FORMAT = "bpkd-engine/1"


@dataclass(frozen=True)
class EngineManifest:
    """The facts of one engine.

    Attributes:
        backend: The package that built it and must run it.
        build: Version of that package.
        version_compatible: Whether later builds of the same major version may run it; such a plan carries host code.
        targets: GPUs it runs on: compute capabilities such as "sm86", or "sm80+" for that one and later.
        device: The GPU it was built on (name, capability, driver), or None if it was built without one.
        inputs: For each input its type, and the least, best and largest shape that it takes.
        outputs: For each output its type and shape, -1 where it follows the input's.
        precision: As asked for by the ONNX file, and found.
        layers: Number of layers with weights by kind and type, in the network that was compiled.
        inspected: The same layers by type, in the finished engine, as far as its inspector names them; empty where no
            GPU could load it.
        plan_bytes: Size of the plan.
        plan_sha256: Hash of the plan.
        onnx_sha256: Hash of the ONNX file.
        facts: The ONNX file's metadata: network, classes, palette, normalisation, agreement, versions.
    """

    backend: str
    build: str
    version_compatible: bool
    targets: tuple[str, ...]
    device: Mapping[str, str] | None
    inputs: Mapping[str, Mapping[str, Any]]
    outputs: Mapping[str, Mapping[str, Any]]
    precision: str
    layers: Mapping[str, Mapping[str, int]]
    inspected: Mapping[str, int]
    plan_bytes: int
    plan_sha256: str
    onnx_sha256: str
    facts: Mapping[str, Any]

    def to_json(self) -> str:
        """The manifest as it lies beside the plan."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EngineManifest:
        """The inverse of `to_json`; ValueError or TypeError for anything else."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"it is not of format {FORMAT!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            raise ValueError(f"missing keys {sorted(names - values.keys())}, unknown {sorted(values.keys() - names)}")
        manifest = cls(**{**values, "targets": tuple(values["targets"])})
        check_choice("backend", manifest.backend, EXTRAS)  # it is imported by this name
        check_metadata(manifest.facts)
        if not re.match(r"\d+\.", manifest.build):
            raise ValueError(f"its build is {manifest.build!r}, not a version such as '11.4.0.1'")
        if not all(re.fullmatch(r"sm\d+\+?", target) for target in manifest.targets):
            raise ValueError(f"its targets are {manifest.targets}, not compute capabilities such as 'sm86'")
        _check_tensors("inputs", manifest.inputs, ("min", "opt", "max"), {4})
        _check_tensors("outputs", manifest.outputs, ("shape",), {3, 4})
        return manifest


def _check_tensors(what: str, tensors: Any, shapes: tuple[str, ...], axes: set[int]) -> None:
    """Raise ValueError or TypeError unless there is one tensor, with a type and those shapes."""
    (described,) = tensors.values() if isinstance(tensors, dict) and len(tensors) == 1 else ({},)
    if set(described) != {"dtype", *shapes} or not all(_is_shape(described[name], axes) for name in shapes):
        raise ValueError(f"its {what} are {tensors!r:.80}, not one tensor with dtype, {', '.join(shapes)}")


def _is_shape(lengths: Any, axes: set[int]) -> bool:
    return isinstance(lengths, list) and len(lengths) in axes and all(isinstance(length, int) for length in lengths)


def manifest_path(path: str | Path) -> Path:
    """Where the manifest of an engine lies: its own path and ``.json``."""
    return Path(f"{path}.json")


def load_manifest(path: str | Path) -> EngineManifest:
    """Read what lies beside an engine.

    Args:
        path: The engine's.

    Raises:
        FileNotFoundError: If there is no such engine.
        ValueError: If there is no manifest beside it, or one that cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no engine at {path}.")
    file = manifest_path(path)
    if not file.is_file():
        raise ValueError(
            f"{path} has no manifest beside it ({file.name}), so nothing says what it needs. "
            "Copy that file too, or build the engine with bpkd_sdk.export.to_tensorrt."
        )
    try:
        return EngineManifest.from_json(file.read_text("utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is not a manifest that this version of bpkd-sdk can read ({error}). "
            "Copy it again together with the engine, or build both again with bpkd_sdk.export.to_tensorrt."
        ) from error


def check_engine(path: str | Path, *, trusted: bool = False, device: torch.device | None = None) -> EngineManifest:
    """Decide whether an engine can run here, before any runtime sees it.

    Args:
        path: The engine's.
        trusted: Allow a version-compatible plan, which carries code that runs on this machine's processor. The manifest
            can be forged: whoever loads the plan should let the runtime run host code only if this was set.
        device: The GPU that shall run it; None: the current one.

    Returns:
        Its manifest.

    Raises:
        FileNotFoundError: If there is no such engine.
        ValueError: If there is no readable manifest, or the plan is not the one that it describes.
        RuntimeError: If the engine cannot run here; every reason is listed, with what to do.
    """
    manifest = load_manifest(path)
    check_plan(Path(path), manifest)
    if reasons := list(_obstacles(manifest, trusted, capability(device))):
        raise RuntimeError(f"{path} cannot run here:\n{listed(reasons)}")
    return manifest


def check_plan(path: Path, manifest: EngineManifest) -> None:
    """Raise ValueError if a plan is not, to the byte, the one that its manifest describes."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != manifest.plan_sha256:
        raise ValueError(
            f"{path} is not the plan that its manifest describes: it has {path.stat().st_size} bytes and SHA-256 "
            f"{found[:12]}..., the manifest says {manifest.plan_bytes} and {manifest.plan_sha256[:12]}.... "
            "It was cut short, altered or replaced: copy both files again, or build it again."
        )


def _obstacles(manifest: EngineManifest, trusted: bool, here: str | None) -> Iterator[str]:
    trt: Any = None
    try:
        trt = importlib.import_module(manifest.backend)
    except ImportError as error:
        yield (
            f"It needs the package {manifest.backend!r}, which could not be imported ({error}). "
            f"Install it with: pip install 'bpkd-sdk[{EXTRAS[manifest.backend]}]'"
        )
    else:
        yield from _build_obstacle(manifest, str(trt.__version__))
    yield from _device_obstacle(manifest, trt, here)
    if manifest.version_compatible and not trusted:
        yield (
            "It is version compatible, so it carries code for this machine's processor. If it comes from a place that "
            "you trust, open it with bpkd_sdk.runtime.engine.EngineRuntime(path, trusted=True), which Predictor, "
            "evaluate and benchmark take in the path's place; otherwise build it here from the ONNX file."
        )


def _build_obstacle(manifest: EngineManifest, installed: str) -> Iterator[str]:
    if installed == manifest.build:
        return
    ours, theirs = _numbers(installed), _numbers(manifest.build)
    if manifest.version_compatible and ours[0] == theirs[0] and ours >= theirs:
        return
    allowed = (
        f"that build or a later one of version {theirs[0]}" if manifest.version_compatible else "exactly that build"
    )
    yield (
        f"It was built by {manifest.backend} {manifest.build} and runs with {allowed}, but {installed} is installed. "
        "Build it again here from the ONNX file, or install the build it needs."
    )


def _numbers(build: str) -> tuple[int, ...]:
    return tuple(int(part) for part in build.split(".") if part.isdigit())


def _device_obstacle(manifest: EngineManifest, trt: Any, here: str | None) -> Iterator[str]:
    built = f"It was built for {', '.join(manifest.targets)} (NVIDIA compute capabilities)"
    if here is None:
        yield f"{built}, and torch sees no NVIDIA GPU here. Use the ONNX file on this machine."
    elif not supports(trt, here):
        yield (
            f"{manifest.backend} {trt.__version__} runs on no GPU of the kind here, {here}. Use the ONNX file on this "
            "machine, or build the engine with backend='tensorrt'."
        )
    elif not covers(manifest.targets, here):
        advice = f"with hardware=[{here!r}]" if manifest.backend == "tensorrt_rtx" else "on this GPU"
        yield f"{built}, and the GPU here is {here}. Build it again {advice}."


Backend = Literal["tensorrt", "tensorrt_rtx"]
EXTRAS: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


def capability(device: torch.device | None = None) -> str | None:
    """The compute capability of a GPU (None: the current one) as "sm86", or None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def covers(targets: Iterable[str], here: str) -> bool:
    """Whether an engine for these compute capabilities ("sm86", or "sm80+" for that one and later) is for this one."""
    return any(target == here or (target.endswith("+") and _number(here) >= _number(target)) for target in targets)


def supports(trt: Any, here: str) -> bool:
    """Whether a compiler's engines run on GPUs of a compute capability at all.

    TensorRT for RTX names those it knows: sm90, of data centres, is none of them.
    """
    known = getattr(trt, "ComputeCapability", None)
    return known is None or here.upper() in known.__members__


def _number(capability: str) -> int:
    return int(capability.removeprefix("sm").removesuffix("+"))


def open_backend(name: str | None) -> tuple[str, Any]:
    """Import a compiler: the one named, or `tensorrt` if it is there, otherwise `tensorrt_rtx`.

    Returns:
        Its name and its module.

    Raises:
        ImportError: Naming the extras that install them.
        ValueError: For another name.
    """
    if name is not None:
        check_choice("backend", name, get_args(Backend))
        return name, import_optional(name, EXTRAS[name])
    for candidate in EXTRAS:
        try:
            return candidate, importlib.import_module(candidate)
        except ImportError:
            continue
    raise ImportError(
        "This needs TensorRT or TensorRT for RTX, and neither can be imported. For engines for this machine's GPU: "
        "pip install 'bpkd-sdk[tensorrt]'. For engines compiled without a GPU: pip install 'bpkd-sdk[tensorrt-rtx]'."
    )


@cache
def trt_log(trt: Any) -> Any:
    """A log that keeps the last warnings and errors; one for all, because TensorRT keeps the first that it is given."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[str] = deque(maxlen=50)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                self.messages.append(f"{severity.name}: {message}")

    return Log()
