"""Names of devices, and the rules that choose one: that of torch, and that of ONNX Runtime, which needs no torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bpkd_sdk.errors import check_choice, import_optional
from bpkd_sdk.gpu import gpu_names

if TYPE_CHECKING:
    import torch

DEVICE_TYPES = ("cpu", "cuda", "mps")

# Held while an engine is loaded, an execution context is made or a CUDA graph is recorded. The first two may wait for
# the whole device, and the last does, which breaks a recording in progress; and torch records one graph at a time.
SETTING_UP = threading.Lock()


class Device(str):
    """The name of a device, "cpu", "mps" or "cuda:1". torch accepts it wherever it takes a device."""

    __slots__ = ()

    @property
    def type(self) -> str:
        """Type of the device: cpu, cuda or mps."""
        return self.partition(":")[0]

    @property
    def index(self) -> int | None:  # type: ignore[override]  # in place of the method of strings
        """Number of the GPU; None for other devices."""
        number = self.partition(":")[2]
        return int(number) if number else None


def choose_device(device: str | torch.device = "auto", types: Sequence[str] = DEVICE_TYPES) -> Device:
    """Choose a device for torch; the rule for device="auto" of modules, checkpoints, engines and training.

    "auto" is torch's current accelerator if there is one, otherwise the CPU. "cuda" without an index is torch's current
    GPU, and the index is filled in, because without one, torch, TensorRT and ONNX Runtime choose different GPUs.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1" or "mps", or a torch device, which is not checked.
        types: Types of device that the caller supports; "auto" chooses the CPU in place of any other accelerator.

    Raises:
        ImportError: If torch is not installed.
        ValueError: If the name is not "auto" or one of `types`.
        RuntimeError: If torch does not see the device.
    """
    torch = import_optional("torch", "train")
    name = str(device)
    kind, index = _parse(name)
    if isinstance(device, str):
        check_choice("device", device if kind == "auto" else kind, ("auto", *types))
    if kind == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = str(accelerator) if accelerator is not None and accelerator.type in types else "cpu"
    elif isinstance(device, str) and kind == "cuda" and index >= torch.cuda.device_count():
        raise RuntimeError(
            f"Expected device={device!r} to be present, but torch sees {torch.cuda.device_count()} CUDA devices. "
            "Run `bpkd doctor`."
        )
    elif isinstance(device, str) and kind == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError("Expected device='mps' to be present, but torch sees no Apple GPU. Run `bpkd doctor`.")
    return Device(f"cuda:{torch.cuda.current_device()}" if name == "cuda" else name)


def _parse(name: str) -> tuple[str, int]:
    """Return the type and the index of a device name such as "cuda:1"; 0 where it states none."""
    kind, _, index = name.partition(":")
    if index and not (index.isascii() and index.isdecimal()):
        raise ValueError(f"Expected `device` to end in the number of a GPU, such as 'cuda:0', but got {name!r}.")
    return kind, int(index or 0)


def choose_onnx_device(device: str | torch.device = "auto") -> Device:
    """Choose a device for ONNX Runtime; the rule for device="auto" of ONNX files.

    "auto" is the first GPU if this build of ONNX Runtime supports CUDA and the driver sees a GPU, otherwise the CPU.
    "cuda" without an index is the first GPU.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:1", or a torch device.

    Raises:
        ImportError: If onnxruntime is not installed.
        ValueError: If the name is another one.
        RuntimeError: If the driver does not see the GPU.
    """
    kind, index = _parse(str(device))
    check_choice("device", str(device) if kind == "auto" else kind, ("auto", "cpu", "cuda"))
    if kind == "auto":
        providers = import_optional("onnxruntime").get_available_providers()
        return Device("cuda:0" if "CUDAExecutionProvider" in providers and gpu_names() else "cpu")
    if kind == "cuda" and index >= len(gpu_names()):
        raise RuntimeError(
            f"Expected device={str(device)!r} to be present, but the NVIDIA driver sees {len(gpu_names())} GPUs. "
            "Run `bpkd doctor`."
        )
    return Device(f"cuda:{index}" if kind == "cuda" else "cpu")
