"""The packages that compile and run engines, TensorRT and TensorRT for RTX, and the GPU that they run on."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, get_args

import torch

from bpkd_sdk.errors import check_choice, import_optional

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
