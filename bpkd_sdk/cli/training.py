"""bpkd quickstart, train, distill."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection
from functools import partial
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


@app.command()
@partial(training_options, without=("steps", "seed"))
def compare(
    *,
    teacher: Annotated[str, typer.Option(help="A checkpoint, ours or an OpenMMLab .pth.")],
    student: Annotated[str, typer.Option(help="A name such as smp/FPN/mobilenet_v2, or a checkpoint to start from.")],
    budget: Annotated[str, typer.Option(help="Of each run: steps=N, or seconds=S of training.")],
    methods: Annotated[
        str, typer.Option(help="'all', or names with commas between; bpkd+cwd is both together.")
    ] = "all",
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 3,
    data: Data = "shapes",
    root: Root = None,
    output: Annotated[Path, typer.Option(help="Folder of all runs; the same command goes on with it.")] = Path(
        "runs/comparison"
    ),
    options: dict[str, Any],
) -> None:
    """Distill a student by several methods, and train it alone, on equal terms: one table, one plot."""
    import bpkd_sdk

    options["crop_size"] = parse_size(options["crop_size"])
    comparison = bpkd_sdk.compare(
        teacher,
        student,
        open_splits(data, root),
        methods=methods,
        budget=budget,
        seeds=seeds,
        output_dir=output,
        **options,
    )
    console.print(comparison)
    console.print(f"Table, plot and runs: {output}", soft_wrap=True, highlight=False)
