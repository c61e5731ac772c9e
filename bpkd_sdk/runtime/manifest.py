"""The manifest of a TensorRT engine: a JSON file beside the plan, which states where the engine can run.

A plan is opaque and runs only with the build and on the GPUs that it was made for. TensorRT reports "deserialization
failed" for every reason. `check_engine` therefore reads the manifest before the plan, and reports each condition that
does not hold on this machine, and what to do. The plan stays as the builder wrote it, because trtexec and Triton load
nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from bpkd_sdk.errors import check_choice, format_list, import_optional
from bpkd_sdk.files import file_sha256, parse_record
from bpkd_sdk.runtime.onnx_file import check_metadata

if TYPE_CHECKING:
    import torch

FORMAT = "bpkd-engine/1"


@dataclass(frozen=True)
class EngineManifest:
    """Facts of one engine.

    Attributes:
        backend: Name of the package that built the engine and must run it.
        build: Version of that package.
        version_compatible: Whether later builds of the same major version can run the plan; such a plan contains host
            code.
        targets: GPUs that the engine runs on: compute capabilities such as "sm86", or "sm80+" for that one and all
            later ones.
        device: GPU that the engine was built on (name, capability, driver); None if it was built without a GPU.
        inputs: Type of each input, and the smallest, the best and the largest shape that it accepts.
        outputs: Type and shape of each output; -1 for lengths that depend on the input.
        precision: Precision that the ONNX file states and that was found in the engine.
        layers: Number of layers with weights by kind and type, in the network that was compiled.
        inspected: Number of these layers by type in the finished engine, as far as its inspector names them; empty if
            no GPU of this machine could load the engine.
        plan_bytes: Size of the plan.
        plan_sha256: SHA-256 of the plan.
        onnx_sha256: SHA-256 of the ONNX file.
        facts: Metadata of the ONNX file: network, classes, palette, normalisation, agreement, versions.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

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
        """Return the content of the manifest's file."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EngineManifest:
        """Parse the content of a manifest's file; raise ValueError for any other text."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"it is not of format {FORMAT!r}")
        manifest = parse_record(cls, values, "The file")
        check_choice("backend", manifest.backend, EXTRAS)  # the package of this name is imported
        check_metadata(manifest.facts)
        if not re.match(r"\d+\.", manifest.build):
            raise ValueError(f"its build is {manifest.build!r}, not a version such as '11.4.0.1'")
        if not all(re.fullmatch(r"sm\d+\+?", target) for target in manifest.targets):
            raise ValueError(f"its targets are {manifest.targets}, not compute capabilities such as 'sm86'")
        _check_tensors("inputs", manifest.inputs, ("min", "opt", "max"), {4})
        _check_tensors("outputs", manifest.outputs, ("shape",), {3, 4})
        return manifest


def _check_tensors(
    name: str, tensors: Mapping[str, Mapping[str, Any]], shapes: tuple[str, ...], axes: set[int]
) -> None:
    """Raise ValueError unless there is exactly one tensor, with a dtype and shapes of an allowed number of axes."""
    (described,) = tensors.values() if len(tensors) == 1 else ({},)
    if set(described) != {"dtype", *shapes} or not all(_is_shape(described[shape], axes) for shape in shapes):
        raise ValueError(f"its {name} are {tensors!r:.80}, not one tensor with dtype, {', '.join(shapes)}")


def _is_shape(lengths: Any, axes: set[int]) -> bool:
    return isinstance(lengths, list) and len(lengths) in axes and all(isinstance(length, int) for length in lengths)


def manifest_path(path: str | Path) -> Path:
    """Return the path of an engine's manifest: the engine's path with ``.json`` appended."""
    return Path(f"{path}.json")


