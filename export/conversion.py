"""Converts a checkpoint or an ONNX file to a file of another format, through all the steps between them."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bpkd_sdk import export
from bpkd_sdk.errors import check_choice
from bpkd_sdk.files import find_network
from bpkd_sdk.runtime.formats import FORMATS, Format, find_format

Step = Callable[..., Any]


def convert(
    source: str | Path, path: str | Path, *, web: bool = False, precision: str | None = None, **options: Any
) -> list[Any]:
    """Write a file in the format of the path's suffix, or a web site; intermediate files go to a temporary folder.

    `to_onnx` exports a checkpoint. For precision "int8", `quantize` converts the ONNX file. If the path is not an ONNX
    file, the exporter that the table of formats names writes it; `to_web` writes a site.

    Args:
        source: A checkpoint, the folder of a run, a network by an address that `load_model` opens, an ONNX file of
            `to_onnx`, or for an engine or a site an ONNX file of `quantize`.
        path: File to write; with `web`, the folder of the site.
        web: Whether to write a web site.
        precision: One of the format's precisions; None: that of an ONNX file, or "fp32" for a checkpoint.
        options: Keyword arguments of the steps.

    Returns:
        The report of each step.

    Raises:
        FileNotFoundError: If the source does not exist.
        ValueError: If export does not write the format, no step uses an option, a step lacks an option, or as the steps
            raise it.
        RuntimeError: As the steps raise it.
    """
    source, target = find_network(source), Path(path)
    # A web site of an ONNX file needs no torch, which the other functions import.
    steps = [getattr(export, name) for name in plan_steps(str(source), str(path), precision, web=web)]
    if precision in ("fp32", "fp16"):
        options["precision"] = precision
    _check_options(steps, options, f"from {Path(source).name} to {target.name}")
    reports: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            name = Path(source).stem + (".int8.onnx" if step.__name__ == "quantize" else ".onnx")
            step_path = target if step is steps[-1] else Path(folder) / name
            step_options = {name: options[name] for name in inspect.signature(step).parameters if name in options}
            reports.append(step(source, step_path, **step_options))
            source = reports[-1].path
    return reports


def written_formats() -> list[Format]:
    """Return the formats that `convert` writes; `save_model` writes checkpoints, `to_triton` repositories."""
    return [format_ for format_ in FORMATS if format_.exporter and not format_.suffixes[0].endswith("://")]


def plan_steps(source: str, path: str, precision: str | None, *, web: bool = False) -> list[str]:
    """Return the names of the export functions that lead from a source to a path, in their order.

    Raises:
        ValueError: If export does not write the format of the path, or the precision does not fit.
    """
    wanted = find_format(".onnx" if web else path)
    if wanted not in written_formats() or wanted.exporter is None:
        suffixes = [suffix for format_ in written_formats() for suffix in format_.suffixes]
        ending = Path(path).suffix.lower()
        kind = f"files that end in {ending}" if ending in wanted.suffixes else f"the format {wanted.name}"
        raise ValueError(
            f"Export does not write {kind}, but got {path}; it writes {', '.join(suffixes)}. "
            "train, distill and import write checkpoints, `bpkd triton` writes a Triton model repository."
        )
    if precision is not None:
        check_choice("precision", precision, wanted.precisions)
    last = "to_web" if web else wanted.exporter.removeprefix("bpkd_sdk.export:")
    is_onnx = source.lower().endswith(".onnx")
    if is_onnx and precision in ("fp32", "fp16"):
        raise ValueError(
            f"{source} is an ONNX file and keeps its own precision. Omit `precision` (or pass 'int8' to quantize it), "
            "or export from the checkpoint."
        )
    names = ([] if is_onnx else ["to_onnx"]) + (["quantize"] if precision == "int8" else [])
    names += [] if last == "to_onnx" else [last]
    if not names:
        raise ValueError(f"{source} is an ONNX file already. Pass precision='int8', or an engine as the target.")
    return names


def _check_options(steps: list[Step], options: dict[str, Any], conversion: str) -> None:
    """Raise ValueError for an option that no step uses, a required option that is missing, and a useless `force`.

    Args:
        steps: Functions of `plan_steps`.
        options: Keyword arguments for the steps.
        conversion: Description of the conversion in error messages.
    """
    names = ", then ".join(step.__name__ for step in steps)
    accepted: dict[str, inspect.Parameter] = {}
    for step in steps:
        accepted |= inspect.signature(step).parameters
    accepted = {name: parameter for name, parameter in accepted.items() if name not in ("source", "path")}
    if unknown := sorted(options.keys() - accepted.keys()):
        raise ValueError(f"{_format_options(unknown)} not used by the export steps {conversion}: {names}.")
    required = [name for name, parameter in accepted.items() if parameter.default is parameter.empty]
    if missing := [name for name in required if name not in options]:
        raise ValueError(f"{_format_options(missing)} required by the export steps {conversion}: {names}.")
    if options.get("force") and len(steps) > 1:
        raise ValueError(
            f"The export steps {conversion} are {names}. force=True keeps an ONNX file that disagrees with torch, from "
            "which no further file is made. Omit `force`, or export to an ONNX file in fp32 or fp16."
        )


def _format_options(names: list[str]) -> str:
    """Return "Option `a` is" for one name, "Options `a`, `b` are" for more."""
    quoted = ", ".join(f"`{name}`" for name in names)
    return f"Option {quoted} is" if len(names) == 1 else f"Options {quoted} are"
