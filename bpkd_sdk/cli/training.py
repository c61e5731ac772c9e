"""bpkd quickstart, train, distill."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from bpkd_sdk.cli.common import (
    Data,
    Output,
    Resume,
    Root,
    app,
    console,
    is_main_process,
    open_splits,
    parse_size,
    print_metrics,
)


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Argument(help="Where runs and report go.")] = Path("quickstart"),
) -> None:
    """Train a teacher and two students on generated scenes, export one, and write a report: a few minutes on a CPU."""
    from bpkd_sdk.quickstart import quickstart as run

    run(folder)


def training_options(command: Callable[..., None], *, without: Collection[str] = ()) -> Callable[..., None]:
    """Give a command an option for each other field of `TrainingConfig`; it gets them together as `options`."""
    from bpkd_sdk.training.config import TrainingConfig

    hints = get_type_hints(TrainingConfig)
    added = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_option(field, hints)
        )
        for field in dataclasses.fields(TrainingConfig)
        if field.name not in without
    ]

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        options = {parameter.name: arguments.pop(parameter.name) for parameter in added}
        command(**arguments, options=options)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
    wrapper.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return wrapper


def _option(field: dataclasses.Field[Any], hints: dict[str, Any]) -> Any:
    from bpkd_sdk.training.config import TrainingConfig

    described = re.search(rf"^( +){field.name}: (.+(?:\n\1 .+)*)$", TrainingConfig.__doc__ or "", re.MULTILINE)
    help_text = " ".join(described[2].split()) if described else None
    if field.name == "crop_size":
        return Annotated[str | None, typer.Option(help=help_text, metavar="HEIGHTxWIDTH")]
    kind = {"boundary_width": float, "trackers": list[str]}.get(field.name, hints[field.name])
    return Annotated[kind, typer.Option(help=help_text)]


@app.command()
@training_options
def train(
    *,
    model: Annotated[str, typer.Argument(help="A name such as smp/DeepLabV3Plus/mobilenet_v2, or a checkpoint.")],
    data: Data = "shapes",
    root: Root = None,
    output: Output = None,
    resume: Resume = False,
    options: dict[str, Any],
) -> None:
    """Train a network on labelled images."""
    import bpkd_sdk

    options["crop_size"] = parse_size(options["crop_size"])
    result = bpkd_sdk.train(model, open_splits(data, root), output_dir=output, resume=resume, **options)
    _print_result(result)


@app.command()
@training_options
def distill(
    *,
    teacher: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, ours or an OpenMMLab .pth; for methods on logits also a .onnx or .engine file."
        ),
    ],
    student: Annotated[str, typer.Argument(help="A name such as smp/FPN/mobilenet_v2, or a checkpoint.")],
    data: Data = "shapes",
    root: Root = None,
    method: Annotated[
        list[str], typer.Option(help="bpkd, bpkd_paper, cwd, skds, ifvd, cirkd or canonical. Several may be given.")
    ] = ["bpkd"],  # noqa: B006  (typer's way to say a default)
    output: Output = None,
    resume: Resume = False,
    options: dict[str, Any],
) -> None:
    """Train a student on labelled images and on what a teacher makes of them."""
    import bpkd_sdk

    options["crop_size"] = parse_size(options["crop_size"])
    result = bpkd_sdk.distill(
        teacher,
        student,
        open_splits(data, root),
        method=method if len(method) > 1 else method[0],
        output_dir=output,
        resume=resume,
        **options,
    )
    _print_result(result)


def _print_result(result: Any) -> None:
    if not is_main_process():
        return
    if result.metrics is not None:
        print_metrics(result.metrics)
    console.print(f"Checkpoint: {result.checkpoint}", soft_wrap=True)
