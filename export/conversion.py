"""From a checkpoint or an ONNX file to any format of the table that is written here, by the steps that lead there."""

from __future__ import annotations

import importlib
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bpkd_sdk.errors import check_choice
from bpkd_sdk.export.onnx import to_onnx
from bpkd_sdk.export.quantize import quantize
from bpkd_sdk.models import load_model
from bpkd_sdk.runtime.formats import FORMATS, Format, find_format

Step = Callable[..., Any]


def convert(source: str | Path, target: str | Path, *, precision: str | None = None, **options: Any) -> list[Any]:
    """Write a file of the format that the target's suffix says, with the files between in a temporary folder.

    A checkpoint goes through `to_onnx`; for "int8" the ONNX file goes through `quantize`; then, if the target is no
    ONNX file, through the exporter that the table of formats names.

    Args:
        source: A checkpoint, or an ONNX file of `to_onnx` (or `quantize`, for an engine).
        target: The file to write.
        precision: One of the format's; None: that of an ONNX file given, otherwise "fp32".
        options: Keyword arguments of those steps.

    Returns:
        The report of each step.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: For a format that is not written here, an option that no step takes, or one that a step lacks;
            and as the steps.
        RuntimeError: As the steps.
    """
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"There is no file {source} to export.")
    steps = plan(source, str(target), precision)
    if precision in ("fp32", "fp16"):
        options["precision"] = precision
    target = Path(target)
    _check(steps, options, f"from {source.name} to {target.name}")
    reports: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        reached: Any = source if source.suffix == ".onnx" else load_model(source)
        for index, step in enumerate(steps):
            path = target if step is steps[-1] else Path(folder) / f"{index}.onnx"
            own = {name: value for name, value in options.items() if name in inspect.signature(step).parameters}
            reports.append(step(reached, path, **own))
            reached = reports[-1].path
    return reports


def written_formats() -> list[Format]:
    """The formats whose files are written here; a checkpoint is `save_model`'s, a server's repository `to_triton`'s."""
    return [format_ for format_ in FORMATS if format_.exporter and not format_.suffixes[0].endswith("://")]


def plan(source: Path, target: str, precision: str | None) -> list[Step]:
    """The functions that lead from a source to a target."""
    wanted = find_format(target)
    if wanted not in written_formats() or wanted.exporter is None:
        suffixes = [suffix for format_ in written_formats() for suffix in format_.suffixes]
        raise ValueError(
            f"{target} is of the format {wanted.name}, which export does not write; it writes {', '.join(suffixes)}. "
            "A checkpoint comes from train, distill or import, a Triton model repository from `bpkd triton`."
        )
    if precision is not None:
        check_choice("precision", precision, wanted.precisions)
    module, _, name = wanted.exporter.partition(":")
    last: Step = getattr(importlib.import_module(module), name)
    is_onnx = source.suffix == ".onnx"
    if is_onnx and precision in ("fp32", "fp16"):
        raise ValueError(
            f"{source} is an ONNX file and keeps its own precision. Leave `precision` out (or pass 'int8' to quantize "
            "it), or export from the checkpoint."
        )
    steps = ([] if is_onnx else [to_onnx]) + ([quantize] if precision == "int8" else [])
    steps += [] if last is to_onnx else [last]
    if not steps:
        raise ValueError(f"{source} is an ONNX file already. Pass precision='int8', or an engine as the target.")
    return steps


def _check(steps: list[Step], options: dict[str, Any], what: str) -> None:
    """Raise ValueError for an option that no step takes, or that helps none, or one that is needed and not there."""
    names = ", then ".join(step.__name__ for step in steps)
    taken: dict[str, inspect.Parameter] = {}
    for step in steps:
        taken |= {name: p for name, p in inspect.signature(step).parameters.items() if name not in ("path", "model")}
    if unknown := sorted(options.keys() - taken.keys()):
        raise ValueError(f"The way {what} is {names}, which takes no {', '.join(f'`{name}`' for name in unknown)}.")
    needed = [name for name, p in taken.items() if p.default is p.empty and name != "onnx_path"]
    if missing := [name for name in needed if name not in options]:
        raise ValueError(f"The way {what} is {names}, which needs {', '.join(f'`{name}`' for name in missing)}.")
    if options.get("force") and len(steps) > 1:
        raise ValueError(
            f"The way {what} is {names}. force=True keeps an ONNX file that disagrees with torch, of which nothing "
            "more is made. Leave `force` out, or export to an ONNX file in fp32 or fp16."
        )
