"""The table of formats: the kinds of artifacts, and the functions that write and open them.

Export, runtimes, the benchmark, the command line and the documentation all use this one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bpkd_sdk.errors import did_you_mean, import_optional
from bpkd_sdk.files import CHECKPOINT_SUFFIX, ENGINE_SUFFIXES, OPENMMLAB_SUFFIXES
from bpkd_sdk.hub import is_model_folder


@dataclass(frozen=True)
class Format:
    """One format of artifacts.

    Attributes:
        name: Name in tables and messages.
        suffixes: Suffixes of files of the format; for a server or the Hub the scheme of its URLs.
        precisions: Precisions that export writes; empty if the format keeps the precision of the network.
        devices: Types of device that artifacts of the format run on.
        extras: Extras of this package that run the format, one of which must be installed; empty if none is needed.
        exporter: "module:function" that writes the format; None if no function of `bpkd_sdk.export` does.
        loader: "module:name" of the class or function that opens an artifact; it is called with a path and a device.
    """

    name: str
    suffixes: tuple[str, ...]
    precisions: tuple[str, ...]
    devices: tuple[str, ...]
    extras: tuple[str, ...]
    exporter: str | None
    loader: str

    def open(self, source: str, device: Any) -> Any:
        """Open an artifact as a `Runtime`; raise ValueError for another device, ImportError without the extra."""
        if str(device).partition(":")[0] not in ("auto", *self.devices):
            raise ValueError(
                f"{source} is of the format {self.name}, which runs on {' or '.join(self.devices)}, but "
                f"got device={str(device)!r}."
            )
        module, _, name = self.loader.partition(":")
        extra = next(iter(self.extras), None)
        return getattr(import_optional(module, extra), name)(source, device)


_MODULE = "bpkd_sdk.runtime.module:open_torch_runtime"

MODEL_FOLDER = Format(
    "model folder", ("hf://",), (), ("cpu", "cuda"), ("hub",), None, "bpkd_sdk.runtime.onnx:open_model_folder"
)
FORMATS = (
    Format("checkpoint", (CHECKPOINT_SUFFIX,), (), ("cpu", "cuda", "mps"), ("train",), None, _MODULE),
    Format("OpenMMLab", OPENMMLAB_SUFFIXES, (), ("cpu", "cuda", "mps"), ("train",), None, _MODULE),
    Format(
        "ONNX",
        (".onnx",),
        ("fp32", "fp16", "int8"),
        ("cpu", "cuda"),
        (),
        "bpkd_sdk.export:to_onnx",
        "bpkd_sdk.runtime.onnx:OnnxRuntime",
    ),
    Format(
        "TensorRT",
        ENGINE_SUFFIXES,
        ("fp32", "fp16", "int8"),
        ("cuda",),
        ("tensorrt", "tensorrt-rtx"),
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
    MODEL_FOLDER,
)


def find_format(source: str) -> Format:
    """Return the format of a path or URL, by its suffix or scheme; a folder of `save_pretrained` is a model folder.

    Raises:
        ValueError: If no format has the suffix; the message lists all suffixes.
    """
    if is_model_folder(source):
        return MODEL_FOLDER
    for format_ in FORMATS:
        if any(source.startswith(key) if "://" in key else source.lower().endswith(key) for key in format_.suffixes):
            return format_
    suffixes = [suffix for format_ in FORMATS for suffix in format_.suffixes]
    name = source.rpartition("/")[2]
    suffix = name[name.rfind(".") :] if "." in name else ""
    raise ValueError(
        f"Expected a file that ends in one of {', '.join(suffixes)} (triton:// and hf:// begin a URL), but got "
        f"{source!r}.{did_you_mean(suffix, suffixes)}"
    )
