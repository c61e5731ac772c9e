"""Runtimes: artifacts of every format that segment images behind one interface."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bpkd_sdk.models import load_model
from bpkd_sdk.models.library import is_pretrained_name
from bpkd_sdk.runtime.base import AcceptedImages, Runtime, TorchRuntime
from bpkd_sdk.runtime.formats import FORMATS, Format, find_format
from bpkd_sdk.runtime.matched import MatchedRuntime, match_runtime

__all__ = [
    "FORMATS",
    "AcceptedImages",
    "Format",
    "MatchedRuntime",
    "Runtime",
    "TorchRuntime",
    "find_format",
    "match_runtime",
    "open_runtime",
]


def open_runtime(source: str | Path | nn.Module | Runtime, device: str | torch.device = "auto") -> Runtime:
    """Open an artifact or a module as a `Runtime`.

    Args:
        source: Path or URL of one of the `FORMATS`; name of a network that `load_model` opens with all of its weights;
            a module in eval mode, which is moved to the device; or a runtime, which is returned unchanged.
        device: "auto" (torch's current accelerator if there is one that the format supports, otherwise the CPU), "cpu",
            "cuda", "cuda:1" or "mps".

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If no format has the suffix, the file's content is of another format, or the format does not support
            the device.
        RuntimeError: If the artifact cannot run on this machine; the message states why and what to do.
        ImportError: If a package is missing; the message states what to install.
    """
    if isinstance(source, Runtime):
        return source
    if isinstance(source, nn.Module):
        return TorchRuntime(source, device)
    if is_pretrained_name(source):
        return open_torch_runtime(str(source), device)
    runtime: Runtime = find_format(str(source)).open(str(source), device)
    return runtime


def open_torch_runtime(path: str, device: str | torch.device) -> TorchRuntime:
    """Open a checkpoint of bpkd-sdk or of OpenMMLab (``.pth``), or a network by name, with `load_model`."""
    return TorchRuntime(load_model(path), device, name=path)
