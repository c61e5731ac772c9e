"""The table of formats: what a network can be kept as, what makes and opens it. Everything that asks goes by it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from bpkd_sdk.errors import did_you_mean
from bpkd_sdk.models.checkpoint import SUFFIX
from bpkd_sdk.models.openmmlab import SUFFIXES as OPENMMLAB_SUFFIXES
from bpkd_sdk.runtime.manifest import EXTRAS

ENGINE_SUFFIXES = (".engine", ".plan")


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: As tables show it.
        suffixes: Of its files; for a server the scheme of its URLs.
        precisions: That it can be written in; empty where it keeps what it is given.
        devices: That it runs on.
        extras: Of this package; one of them has to be installed for it, if there are any.
        exporter: "module:function" that writes it; None where `save_model`, or nobody here, does.
        loader: "module:name" of what opens it: called with its path and a device.
    """

    name: str
    suffixes: tuple[str, ...]
    precisions: tuple[str, ...]
    devices: tuple[str, ...]
    extras: tuple[str, ...]
    exporter: str | None
    loader: str

    def open(self, source: str, device: Any) -> Any:
        """Open a file of this format as a `Runtime`; ValueError for a device that it does not run on."""
        if str(device).partition(":")[0] not in ("auto", *self.devices):
            raise ValueError(
                f"{source} is of the format {self.name}, which runs on {' or '.join(self.devices)}, but "
                f"got device={str(device)!r}."
            )
        module, _, name = self.loader.partition(":")
        return getattr(importlib.import_module(module), name)(source, device)


FORMATS = (
    Format("checkpoint", (SUFFIX,), (), ("cpu", "cuda", "mps"), (), None, "bpkd_sdk.runtime:open_module"),
    Format("OpenMMLab", OPENMMLAB_SUFFIXES, (), ("cpu", "cuda", "mps"), (), None, "bpkd_sdk.runtime:open_module"),
    Format(
        "ONNX",
        (".onnx",),
        ("fp32", "fp16", "int8"),
        ("cpu", "cuda"),
        ("export",),
        "bpkd_sdk.export:to_onnx",
        "bpkd_sdk.runtime.onnx:OnnxRuntime",
    ),
    Format(
        "TensorRT",
        ENGINE_SUFFIXES,
        ("fp32", "fp16", "int8"),
        ("cuda",),
        tuple(EXTRAS.values()),
        "bpkd_sdk.export:to_tensorrt",
        "bpkd_sdk.runtime.engine:EngineRuntime",
    ),
    Format(
        "Triton",
        ("triton://",),
        ("fp32", "fp16", "int8"),
        ("cpu", "cuda"),
        ("triton",),
        "bpkd_sdk.export:to_triton",
        "bpkd_sdk.runtime.triton:TritonRuntime",
    ),
)


def find_format(source: str) -> Format:
    """The format of a path or URL, by its suffix or scheme.

    Raises:
        ValueError: If there is none; the message lists all.
    """
    for format_ in FORMATS:
        if any(source.startswith(key) if key.endswith("://") else source.endswith(key) for key in format_.suffixes):
            return format_
    known = [suffix for format_ in FORMATS for suffix in format_.suffixes]
    name = source.rpartition("/")[2]
    suffix = name[name.rfind(".") :] if "." in name else ""
    raise ValueError(
        f"Expected a file that ends in one of {', '.join(known)} (triton:// begins a URL), but got {source!r}."
        f"{did_you_mean(suffix, known)}"
    )
