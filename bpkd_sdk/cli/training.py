"""Commands that train: bpkd quickstart, train, distill, teach and compare."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import shlex
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import docstring_parser
import typer

from bpkd_sdk.cli.command import command
from bpkd_sdk.cli.common import (
    DATA,
    MACHINE,
    OPTIMISATION,
    OUTPUT,
    TEACHER,
    ClassMapFile,
    Data,
    Output,
    Resume,
    Root,
    add_options,
    announce_loading,
    check_output,
    check_sources,
    console,
    export_command,
    is_main_process,
    open_splits,
    parse_base_size,
    parse_size,
    read_class_map,
    selects_files,
)
from bpkd_sdk.data.names import SHAPES
from bpkd_sdk.training.config import CACHE_OPTIONS, TEACHER_OPTIONS, TrainingConfig


@command("bpkd quickstart", "bpkd quickstart my_run --data my_data")
@selects_files
def quickstart(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder for the runs and the report.")] = Path("quickstart"),
    data: Annotated[str, typer.Option(help="'shapes', or the path of a folder of your images.")] = "shapes",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint or name of the teacher. Default: the included one, or one trained on your images."
        ),
    ] = None,
    selection: dict[str, Any],
) -> None:
    """Train a student alone and with BPKD, and write a report.

    It takes minutes on a CPU, and downloads nothing. With --data, your images are resized to about 192x256
    pixels, and a teacher is trained first unless one is given.
    """
    if data != SHAPES and not Path(data).is_dir():
        raise FileNotFoundError(f"There is no folder {data}. --data takes '{SHAPES}', or a folder of your images.")
    check_sources([teacher], [data])
    check_output(folder, data, None, resume=True)
    from bpkd_sdk.quickstart import quickstart as run

    try:
        run(folder, data=data, teacher=teacher, **selection)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("the same command continues the quickstart") from stop


TransformOption = Annotated[
    str,
    typer.Option(
        "--transform",
        help="Augmentation: paper (scale, crop, flip, colours), light (without colours) or none (crop only).",
        rich_help_panel=DATA,
    ),
]


def training_options(command: Callable[..., None], *, without: Collection[str] = ()) -> Callable[..., None]:
    """Decorate a command with one option per field of `TrainingConfig`, which it receives in the dict `options`.

    Args:
        command: Function with a parameter `options`.
        without: Names of fields that get no option.
    """
    types = get_type_hints(TrainingConfig)
    docs = docstring_parser.parse(TrainingConfig.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    help_texts = {entry.arg_name: _help_text(entry.arg_name, entry.description or "") for entry in docs.params}
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=_option(field.name, types[field.name], help_texts.get(field.name)),
        )
        for field in dataclasses.fields(TrainingConfig)
        if field.name not in without
    ]

    @functools.wraps(command)
    def with_parsed(**arguments: Any) -> None:
        options = arguments["options"]
        parsed: dict[str, Any] = {
            "crop_size": parse_size(options["crop_size"], "--crop-size"),
            "base_size": parse_base_size(options["base_size"], "--base-size"),
        }
        if "class_weights" in options:
            parsed["class_weights"] = _parse_class_weights(options["class_weights"])
        if "teacher_augment" in options:
            parsed["teacher_augment"] = tuple(map(_number, options["teacher_augment"]))
            for name in ("teacher_mean", "teacher_std"):
                parsed[name] = _parse_numbers(options[name], f"--{name.replace('_', '-')}")
        command(**arguments | {"options": options | parsed})

    return add_options(with_parsed, "options", parameters)


def _help_text(name: str, description: str) -> str:
    """Return the description of a field with the options of the command in place of values of Python."""
    text = re.sub(r"; see `bpkd_sdk[^`]*`| \(see `bpkd_sdk[^`]*`\)", "", " ".join(description.split()))
    text = text.replace("(height, width)", "HEIGHTxWIDTH").replace("(longer side, shorter side)", "LONGERxSHORTER")
    text = text.replace("False uses", f"--no-{name.replace('_', '-')} uses").replace("None:", "default:")
    return re.sub(r"`(\w+)`", lambda match: f"--{match[1].replace('_', '-')}", text)


def _number(text: str) -> str | float:
    """Return the number that a text states, or the text if it is none."""
    try:
        return float(text)
    except ValueError:
        return text


# Fields in the panels of the help; further ones that only a teacher uses, and all others.
_PANELS = {
    DATA: ("base_size", "check_data", "crop_size", "match_classes", "max_class_share", "scale", "workers"),
    TEACHER: ("student_feature", *TEACHER_OPTIONS),
    MACHINE: ("channels_last", "compile", "device", "precision"),
    OUTPUT: ("boundary_width", "checkpoint_every", "evaluate_every", "log_every", "trackers"),
}
_NUMBERS = "NUMBER,NUMBER,..."
# Options that are texts, which `training_options` parses, and options that can be repeated: typer supports neither
# unions of numbers nor tuples of any length.
_TEXTS = {
    "base_size": "LONGERxSHORTER",
    "class_weights": f"balanced|{_NUMBERS}",
    "crop_size": "HEIGHTxWIDTH",
    "teacher_mean": _NUMBERS,
    "teacher_std": _NUMBERS,
}
_LISTS = {"losses": "NAME[:WEIGHT]", "teacher_augment": "flip|NUMBER", "trackers": "NAME"}


def _option(name: str, field_type: Any, help_text: str | None) -> Any:
    panel = next((panel for panel, names in _PANELS.items() if name in names), OPTIMISATION)
    types = {"boundary_width": float, **dict.fromkeys(_LISTS, list[str]), **dict.fromkeys(_TEXTS, str | None)}
    metavar = ({"scale": "LOWEST HIGHEST"} | _TEXTS | _LISTS).get(name)
    help_text = f"{help_text} Repeat the option for several." if name in _LISTS else help_text
    option = typer.Option(help=help_text, metavar=metavar, rich_help_panel=panel)
    return Annotated[types.get(name, field_type), option]


def _parse_class_weights(text: str | None) -> str | tuple[float, ...] | None:
    return text if text == "balanced" else _parse_numbers(text, "--class-weights", "'balanced', or ")


def _parse_numbers(text: str | None, option: str, other: str = "") -> tuple[float, ...] | None:
    """Parse numbers from a text like 1,2.5,4; None stays None, other texts raise ValueError."""
    if text is None:
        return None
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise ValueError(f"Expected {option} to be {other}numbers as in 1,2.5,4, but got {text!r}.") from error


@command("bpkd train smp/FPN/mobilenet_v2 --data my_data --output runs/student")
@partial(training_options, without=TEACHER_OPTIONS)
@selects_files
def train(
    *,
    model: Annotated[str, typer.Argument(help="Name such as smp/DeepLabV3Plus/mobilenet_v2, or path of a checkpoint.")],
    data: Data = "shapes",
    root: Root = None,
    transform: TransformOption = "paper",
    output: Output = None,
    resume: Resume = False,
    selection: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Train a network on labelled images."""
    check_sources([model], [data], root, names=True)
    check_output(output, data, root, resume=resume)
    announce_loading()
    import bpkd_sdk

    result = bpkd_sdk.train(
        model, open_splits(data, root, selection), transform=transform, output_dir=output, resume=resume, **options
    )
    _print_next(result, "model.onnx")


