"""Which device a name means on this machine."""

from __future__ import annotations

import torch

from bpkd_sdk.errors import check_choice


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device of a name: "auto" (a CUDA GPU if there is one, otherwise the CPU), "cpu", "cuda", "cuda:1", "mps".

    Without an index, "cuda" is torch's current GPU, and the index is filled in: torch, TensorRT and ONNX Runtime each
    take a GPU without one for another.

    Raises:
        ValueError: For another name.
        RuntimeError: If the device is not there.
    """
    chosen = device if isinstance(device, torch.device) else _named(device)
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _named(device: str) -> torch.device:
    kind, _, index = device.partition(":")
    check_choice("device", kind, ("auto", "cpu", "cuda", "mps"))
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"device={device!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices. "
            "Run `bpkd doctor`."
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError("device='mps' was asked for, but torch sees no Apple GPU.")
    return torch.device(device)
