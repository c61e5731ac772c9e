"""Writes a TensorRT engine from an ONNX file, if the compiled network has the precision of the file.

One strongly typed build serves TensorRT 10, TensorRT 11 and TensorRT for RTX. TensorRT builds on the GPU that will run
the engine; TensorRT for RTX compiles on any machine, for the GPUs that are named. Engines have been compiled and
audited, but not yet executed on a GPU.
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
from bpkd_sdk.files import ENGINE_SUFFIXES, exported_path, write_atomically
from bpkd_sdk.runtime.manifest import Backend, EngineManifest, capability, covers, manifest_path, open_backend, supports
from bpkd_sdk.runtime.onnx_file import read_onnx
from bpkd_sdk.sizes import check_size


@dataclass(frozen=True)
class EngineReport:
    """Result of `to_tensorrt`.

    Attributes:
        path: The plan.
        size: Size of the plan in bytes.
        seconds: Time that the compiler took.
        manifest: Manifest beside the plan.
    """

    path: Path
    size: int
    seconds: float
    manifest: EngineManifest


def to_tensorrt(
    source: str | Path,
    path: str | Path,
    *,
    batch_sizes: tuple[int, int, int] | None = None,
    input_sizes: tuple[Size, Size, Size] | None = None,
    workspace_mb: int | None = None,
    version_compatible: bool = False,
    hardware: str | Sequence[str] | None = None,
    timing_cache: str | Path | None = None,
    backend: Backend | None = None,
) -> EngineReport:
    """Compile an ONNX file into an engine, and keep the engine only if its precision is that of the file.

    Two files are written: the plan, as the builder made it, and its manifest, whose name is the plan's with ``.json``
    appended. `bpkd_sdk.runtime.manifest.check_engine` reads the manifest before the plan is loaded.

    Args:
        source: ONNX file of `to_onnx` or `quantize`; its precision is the engine's.
        path: Plan to write; it ends in ``.engine`` or ``.plan``.
        batch_sizes: Smallest, best and largest number of images per batch; None: (1, 1, 8), or the number that the file
            fixes.
        input_sizes: Smallest, best and largest (height, width); required for a file that accepts any size, and only
            allowed for such a file.
        workspace_mb: Largest device memory for scratch, in MiB; None: no limit.
        version_compatible: Whether later builds of the same major version can run the plan, which then contains host
            code. TensorRT only.
        hardware: For TensorRT for RTX: GPUs to compile for, such as ``["sm86", "sm89"]``, or "current" for the GPU of
            this machine; None: all from Ampere (sm80) on. For TensorRT: None for GPUs like this machine's,
            "same_compute_capability" or "ampere_plus".
        timing_cache: File of kernel timings, which is used and updated to make later builds faster. TensorRT only.
        backend: "tensorrt" or "tensorrt_rtx"; None: "tensorrt_rtx" if `hardware` names GPUs, otherwise the first of the
            two that is installed.

    Raises:
        FileNotFoundError: If the ONNX file does not exist.
        ImportError: If no compiler is installed.
        ValueError: If an argument is out of range, or the file is not one of bpkd-sdk or does not agree with torch.
        RuntimeError: If the compiler refuses the file (the message lists all its errors, with their nodes), or the
            engine has another precision. Files at `path` are then unchanged.
    """
    target = Path(path)
    check_choice("the engine's suffix", target.suffix, ENGINE_SUFFIXES)
    if input_sizes is not None:
        if not isinstance(input_sizes, Sequence) or len(input_sizes) != 3:
            raise ValueError(f"Expected `input_sizes` to be (smallest, best, largest), but got {input_sizes!r}.")
        smallest, best, largest = (check_size("input_sizes", size) for size in input_sizes)
        input_sizes = smallest, best, largest
    content, metadata = _read_verified(exported_path(source))
    names = [hardware] if isinstance(hardware, str) else list(hardware or ())
    if backend is None and any(name == "current" or re.fullmatch(r"sm\d+", name) for name in names):
        backend = "tensorrt_rtx"
    job = Compilation(*open_backend(backend))
    job.parse(content, str(source))
    layers = network_layers(job.network)
    check_network(layers, metadata)
    inputs = job.add_profile(1 if metadata["preprocess"] else 2, batch_sizes, input_sizes)
    targets = job.select_hardware(names)
    job.configure(workspace_mb, version_compatible, timing_cache)
    plan, seconds = job.build(str(source))
    here = capability()
    runs_here = here is not None and covers(targets, here) and supports(job.trt, here)
    inspected = job.inspect(plan, metadata["precision"]) if runs_here else {}
    manifest = EngineManifest(
        backend=job.name,
        build=str(job.trt.__version__),
        version_compatible=version_compatible,
        targets=targets,
        device=_describe_gpu(),
        inputs=inputs,
        outputs={
            tensor.name: {"dtype": tensor.dtype.name, "shape": list(tensor.shape)} for tensor in job.output_tensors()
        },
        precision=metadata["precision"],
        layers=layers,
        inspected=dict(Counter(inspected.values())),
        plan_bytes=len(plan),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        onnx_sha256=hashlib.sha256(content).hexdigest(),
        facts=metadata,
    )
    if timing_cache is not None:
        write_atomically(Path(timing_cache), job.timings())
    _write_engine(target, plan, manifest)
    return EngineReport(target, len(plan), seconds, manifest)


def _read_verified(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes and the metadata of an ONNX file; raise ValueError if it disagrees with torch."""
    content, metadata = read_onnx(path)
    if metadata.get("verified") is False:
        raise ValueError(
            f"{path} does not agree with torch and was kept by force=True, so no engine is made of it. Export the "
            "network so that it agrees, for example with another opset or in fp32."
        )
    return content, metadata


def _describe_gpu() -> dict[str, str] | None:
    """Return name, compute capability and driver of this machine's GPU; None without a GPU."""
    here = capability()
    if here is None:
        return None
    return {"name": torch.cuda.get_device_name(), "capability": here, "driver": driver_version()}


def _write_engine(path: Path, plan: bytes, manifest: EngineManifest) -> None:
    """Write plan and manifest, or none of them; if the process is killed between them, the manifest's hash differs."""
    manifest_file = manifest_path(path)
    before = manifest_file.read_bytes() if manifest_file.is_file() else None
    write_atomically(manifest_file, manifest.to_json().encode())
    try:
        write_atomically(path, plan)
    except BaseException:
        manifest_file.unlink() if before is None else write_atomically(manifest_file, before)
        raise
