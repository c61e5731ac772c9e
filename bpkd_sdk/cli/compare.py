"""bpkd compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bpkd_sdk.cli.common import Data, Root, app, console, open_splits, parse_size
from bpkd_sdk.cli.training import training_options


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