def load_manifest(path: str | Path) -> EngineManifest:
    """Read the manifest of an engine.

    Args:
        path: Path of the engine.

    Raises:
        FileNotFoundError: If the engine does not exist.
        ValueError: If the engine has no manifest beside it, or one that cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no engine at {path}.")
    file = manifest_path(path)
    if not file.is_file():
        raise ValueError(
            f"{path} has no manifest beside it ({file.name}), which states what the engine requires. "
            "Copy that file too, or build the engine with bpkd_sdk.export.to_tensorrt."
        )
    try:
        return EngineManifest.from_json(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is not a manifest that this version of bpkd-sdk can read ({error}). "
            "Copy it again together with the engine, or build both again with bpkd_sdk.export.to_tensorrt."
        ) from error


def check_engine(
    path: str | Path, *, trusted: bool = False, device: str | torch.device | None = None
) -> EngineManifest:
    """Check whether an engine can run on this machine, before TensorRT loads it, and return its manifest.

    Args:
        path: Path of the engine.
        trusted: Whether a version-compatible plan is allowed, which contains code that runs on this machine's
            processor. The manifest can be forged: let TensorRT run host code only if this is set.
        device: GPU that is to run the engine; None: the current one.

    Raises:
        FileNotFoundError: If the engine does not exist.
        ValueError: If there is no readable manifest, or the plan is not the one that the manifest describes.
        RuntimeError: If the engine cannot run on this machine; the message lists every reason and what to do.
    """
    manifest = load_manifest(path)
    check_plan(Path(path), manifest)
    if reasons := list(_obstacles(manifest, trusted, capability(device))):
        raise RuntimeError(f"{path} cannot run here:\n{format_list(reasons)}")
    return manifest


def check_plan(path: Path, manifest: EngineManifest) -> None:
    """Raise ValueError unless the bytes of a plan are those that its manifest describes."""
    digest = file_sha256(path)
    if digest != manifest.plan_sha256:
        raise ValueError(
            f"{path} is not the plan that its manifest describes: it has {path.stat().st_size} bytes and SHA-256 "
            f"{digest[:12]}..., the manifest states {manifest.plan_bytes} and {manifest.plan_sha256[:12]}.... "
            "It was cut short, altered or replaced: copy both files again, or build it again."
        )


def _obstacles(manifest: EngineManifest, trusted: bool, here: str | None) -> Iterator[str]:
    """Yield the reasons why an engine cannot run on a GPU of compute capability `here` (None: no GPU)."""
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
            "It is version compatible, so it contains code for this machine's processor. If you trust its source, open "
            "it with bpkd_sdk.runtime.engine.EngineRuntime(path, trusted=True), which Predictor, evaluate and "
            "benchmark accept instead of the path; otherwise build it here from the ONNX file."
        )


def _build_obstacle(manifest: EngineManifest, installed: str) -> Iterator[str]:
    if installed == manifest.build:
        return
    installed_numbers, built_numbers = _numbers(installed), _numbers(manifest.build)
    same_major = installed_numbers[0] == built_numbers[0]
    if manifest.version_compatible and same_major and installed_numbers >= built_numbers:
        return
    allowed = (
        f"that build or a later one of version {built_numbers[0]}"
        if manifest.version_compatible
        else "exactly that build"
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


def capability(device: str | torch.device | None = None) -> str | None:
    """Return the compute capability of a GPU (None: the current one), such as "sm86"; None without a GPU."""
    torch = import_optional("torch")
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def covers(targets: Iterable[str], here: str) -> bool:
    """Return whether one of the targets ("sm86", or "sm80+" for that one and all later ones) includes a capability."""
    return any(target == here or (target.endswith("+") and _number(here) >= _number(target)) for target in targets)


def supports(trt: Any, here: str) -> bool:
    """Return whether a compiler's engines run on GPUs of a compute capability.

    TensorRT for RTX names the capabilities that it supports; sm90, of data-centre GPUs, is not one of them.
    """
    known = getattr(trt, "ComputeCapability", None)
    return known is None or here.upper() in known.__members__


def _number(capability: str) -> int:
    return int(capability.removeprefix("sm").removesuffix("+"))


def open_backend(name: str | None) -> tuple[str, Any]:
    """Import a compiler and return its name and module.

    Args:
        name: Name of the compiler; None: `tensorrt` if it is installed, otherwise `tensorrt_rtx`.

    Raises:
        ImportError: If the compiler is not installed; the message names the extras that install it.
        ValueError: If the name is not a `Backend`.
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
    """Return the log that keeps the last 50 warnings and errors; one per process, as TensorRT keeps the first log."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[str] = deque(maxlen=50)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                self.messages.append(f"{severity.name}: {message}")

    return Log()
