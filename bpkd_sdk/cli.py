"""The command `bpkd`: a thin skin over the public API."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Boundary-privileged knowledge distillation for semantic segmentation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

Data = Annotated[str, typer.Option(help="'shapes', 'folder' or 'camvid'; or the path of a folder.")]
Root = Annotated[Path | None, typer.Option(help="Where a named data set lies.")]
Output = Annotated[Path | None, typer.Option(help="Folder of the run; by default a new one below runs/.")]
Resume = Annotated[bool, typer.Option(help="Go on with the run in the output folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run the command; errors of the user's making end with one clear message instead of a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        errors.print(f"[bold red]Error:[/] {type(error).__name__}:", end=" ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        errors.print(f"Interrupted: {interrupt or 'nothing was being trained'}.", markup=False, highlight=False)
        sys.exit(130)


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Argument(help="Where runs and report go.")] = Path("quickstart"),
) -> None:
    """Train a teacher and two students on generated scenes, export one, and write a report: a few minutes on a CPU."""
    from bpkd_sdk.quickstart import quickstart as run

    run(folder)


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of `TrainingConfig`; it gets them together as `options`."""
    from bpkd_sdk.training.config import TrainingConfig

    hints = get_type_hints(TrainingConfig)
    added = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_option(field, hints)
        )
        for field in dataclasses.fields(TrainingConfig)
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

    described = re.search(rf"^ +{field.name}: (.+)$", TrainingConfig.__doc__ or "", re.MULTILINE)
    help_text = described[1] if described else None
    if field.name == "crop_size":
        return Annotated[str | None, typer.Option(help=help_text, metavar="HEIGHTxWIDTH")]
    kind = float if field.name == "boundary_width" else hints[field.name]
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

    options["crop_size"] = _size(options["crop_size"])
    result = bpkd_sdk.train(model, _splits(data, root), output_dir=output, resume=resume, **options)
    _print_result(result)


