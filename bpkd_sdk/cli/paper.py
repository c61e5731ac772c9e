"""The commands data check, data convert and reproduce."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bpkd_sdk.cli.command import app, command
from bpkd_sdk.cli.common import (
    Output,
    Resume,
    Root,
    check_output,
    check_sources,
    console,
    is_main_process,
    parse_base_size,
    parse_size,
    print_classes,
    print_metrics,
    read_class_map,
    selects_files,
)
from bpkd_sdk.progress import working

data_app = typer.Typer(
    help="Check data sets, and convert annotations to masks.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")


@command("bpkd data check my_data", "bpkd data check cityscapes --root datasets/cityscapes", name="check", to=data_app)
@selects_files
def check(
    *,
    data: Annotated[
        str, typer.Argument(help="Path of a folder, or name: camvid, cityscapes, ade20k or pascal_context_59.")
    ],
    root: Root = None,
    selection: dict[str, Any],
) -> None:
    """Read every file of a data set; check counts, sizes and labels.

    The exit code is 1 if there are problems.
    """
    check_sources(data=[data], root=root)
    from bpkd_sdk.data import check_dataset
    from bpkd_sdk.errors import format_list

    reports = check_dataset(data, root, **selection)
    title = f"{data}; sizes are height x width"
    headings = ("split", "images", "expected", "smallest", "largest", "classes in no label", "problems")
    table = Table(*headings, title=title, title_justify="left")
    for report in reports:
        sizes = ("-" if size is None else f"{size[0]}x{size[1]}" for size in (report.smallest, report.largest))
        count, expected = ("-" if number is None else str(number) for number in (report.images, report.expected))
        absent = ", ".join(report.absent_classes[:3]) + (", ..." if len(report.absent_classes) > 3 else "")
        table.add_row(report.split, count, expected, *sizes, absent, str(len(report.problems)))
    console.print(table)
    for report in reports:
        if report.problems:
            console.print(f"{report.split}:\n{format_list(report.problems)}", soft_wrap=True)
    if any(report.problems for report in reports):
        raise typer.Exit(1)


@command("bpkd data convert instances.json my_data --images photos", name="convert", to=data_app)
@selects_files
def convert(
    *,
    source: Annotated[
        Path,
        typer.Argument(
            help="COCO .json, CVAT for images .xml, folder of LabelMe files, or folder of images and masks. Without "
            "PATH: folder VOC2010 with trainval_merged.json of PASCAL Context, or its parent."
        ),
    ],
    path: Annotated[Path | None, typer.Argument(help="Folder of the data set to write.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images. Default: that of the annotations.")] = None,
    split: Annotated[str, typer.Option(help="Split to write.")] = "train",
    class_map: Annotated[
        Path | None, typer.Option(help='JSON file such as {"vehicle": ["car", "truck"], "void": "sky"}.')
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Class of pixels without annotation, or void. Default: background.")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out annotations whose image is missing.")
    ] = False,
    selection: dict[str, Any],
) -> None:
    """Write annotations, or coloured masks, as id masks into a folder.

    The same command continues after an interruption. Without PATH: write the labels and lists of PASCAL
    Context from its release file.
    """
    if not source.exists():
        raise FileNotFoundError(f"There is no file or folder {source}.")
    from bpkd_sdk.data import convert_annotations, convert_pascal_context

    if path is None:
        try:
            top = convert_pascal_context(source)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} To convert other annotations, pass the folder to write as well: bpkd data convert {source} "
                "my_data"
            ) from error
        console.print(f"Labels and lists are in {top}", soft_wrap=True)
        return
    report = convert_annotations(
        source,
        path,
        split=split,
        images=images,
        class_map=read_class_map(class_map),
        background=background,
        skip_missing=skip_missing,
        **selection,
    )
    total = sum(report.class_pixels.values())
    table = Table("class", "images", "share of pixels", title=f"{report.images} images", title_justify="left")
    for name, count in report.class_images.items():
        table.add_row(name, str(count), f"{report.class_pixels[name] / total:.2%}")
    console.print(table)
    if report.background_only:
        console.print(f"{report.background_only} of {report.images} images have no annotated pixel.")
    console.print(f"{report.format} written to {path}, split {split}. Check it: bpkd data check {path}", soft_wrap=True)


@command("bpkd reproduce cityscapes/pspnet_r18 --dry-run")
def reproduce(
    row: Annotated[str, typer.Argument(help="Row of the table, DATASET/STUDENT, for example cityscapes/pspnet_r18.")],
    root: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Method: bpkd, cwd, skds, ifvd, cirkd (add _paper for the published weights), canonical, dist; or "
            "none, which trains without a teacher."
        ),
    ] = "bpkd_paper",
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint of the teacher; --dry-run prints its URL.")] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="File of the student's ImageNet backbone; imagenet: timm's weights."),
    ] = None,
    output: Output = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its estimated cost, and do not train.")
    ] = False,
    limit_steps: Annotated[int | None, typer.Option(help="Number of steps of a smoke run.")] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="Checkpoint or exported file to score by the row's protocol, without training.")
    ] = None,
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="NAME=VALUE", help="Option of `bpkd distill`; repeat for several options."),
    ] = [],  # noqa: B006  (typer needs a list)
) -> None:
    """Reproduce a score of the paper's table.

    The student is trained and scored, and the score is compared with the paper's.
    """
    check_sources([teacher, evaluate], ["folder"] if root else [], root)
    if not (dry_run or evaluate):
        check_output(output, "folder", root, resume=resume)
    from bpkd_sdk import recipes

    options = dict(map(_parse_option, set_))
    plan = recipes.make_plan(row, method, limit_steps=limit_steps, **options)
    if dry_run:
        _print_plan(plan)
        return
    if root is None:
        raise ValueError(f"{row} needs --root, the folder of {plan.recipe.dataset}.")
    if evaluate is not None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--evaluate scores in one process; start it without `accelerate launch`.")
        metrics = recipes.score_checkpoint(
            row, root, evaluate, device=plan.config.device, base_size=plan.protocol.base_size
        )
        print_classes(metrics)
        print_metrics(metrics)
        _print_scores(plan, recipes.Score(100 * metrics.miou, 100 * metrics.macc), None)
        return
    result = recipes.reproduce(
        row,
        root,
        method=method,
        teacher=teacher,
        backbone=backbone,
        limit_steps=limit_steps,
        output_dir=output,
        resume=resume,
        **options,
    )
    if not is_main_process():
        return
    print_classes(result.metrics)
    print_metrics(result.metrics)
    _print_scores(plan, result.ours, result.seconds_per_step)
    console.print(f"All results are in {result.output_dir}", soft_wrap=True)


def _parse_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"Expected --set NAME=VALUE, but got {text!r}.")
    name = name.replace("-", "_")
    if name == "crop_size":
        return name, parse_size(value, f"--set {name}")
    if name == "base_size":
        return name, parse_base_size(value, f"--set {name}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _print_plan(plan: Any) -> None:
    from bpkd_sdk.recipes import describe_plan, estimate

    table = Table("topic", title=f"{plan.recipe.name}, {plan.method}", title_justify="left")
    table.add_column("setting", overflow="fold")  # folds addresses, so that they can be copied
    for name, text in describe_plan(plan).items():
        table.add_row(name, text)
    with working("Counting operations and timing a small step"):
        cost = estimate(plan)
    if not is_main_process():
        return
    hours = cost.seconds_per_step * plan.config.steps / 3600
    table.add_row("arithmetic", f"{cost.step_macs / 1e12:.2f} T multiply-accumulates per step")
    table.add_row(
        "memory",
        f"{cost.weight_bytes / 2**30:.1f} GiB weights, gradients and momentum, and about "
        f"{cost.activation_bytes / 2**30:.1f} GiB activations in float32 (counted, without the method's own terms)",
    )
    table.add_row("time", f"{cost.seconds_per_step:.2f} s per step, {hours:.1f} h in total: {cost.timed}")
    if cost.processes > 1:
        table.add_row("processes", f"{cost.processes}; memory is per process, and time does not include communication")
    console.print(table)


def _print_scores(plan: Any, ours: Any, seconds_per_step: float | None) -> None:
    smoke = plan.limit_steps is not None and seconds_per_step is not None
    table = Table("", "mIoU", "mAcc", title=f"{plan.recipe.name}, percent", title_justify="left")
    for name, score in plan.recipe.paper.items():
        table.add_row(f"paper, {name}", f"{score.miou:.2f}", f"{score.macc:.2f}")
    label = f"ours, {plan.method_title}" if seconds_per_step is not None else "this network"
    table.add_row(f"{label} (smoke run, not a result)" if smoke else label, f"{ours.miou:.2f}", f"{ours.macc:.2f}")
    console.print(table)
    if smoke and seconds_per_step is not None:
        hours = seconds_per_step * plan.recipe.steps / 3600
        console.print(f"{seconds_per_step:.2f} s per step: {plan.recipe.steps} steps take {hours:.1f} h at this speed.")
