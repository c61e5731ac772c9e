"""Artifacts as things that segment images, behind one interface."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bpkd_sdk.models import load_model
from bpkd_sdk.runtime.base import Accepts, Runtime, TorchRuntime
from bpkd_sdk.runtime.formats import FORMATS, Format, find_format
from bpkd_sdk.runtime.matched import MatchedRuntime, match_runtime

__all__ = [
    "FORMATS",
    "Accepts",
    "Format",
    "MatchedRuntime",
    "Runtime",
    "TorchRuntime",
    "find_format",
    "match_runtime",
    "open_runtime",
]


def open_runtime(source: str | Path | nn.Module | Runtime, device: str | torch.device = "auto") -> Runtime:
    """Open whatever segments images.

    Args:
        source: A path or URL of one of the `FORMATS`, a module in eval mode (it is moved to the device), or a runtime,
            which is returned as it is.
        device: "auto" (a CUDA GPU if there is one, otherwise the CPU), "cpu", "cuda", "cuda:1", "mps".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For another suffix, a file that is not what its suffix says, or a device that the format does not support.
        RuntimeError: If it cannot run here; the message says why and what to do.
        ImportError: If a package is missing; the message says what to install.
    """
    if isinstance(source, Runtime):
        return source
    if isinstance(source, nn.Module):
        return TorchRuntime(source, device)
    runtime: Runtime = find_format(str(source)).open(str(source), device)
    return runtime


def open_module(path: str, device: str | torch.device) -> TorchRuntime:
    """Open a checkpoint, ours or an OpenMMLab ``.pth``."""
    return TorchRuntime(load_model(path), device, name=path)
