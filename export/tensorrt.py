"""ONNX to a TensorRT engine: one strongly typed build for TensorRT 10, 11 and TensorRT for RTX, audited, then kept.

TensorRT builds on the GPU that will run the engine. TensorRT for RTX compiles anywhere, for the GPUs that are named.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bpkd_sdk.doctor import driver_version
from bpkd_sdk.errors import check_choice
from bpkd_sdk.export.audit import check_network, network_layers
from bpkd_sdk.export.compilation import Compilation, Size
from bpkd_sdk.files import write_atomically
from bpkd_sdk.runtime.formats import ENGINE_SUFFIXES
from bpkd_sdk.runtime.manifest import Backend, EngineManifest, capability, covers, manifest_path, open_backend, supports
from bpkd_sdk.runtime.onnx import read_onnx


@dataclass(frozen=True)
class EngineReport:
    """What `to_tensorrt` wrote.

    Attributes:
        path: The plan.
        size: In bytes.
        seconds: That the compiler took.
        manifest: What lies beside the plan.
    """

    path: Path
    size: int
    seconds: float
    manifest: EngineManifest


def to_tensorrt(
    onnx_path: str | Path,
    path: str | Path,
    *,
    batch: tuple[int, int, int] | None = None,
    size: tuple[Size, Size, Size] | None = None,
    workspace_mb: int | None = None,
    version_compatible: bool = False,
    hardware: str | Sequence[str] | None = None,
    timing_cache: str | Path | None = None,
    backend: Backend | None = None,
) -> EngineReport:
    """Compile an ONNX file of `to_onnx` or `quantize`, and keep the engine only if its precision is the file's.

    Two files are written: the plan, as the builder made it, and its manifest with ``.json`` appended to the name, which
    `bpkd_sdk.runtime.manifest.check_engine` reads before the plan is loaded.

    Args:
        onnx_path: The file; its precision is the engine's.
        path: Ends in ``.engine`` or ``.plan``.
        batch: Least, best and largest number of images; None: (1, 1, 8), or what the file fixes.
        size: Least, best and largest (height, width); only for a file that takes any size, which needs it.
        workspace_mb: Most device memory for scratch, in MiB; None: all there is.
        version_compatible: Let later builds of the same major version run the plan. It then carries host code.
            TensorRT only.
        hardware: TensorRT for RTX: the GPUs to compile for, such as ``["sm86", "sm89"]``, or "current" for the one
            here; None: every one from Ampere (sm80) on.
            TensorRT: None for GPUs like this one, "same_compute_capability" or "ampere_plus".
        timing_cache: A file of kernel timings, used and updated; makes later builds faster. TensorRT only.
        backend: "tensorrt" or "tensorrt_rtx"; None: "tensorrt_rtx" if `hardware` names GPUs, otherwise the first of
            them that is installed.

    Raises:
        FileNotFoundError: If there is no such ONNX file.
        ImportError: If no compiler is installed.
        ValueError: For an argument out of its range, or a file that is not one of ours or does not agree with torch.
        RuntimeError: If the compiler refuses the file (all its errors, with their nodes, are listed), or the engine is
            not of the precision asked for. What lay at `path` before stays.
    """
    target = Path(path)
    check_choice("the engine's suffix", target.suffix, ENGINE_SUFFIXES)
    raw, facts = _read(Path(onnx_path))
    named = [hardware] if isinstance(hardware, str) else list(hardware or ())
    if backend is None and any(name == "current" or re.fullmatch(r"sm\d+", name) for name in named):
        backend = "tensorrt_rtx"
    job = Compilation(*open_backend(backend))
    job.parse(raw, str(onnx_path))
    layers = network_layers(job.network)
    check_network(layers, facts)
    inputs = job.add_profile(1 if facts["preprocess"] else 2, batch, size)
    targets = job.select_hardware(named)
    job.configure(workspace_mb, version_compatible, timing_cache)
    plan, seconds = job.build(str(onnx_path))
    here = capability()
    runs_here = here is not None and covers(targets, here) and supports(job.trt, here)
    inspected = job.inspect(plan, facts["precision"]) if runs_here else {}
    manifest = EngineManifest(
        backend=job.name,
        build=str(job.trt.__version__),
        version_compatible=version_compatible,
        targets=targets,
        device=_device(),
        inputs=inputs,
        outputs={tensor.name: _described(tensor) for tensor in job.outputs()},
        precision=facts["precision"],
        layers=layers,
        inspected=dict(Counter(inspected.values())),
        plan_bytes=len(plan),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        onnx_sha256=hashlib.sha256(raw).hexdigest(),
        facts=facts,
    )
    if timing_cache is not None:
        write_atomically(Path(timing_cache), job.timings())
    _write(target, plan, manifest)
    return EngineReport(target, len(plan), seconds, manifest)


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of an ONNX file and what it says about itself."""
    _, facts = read_onnx(path)
    if facts.get("verified") is False:
        raise ValueError(
            f"{path} does not agree with torch and was kept by force=True, so no engine is made of it. Export the "
            "network so that it agrees, for example with another opset or in fp32."
        )
    return path.read_bytes(), facts


def _described(tensor: Any) -> dict[str, Any]:
    return {"dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _device() -> dict[str, str] | None:
    here = capability()
    if here is None:
        return None
    return {"name": torch.cuda.get_device_name(), "capability": here, "driver": driver_version()}


def _write(path: Path, plan: bytes, manifest: EngineManifest) -> None:
    """Both files or none. Should it be killed between them, the manifest's hash tells that the plan is another."""
    beside = manifest_path(path)
    before = beside.read_bytes() if beside.is_file() else None
    write_atomically(beside, manifest.to_json().encode())
    try:
        write_atomically(path, plan)
    except BaseException:
        beside.unlink() if before is None else write_atomically(beside, before)
        raise
