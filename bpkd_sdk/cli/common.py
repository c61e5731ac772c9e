"""Common parts of the commands: the application, the consoles, shared options, and tables of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="Boundary-privileged knowledge distillation for semantic segmentation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

DATA_HELP = "Path of a folder, or name: shapes, folder, camvid, cityscapes, ade20k, pascal_context_59."

Data = Annotated[str, typer.Option(help=DATA_HELP)]
MatchClasses = Annotated[
    bool,
    typer.Option(help="Match the classes of network and data by name and refuse other names, or match by position."),
]
Root = Annotated[Path | None, typer.Option(help="Folder of a named data set.")]
Output = Annotated[Path | None, typer.Option(help="Folder of the run. Default: a new folder in runs/.")]
Resume = Annotated[bool, typer.Option(help="Continue the run in the output folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def open_splits(data: str, root: Path | None) -> Any:
    """Open the training and validation splits of a data set."""
    import bpkd_sdk

    return tuple(bpkd_sdk.open_dataset(data, root=root, split=split) for split in ("train", "val"))


def is_main_process() -> bool:
    """Return whether this is the main process of `accelerate launch`, which is the only one that prints."""
    from accelerate.state import PartialState

    return bool(PartialState().is_main_process)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse a size such as "512x1024" into (height, width); return None for None.

    Raises:
        ValueError: If the text is not a size.
    """
    if text is None:
        return None
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise ValueError(f"Expected a size like 512x1024 (height x width), but got {text!r}.")
    return int(height), int(width)


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
        table.add_row(escape(name), *(f"{score:.3f}" for score in scores))
    console.print(table)