@app.command()
@training_options
def distill(
    *,
    teacher: Annotated[str, typer.Argument(help="A checkpoint, ours or an OpenMMLab .pth.")],
    student: Annotated[str, typer.Argument(help="A name such as smp/FPN/mobilenet_v2, or a checkpoint.")],
    data: Data = "shapes",
    root: Root = None,
    method: Annotated[str, typer.Option(help="bpkd, bpkd_paper, cwd, skds, ifvd, cirkd or canonical.")] = "bpkd",
    output: Output = None,
    resume: Resume = False,
    options: dict[str, Any],
) -> None:
    """Train a student on labelled images and on what a teacher makes of them."""
    import bpkd_sdk

    options["crop_size"] = _size(options["crop_size"])
    result = bpkd_sdk.distill(
        teacher, student, _splits(data, root), method=method, output_dir=output, resume=resume, **options
    )
    _print_result(result)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A checkpoint or an exported ONNX file.")],
    data: Data = "shapes",
    root: Root = None,
    split: Annotated[str, typer.Option(help="Of the data set.")] = "val",
    boundary_width: Annotated[float, typer.Option(help="Pixels, or a share of the diagonal below 1.")] = 3,
    window: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH of a sliding window; by default whole images.")
    ] = None,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', ...")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Score a network on a data set: regions, boundaries, edges and bodies apart, class by class."""
    import bpkd_sdk

    metrics = bpkd_sdk.evaluate(
        model,
        bpkd_sdk.open_dataset(data, root, split),
        mode="slide" if window else "whole",
        crop_size=_size(window),
        boundary_width=boundary_width,
        device=device,
    )
    if as_json:
        print(json.dumps(metrics.to_dict(), indent=1))  # noqa: T201
        return
    _print_metrics(metrics)
    table = Table("class", "IoU", "accuracy", "boundary IoU")
    columns = (metrics.per_class_iou, metrics.per_class_accuracy, metrics.per_class_boundary_iou)
    for name, *scores in zip(metrics.class_names, *columns, strict=True):
        table.add_row(name, *(f"{score:.3f}" for score in scores))
    console.print(table)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A name or a checkpoint.")],
    classes: Annotated[int, typer.Option(help="For a name.")] = 19,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the input.")] = "512x512",
    as_json: AsJson = False,
) -> None:
    """Count parameters, multiply-accumulates and activations of a network."""
    import bpkd_sdk
    from bpkd_sdk.models import CHECKPOINT_SUFFIXES, open_checkpoint

    is_file = Path(model).suffix in CHECKPOINT_SUFFIXES
    network = open_checkpoint(model) if is_file else bpkd_sdk.create_model(model, classes)
    cost = bpkd_sdk.profile(network, _size(size) or (512, 512))
    facts = {
        "params": cost.params,
        "macs": cost.macs,
        "flops": cost.flops,
        "paper_macs": cost.paper_macs,
        "activations": cost.activations,
        "activation_bytes": cost.activation_bytes,
    }
    if as_json:
        print(json.dumps(facts | {"by_operator": cost.by_operator, "not_counted": cost.not_counted}))  # noqa: T201
        return
    table = Table("count", "value", title=f"{model} at {size}", title_justify="left")
    for name, value in facts.items():
        table.add_row(name, f"{value:,}")
    console.print(table)
    console.print(
        f"macs: convolutions, linear layers and matrix products. Not counted: {', '.join(cost.not_counted)}.",
        soft_wrap=True,
    )


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the paper's networks, with their cost counted from the networks and the paper's own figures."""
    from bpkd_sdk.evaluation.zoo_table import measured_zoo

    with errors.status("Counting"):
        rows = list(measured_zoo())
    if as_json:
        print(json.dumps([vars(row) for row in rows], indent=1))  # noqa: T201
        return
    table = Table(title="150 classes, 512x512, counted as in the paper (BPKD, table 1)", title_justify="left")
    table.add_column("network", no_wrap=True)
    for heading in ("params", "paper", "GFLOPs", "paper", "plain GMACs", "stride"):
        table.add_column(heading, justify="right")
    for row in rows:
        paper = ("-", "-") if row.paper_params is None else (f"{row.paper_params:.2f} M", f"{row.paper_gflops:.2f}")
        params, gflops = f"{row.params / 1e6:.2f} M", f"{row.paper_macs / 1e9:.2f}"
        table.add_row(row.name, params, paper[0], gflops, paper[1], f"{row.macs / 1e9:.2f}", str(row.stride))
    console.print(table)
    console.print("All architectures and encoders of segmentation-models-pytorch go by smp/<Architecture>/<encoder>.")


@app.command("import")
def import_(
    official: Annotated[Path, typer.Argument(help="An OpenMMLab .pth, also of a distilled student.")],
    path: Annotated[Path, typer.Argument(help="Of the checkpoint to write, ending in .safetensors.")],
) -> None:
    """Turn an OpenMMLab checkpoint into one of ours; its pickle is read without executing anything."""
    import bpkd_sdk
    from bpkd_sdk.models.openmmlab import load_openmmlab, read_openmmlab

    content = read_openmmlab(official)
    network = load_openmmlab(official, aux_head=content.has_aux_head)
    bpkd_sdk.save_model(network, path, training={"imported_from": official.name})
    console.print(f"{path}: {network.spec.name}, {network.spec.num_classes} classes", soft_wrap=True)
    if content.left_out:
        console.print(f"Left out, as they belong to no network: {len(content.left_out)} entries")
        for key in content.left_out[:10]:
            console.print(f"  {key}", markup=False, highlight=False)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of train or distill.")],
    path: Annotated[Path, typer.Argument(help="Of the ONNX file to write.")],
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the images.")],
    precision: Annotated[str, typer.Option(help="'fp32' or 'fp16'.")] = "fp32",
    dynamic_batch: Annotated[bool, typer.Option(help="Take any number of images at once.")] = True,
    preprocess: Annotated[bool, typer.Option(help="Take uint8 RGB images and normalise inside.")] = True,
    argmax: Annotated[bool, typer.Option(help="Return masks instead of logits.")] = True,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
) -> None:
    """Write an ONNX file, compare it with torch, and keep it only if the two agree."""
    import bpkd_sdk
    from bpkd_sdk.export import to_onnx

    options: dict[str, Any] = {"precision": precision, "preprocess": preprocess, "argmax": argmax, "opset": opset}
    with errors.status("Exporting and comparing with torch"):
        network = bpkd_sdk.load_model(checkpoint)
        report = to_onnx(network, path, input_size=_size(size) or (0, 0), dynamic_batch=dynamic_batch, **options)
    console.print(f"{report.path}: {report.size / 1e6:.2f} MB, {report.agreement:.4%} of the pixels as in torch")


@app.command()
def doctor() -> None:
    """Say what this machine has: torch, CUDA, ONNX Runtime, TensorRT; and what to install for what is missing."""
    from bpkd_sdk.doctor import examine

    table = Table("part", "found", "what to do")
    for finding in examine():
        table.add_row(finding.part, finding.found, finding.advice)
    console.print(table)


def _splits(data: str, root: Path | None) -> Any:
    import bpkd_sdk

    return tuple(bpkd_sdk.open_dataset(data, root, split) for split in ("train", "val"))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise ValueError(f"Expected a size like 512x1024 (height x width), but got {text!r}.")
    return int(height), int(width)


def _print_result(result: Any) -> None:
    if result.metrics is not None:
        _print_metrics(result.metrics)
    console.print(f"Checkpoint: {result.checkpoint}", soft_wrap=True)


def _print_metrics(metrics: Any) -> None:
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


if __name__ == "__main__":
    main()
