"""Report of the software and hardware on this machine for training, export and deployment."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from bpkd_sdk.errors import EXTRAS
from bpkd_sdk.gpu import gpu_names


@dataclass(frozen=True)
class Finding:
    """The state of one part of the machine.

    Attributes:
        part: Name of the part.
        found: Version or description of the installed part, or the reason why it is missing.
        advice: What to do if the part is missing; empty if nothing is to be done.
    """

    part: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Inspect every part that training, export and deployment may use."""
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _gpu()
    yield _onnxruntime()
    torch = find_torch()
    if torch is None:
        yield Finding("torch", "not installed", f"needed for training and export: {_install('torch')}")
    else:
        yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
        yield _cuda(torch)
    yield _package("ONNX export", "onnxscript", "onnxscript")
    yield _package("TensorRT", "tensorrt", "tensorrt", " (needs an NVIDIA GPU to run)")
    yield _package("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx-cu13")
    yield _package("HTTP service", "fastapi", "fastapi")
    yield _package("Demo", "gradio", "gradio")
    yield _package("Video", "av", "av")
    yield _package("Triton client", "tritonclient", "tritonclient")
    yield _package("transformers", "transformers", "transformers")
    yield _package("Hugging Face Hub", "huggingface_hub", "huggingface_hub")


def find_torch() -> ModuleType | None:
    """Import and return torch; None if it is not installed."""
    try:
        return import_module("torch")
    except ModuleNotFoundError:
        return None


def _install(package: str) -> str:
    return f"pip install 'bpkd-sdk[{EXTRAS[package]}]'"


def _gpu() -> Finding:
    if gpus := query_gpus("name", "driver_version"):
        return Finding("NVIDIA GPU", f"{', '.join(name for name, _ in gpus)}; driver {gpus[0][1]}")
    if shutil.which("nvidia-smi"):
        return Finding("NVIDIA GPU", "nvidia-smi lists none", "if there is a GPU, install its driver again")
    return Finding("NVIDIA GPU", "no driver (nvidia-smi is missing)", "nothing, if there is no NVIDIA GPU")


def _cuda(torch: ModuleType) -> Finding:
    """Return whether torch can use a GPU."""
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("CUDA", f"{torch.version.cuda}: {', '.join(devices)}; driver {driver_version()}")
    if torch.version.cuda is None:
        return Finding("CUDA", "this build of torch has none", "for an NVIDIA GPU, install a CUDA build of torch")
    advice = "update the NVIDIA driver" if shutil.which("nvidia-smi") else "nothing, if there is no NVIDIA GPU"
    return Finding("CUDA", f"torch is built for {torch.version.cuda} but finds no GPU", advice)


def driver_version() -> str:
    """Return the version of the NVIDIA driver that nvidia-smi states, or "unknown"."""
    return next((version for (version,) in query_gpus("driver_version")), "unknown")


def query_gpus(*fields: str) -> list[tuple[str, ...]]:
    """Query nvidia-smi for each GPU.

    Args:
        *fields: Names of the properties, as `nvidia-smi --help-query-gpu` lists them.

    Returns:
        One tuple per GPU with one text per field; empty if nvidia-smi is missing, fails, or takes over 20 seconds.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        completed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    return [tuple(part.strip() for part in line.split(",")) for line in completed.stdout.strip().splitlines()]


def _package(part: str, module: str, distribution: str, note: str = "") -> Finding:
    try:
        import_module(module)
        return Finding(part, f"{distribution} {version(distribution)}")
    except PackageNotFoundError:
        return Finding(part, module)
    except ModuleNotFoundError as error:
        found = "not installed" if error.name == module else f"cannot be imported ({error})"
        return Finding(part, found, _install(module) + note)
    except Exception as error:  # a broken native library may raise any error
        return Finding(part, f"cannot be imported ({error})", _install(module) + note)


def _onnxruntime() -> Finding:
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) == 2:
        return Finding(
            "ONNX Runtime",
            "onnxruntime and onnxruntime-gpu, which overwrite each other",
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
        )
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError as error:
        return Finding("ONNX Runtime", f"cannot be imported ({error})", "pip install onnxruntime")
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    is_for_cpu = "CUDA" not in providers and gpu_names()
    advice = "to use the GPU: pip uninstall onnxruntime, then pip install onnxruntime-gpu" if is_for_cpu else ""
    return Finding("ONNX Runtime", f"{onnxruntime.__version__}, built for {', '.join(providers)}", advice)


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