@command("bpkd distill runs/teacher smp/FPN/mobilenet_v2 --data my_data")
@training_options
@selects_files
def distill(
    *,
    teacher: Annotated[
        str,
        typer.Argument(
            help="Path of a checkpoint (.safetensors, or .pth of OpenMMLab), or name: transformers/<folder or id>; for "
            "methods on logits also .onnx, .engine."
        ),
    ],
    student: Annotated[str, typer.Argument(help="Name such as smp/FPN/mobilenet_v2, or path of a checkpoint.")],
    data: Data = "shapes",
    root: Root = None,
    transform: TransformOption = "paper",
    method: Annotated[
        list[str],
        typer.Option(
            help="bpkd, bpkd_paper, cwd, skds, ifvd, cirkd, canonical or dist; repeat the option to combine them.",
            rich_help_panel=TEACHER,
        ),
    ] = ["bpkd"],  # noqa: B006  (typer requires a list)
    class_map: ClassMapFile = None,
    output: Output = None,
    resume: Resume = False,
    selection: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Train a student on labels and on the outputs of a teacher."""
    check_sources([teacher, student], [data], root, names=True)
    check_output(output, data, root, resume=resume)
    classes = read_class_map(class_map)
    announce_loading()
    import bpkd_sdk

    result = bpkd_sdk.distill(
        teacher,
        student,
        open_splits(data, root, selection),
        method=method if len(method) > 1 else method[0],
        class_map=classes,
        transform=transform,
        output_dir=output,
        resume=resume,
        **options,
    )
    _print_next(result, "student.onnx")


@command("bpkd teach runs/teacher cache --data my_data --crop-size 384x384")
@partial(
    training_options,
    without=[field.name for field in dataclasses.fields(TrainingConfig) if field.name not in CACHE_OPTIONS],
)
@selects_files
def teach(
    *,
    teacher: Annotated[str, typer.Argument(help="Checkpoint, exported file or name, as for `bpkd distill`.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the cache: new, empty, or with a part of this cache.")],
    data: Data = "shapes",
    root: Root = None,
    transform: TransformOption = "paper",
    features: Annotated[
        bool, typer.Option("--features", help="Keep the teacher's feature map too, for skds, ifvd and cirkd.")
    ] = False,
    class_map: ClassMapFile = None,
    selection: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Write a teacher's outputs for all training images once.

    `bpkd distill --teacher-cache FOLDER` then needs no time for the teacher. The same command continues after an
    interruption.
    """
    check_sources([teacher], [data], root, names=True)
    classes = read_class_map(class_map)
    announce_loading()
    import bpkd_sdk

    bpkd_sdk.teach(
        teacher,
        open_splits(data, root, selection),
        folder,
        transform=transform,
        features=features,
        class_map=classes,
        **options,
    )
    if is_main_process():
        command = ["bpkd", "distill", teacher, "STUDENT", "--data", data, "--teacher-cache", str(folder)]
        console.print(f"Next, with the same options of the data: {shlex.join(command)}", soft_wrap=True)


def _print_next(result: Any, name: str) -> None:
    """Print the command that exports the result of a run, whose scores and files the run has printed."""
    if is_main_process():
        command = export_command(result.checkpoint, name, result.model.provenance["crop_size"])
        console.print(f"Next: {command}", soft_wrap=True)


@command("bpkd compare --teacher runs/teacher --student pspnet_r18 --steps 1000")
@partial(training_options, without=("steps", "seed", "labels"))
@selects_files
def compare(
    *,
    teacher: Annotated[
        str,
        typer.Option(
            help="Path of a checkpoint (.safetensors, or .pth of OpenMMLab), or name: transformers/<folder or id>; for "
            "methods on logits also .onnx, .engine."
        ),
    ],
    student: Annotated[
        str, typer.Option(help="Name such as smp/FPN/mobilenet_v2, or path of a checkpoint to start from.")
    ],
    steps: Annotated[int | None, typer.Option(help="Budget of each run in steps; or pass --seconds.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Budget of each run in seconds of training; or pass --steps.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="'all', or names separated by commas; bpkd+cwd combines two methods.")
    ] = "all",
    seeds: Annotated[int, typer.Option(help="Number of runs of each method.")] = 3,
    class_map: ClassMapFile = None,
    data: Data = "shapes",
    root: Root = None,
    transform: TransformOption = "paper",
    output: Annotated[Path, typer.Option(help="Folder of all runs; repeat the same command to resume.")] = Path(
        "runs/comparison"
    ),
    selection: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Compare distillation methods under one budget.

    A table and a plot are written to the output folder.
    """
    check_sources([teacher], [data], root)
    check_sources([student], names=True)
    check_output(output, data, root, resume=True)
    classes = read_class_map(class_map)
    announce_loading()
    import bpkd_sdk

    comparison = bpkd_sdk.compare(
        teacher,
        student,
        open_splits(data, root, selection),
        methods=methods,
        transform=transform,
        steps=steps,
        seconds=seconds,
        seeds=seeds,
        class_map=classes,
        output_dir=output,
        **options,
    )
    console.print(comparison)
    console.print(f"Table, plot and runs: {output}", soft_wrap=True)
