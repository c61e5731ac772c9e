"""Runtimes: artifacts of every format that segment images behind one interface.

torch is imported only for what it runs: modules, checkpoints and TensorRT engines.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bpkd_sdk.errors import import_optional, lazy_names
from bpkd_sdk.files import find_network, is_pretrained_name
from bpkd_sdk.hub import is_model_folder
from bpkd_sdk.runtime.base import AcceptedImages, Runtime
from bpkd_sdk.runtime.formats import FORMATS, Format, find_format
from bpkd_sdk.runtime.matched import MatchedRuntime, match_runtime

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bpkd_sdk.runtime.module import TorchRuntime

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

__getattr__ = lazy_names(__name__, {"bpkd_sdk.runtime.module": ("TorchRuntime",)})


def open_runtime(source: str | Path | nn.Module | Runtime, device: str | torch.device = "auto") -> Runtime:
    """Open an artifact or a module as a `Runtime`.

    Args:
        source: Path or URL of one of the `FORMATS`; the folder of a run, whose last checkpoint is opened; name of a
            network that `load_model` opens with all of its weights; a module in eval mode, which is moved to the
            device; or a runtime, which is returned unchanged.
        device: "auto" (a GPU if there is one that the format supports, otherwise the CPU), "cpu", "cuda", "cuda:1" or
            "mps". See `bpkd_sdk.runtime.device`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a module is in training mode, no format has the suffix, the file's content is of another format,
            or the format does not support the device.
        TypeError: If the source is none of these.
        RuntimeError: If the artifact cannot run on this machine; the message states why and what to do.
        ImportError: If a package is missing; the message states what to install.
    """
    if isinstance(source, Runtime):
        return source
    source = find_network(source)
    runtime: Runtime
    if not isinstance(source, (str, Path)):
        runtime = import_optional("bpkd_sdk.runtime.module").open_module(source, device)
    elif is_pretrained_name(source) and not is_model_folder(source):
        runtime = import_optional("bpkd_sdk.runtime.module").open_torch_runtime(str(source), device)
    else:
        runtime = find_format(str(source)).open(str(source), device)
    return runtime
