"""Common parts of the commands: the consoles, shared options, and tables of scores."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from bpkd_sdk.data.names import check_data
from bpkd_sdk.files import check_no_run, find_network
from bpkd_sdk.progress import PlainConsole

console = PlainConsole()
errors = PlainConsole(stderr=True)

DATA_HELP = (
    "Path of your folder; or a name: shapes (generated scenes), or camvid, cityscapes, ade20k or pascal_context_59 "
    "with --root."
)

# Panels of the help.
DATA, OPTIMISATION, TEACHER, MACHINE, OUTPUT = "Data", "Optimisation", "Teacher and method", "Machine", "Output"

Data = Annotated[str, typer.Option(help=DATA_HELP, rich_help_panel=DATA)]
MatchClasses = Annotated[
    bool,
    typer.Option(
        help="Match the classes of network and data by name and refuse other names, or match by position.",
        rich_help_panel=DATA,
    ),
]
ClassMapFile = Annotated[
    Path | None,
    typer.Option(
        "--class-map",
        help="JSON file with the network's classes for each class of the data, for a network with other classes: "
        '{"road": ["road", "parking"], "background": "*"}.',
        rich_help_panel=DATA,
    ),
]
Root = Annotated[Path | None, typer.Option(help="Folder of a named data set.", rich_help_panel=DATA)]
SELECTION: dict[str, tuple[Any, Any]] = {
    "pattern": (
        Annotated[
            str | None,
            typer.Option(
                help="Paths of an image and its label in a folder, such as 'photos/{}.jpg:masks/{}.png'; {split} "
                "stands for train or val.",
                rich_help_panel=DATA,
            ),
        ],
        None,
    ),
    "val_share": (
        Annotated[
            float | None,
            typer.Option(help="Share of a folder's training images that becomes the val split.", rich_help_panel=DATA),
        ],
        None,
    ),
    "val_seed": (Annotated[int, typer.Option(help="Seed of the division by --val-share.", rich_help_panel=DATA)], 0),
    "skip_unlabelled": (
        Annotated[
            bool,
            typer.Option(
                "--skip-unlabelled", help="Leave out a folder's images without a label file.", rich_help_panel=DATA
            ),
        ],
        False,
    ),
}
Output = Annotated[
    Path | None, typer.Option(help="Folder of the run. Default: a new folder in runs/.", rich_help_panel=OUTPUT)
]
Resume = Annotated[bool, typer.Option(help="Continue the run in the output folder.", rich_help_panel=OUTPUT)]
Fit = Annotated[
    Literal["slide", "resize", "pad"],
    typer.Option(
        help="Images of a size that the file was not exported for: 'slide' (overlapping windows), 'resize', or 'pad'."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def add_options(
    command: Callable[..., None], argument: str, options: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """Return a command with further options, whose values it receives as a dict.

    Args:
        command: Function with a parameter that receives the dict.
        argument: Name of this parameter.
        options: Parameters of typer, keyword only.
    """

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        values = {option.name: arguments.pop(option.name) for option in options}
        command(**arguments, **{argument: values})

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != argument]
    wrapper.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return wrapper


def selects_files(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with the options of `open_dataset` for folders, which it receives in the dict `selection`."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in SELECTION.items()
    ]
    return add_options(command, "selection", parameters)


def check_sources(
    networks: Sequence[str | Path | None] = (),
    data: Sequence[str | None] = (),
    root: Path | None = None,
    files: Sequence[Path] = (),
    *,
    names: bool = False,
) -> None:
    """Check that all that a command reads exists, before the packages are imported, which takes seconds.

    Args:
        networks: Paths, addresses or names of networks; None is left out.
        data: Paths or names of data sets; None is left out.
        root: Folder of the named data sets.
        files: Paths of other files.
        names: Whether networks may be names such as "pspnet_r18".

    Raises:
        FileNotFoundError: If a file or a folder does not exist.
        ValueError: If there is no data set of a name.
    """
    for path in data:
        if path is not None:
            check_data(path, root)
    for network in networks:
        if network is not None:
            find_network(network, names=names)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}.")


def check_output(output: Path | None, data: str, root: Path | None, *, resume: bool) -> None:
    """Check the folder of a run before the packages are imported.

    Raises:
        ValueError: If it is the folder of the data.
        FileExistsError: If it contains a run that is not to be resumed.
    """
    folder = root or Path(data)
    if output is not None and output.resolve() == folder.resolve() and folder.is_dir():
        raise ValueError(f"{output} is the folder of the data. Write the run to another folder, such as runs/student.")
    if output is not None and not resume:
        check_no_run(output)


def announce_loading() -> None:
    """Print that libraries are loaded, which takes seconds; of the processes of a launcher, only the first prints."""
    if int(os.environ.get("RANK", 0)) == 0:
        errors.print("Loading the libraries")


def open_splits(data: str, root: Path | None, selection: Mapping[str, Any]) -> Any:
    """Open the training and validation splits of a data set."""
    import bpkd_sdk

    train, val = (bpkd_sdk.open_dataset(data, root=root, split=split, **selection) for split in ("train", "val"))
    if selection["val_share"] is not None and int(os.environ.get("RANK", 0)) == 0:
        errors.print(f"Validation: {len(val)} of {len(train) + len(val)} images of {data}.", soft_wrap=True)
    return train, val


def read_class_map(path: Path | None) -> Any:
    """Read the file of --class-map; return None for None.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a JSON object, or contains a key twice.
    """
    if path is None:
        return None
    from bpkd_sdk.files import read_json

    if not path.is_file():
        raise FileNotFoundError(
            f'There is no file {path}. --class-map takes a file with a JSON object such as {{"road": ["road", "way"]}}.'
        )
    content = read_json(path, unique_keys=True)
    if not isinstance(content, dict):
        raise ValueError(f'Expected {path} to contain a JSON object such as {{"road": ["road", "parking"]}}.')
    return content


def is_main_process() -> bool:
    """Return whether this is the main process of `accelerate launch`, which is the only one that prints."""
    from accelerate.state import PartialState

    return bool(PartialState().is_main_process)


def parse_size(text: str | None, option: str) -> tuple[int, int] | None:
    """Parse a size such as "512x1024" into (height, width); return None for None.

    Args:
        text: Value of an option.
        option: Option that the error message names.

    Raises:
        ValueError: If the text is not a size.
    """
    if text is None:
        return None
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"Expected {option} to be HEIGHTxWIDTH, such as 512x1024, but got {text!r}.")
    return int(height), int(width)


def parse_base_size(text: str | None, option: str) -> tuple[int, int] | None:
    """Parse the sides of a rectangle in any order, such as "2048x1024", into (longer, shorter); return None for None.

    Args:
        text: Value of an option.
        option: Option that the error message names.

    Raises:
        ValueError: If the text is not a size.
    """
    size = parse_size(text, option)
    return size and (max(size), min(size))


def export_command(model: str | Path, output: str | Path, size: Sequence[int]) -> str:
    """Return the command that exports a checkpoint for images of a size (height, width)."""
    return shlex.join(["bpkd", "export", str(model), str(output), "--input-size", "x".join(map(str, size))])


def print_json(content: Any) -> None:
    """Print plain values as JSON, without the line breaks that the console adds."""
    print(json.dumps(content, indent=1))  # noqa: T201


def print_metrics(metrics: Any) -> None:
    """Print the scores of a `bpkd_sdk.Metrics`."""
    scores = {
        "mIoU": metrics.miou,
        "mAcc": metrics.macc,
        "pixel accuracy": metrics.pixel_accuracy,
        "boundary IoU": metrics.boundary_iou,
        "boundary F1": metrics.boundary_f1,
        "edge accuracy": metrics.edge_accuracy,
        "body accuracy": metrics.body_accuracy,
    }
    table = Table("score", "value", title=f"{metrics.images} images", title_justify="left")
    for name, score in scores.items():
        table.add_row(name, f"{score:.4f}")
    console.print(table)


def print_classes(metrics: Any) -> None:
    """Print the scores of each class of a `bpkd_sdk.Metrics`."""
    table = Table("class", "IoU", "accuracy", "boundary IoU")
    columns = (metrics.per_class_iou, metrics.per_class_accuracy, metrics.per_class_boundary_iou)
    for name, *scores in zip(metrics.class_names, *columns, strict=True):
        table.add_row(name, *(f"{score:.3f}" for score in scores))
    console.print(table)
