"""The commands evaluate, profile, inspect, models and import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bpkd_sdk.cli.command import command
from bpkd_sdk.cli.common import (
    DATA_HELP,
    AsJson,
    ClassMapFile,
    Fit,
    MatchClasses,
    Root,
    announce_loading,
    check_sources,
    console,
    errors,
    parse_base_size,
    parse_size,
    print_classes,
    print_json,
    print_metrics,
    read_class_map,
    selects_files,
)
from bpkd_sdk.data.names import NAMES, SHAPES
from bpkd_sdk.files import find_network, read_facts
from bpkd_sdk.progress import working


@command("bpkd evaluate runs/student --data my_data")
@selects_files
def evaluate(
    *,
    model: Annotated[
        str, typer.Argument(help="Path of a checkpoint or of an exported file, or name such as transformers/<folder>.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help=f"{DATA_HELP} Default: the data set of the training, if its name is in the file."),
    ] = None,
    root: Root = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    boundary_width: Annotated[
        float, typer.Option(help="Distance of the boundary scores: pixels, or a share of the diagonal if below 1.")
    ] = 3,
    fit: Fit = "slide",
    crop_size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="What the network gets, by --fit. Default: whole images, or the size of an exported file.",
        ),
    ] = None,
    stride: Annotated[
        str | None, typer.Option(metavar="HEIGHTxWIDTH", help="Step of windows. Default: two thirds of --crop-size.")
    ] = None,
    base_size: Annotated[
        str | None,
        typer.Option(metavar="LONGERxSHORTER", help="Rectangle that images are fitted into first, upright or not."),
    ] = None,
    scales: Annotated[list[float], typer.Option(help="Factor on the image size; repeat to average.")] = [1.0],  # noqa: B006  (typer needs a list)
    flip: Annotated[bool, typer.Option(help="Average with mirror images.")] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Largest number of images, or windows, per forward pass. Default: 1 on a CPU, up to 8 elsewhere."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, ...")] = "auto",
    match_classes: MatchClasses = True,
    class_map: ClassMapFile = None,
    as_json: AsJson = False,
    selection: dict[str, Any],
) -> None:
    """Score a network on a data set.

    The scores are of regions, boundaries, edges and bodies, and of each class.
    """
    check_sources([model], [data], root)
    classes = read_class_map(class_map)
    crop, step = parse_size(crop_size, "--crop-size"), parse_size(stride, "--stride")
    base = parse_base_size(base_size, "--base-size")
    name, file = data, find_network(model)
    if name is None and (facts := read_facts(file)):  # a checkpoint states its data, which needs no slow imports
        name = _training_data(model, facts, root)
    announce_loading()
    from bpkd_sdk.runtime import open_runtime

    runtime = open_runtime(model, device)
    if name is None:
        training = getattr(getattr(runtime, "module", None), "provenance", None) or runtime.metadata.get("training")
        name = _training_data(model, {"training": training, "network": runtime.spec.to_dict()}, root)
    if data is None:
        errors.print(f"Data set: {name}, as stated in {model}.", soft_wrap=True)
    import bpkd_sdk
    from bpkd_sdk.evaluation import EvaluationProtocol

    metrics = bpkd_sdk.evaluate(
        runtime,
        bpkd_sdk.open_dataset(name, root=root, split=split, **selection),
        protocol=EvaluationProtocol(fit, crop, step, base, tuple(scales), flip),
        batch_size=batch_size,
        boundary_width=boundary_width,
        match_classes=match_classes,
        class_map=classes,
    )
    if as_json:
        print_json(metrics.to_dict())
        return
    print_metrics(metrics)
    print_classes(metrics)


def _training_data(model: str, facts: Mapping[str, Any], root: Path | None) -> str:
    """Return the name of the data set that a network was trained on, by the facts "training" and "network" of its file.

    Raises:
        ValueError: If the file does not state it, or if it is not a data set that can be opened by name.
    """
    from bpkd_sdk.data.shapes import CLASS_NAMES

    trained_on = (facts.get("training") or {}).get("data", "")
    name = str(trained_on).partition("/")[0]
    class_names = tuple(facts.get("network", {}).get("class_names", ()))
    is_shapes = name == SHAPES and class_names == CLASS_NAMES  # not a folder of that name
    if is_shapes or (name in NAMES and root is not None):
        return name
    problem = f"was trained on {trained_on!r}, whose folder is not known" if trained_on else "states no data set"
    raise ValueError(
        f"{model} {problem}. Pass --data with the path of a folder, or with the name of a data set and its --root."
    )


Model = Annotated[str, typer.Argument(help="Name of a network, or path of a checkpoint.")]
Classes = Annotated[int, typer.Option(help="Number of classes, for the name of a network.")]
InputSize = Annotated[str, typer.Option(metavar="HEIGHTxWIDTH", help="Size of the input image.")]
Channels = Annotated[int, typer.Option(help="Number of channels of the images, for the name of a network.")]


def _open_network(model: str, classes: int, channels: int) -> Any:
    """Load a checkpoint, or create a network by name with random weights."""
    check_sources([model], names=True)
    import bpkd_sdk
    from bpkd_sdk.training.teacher import is_name

    return bpkd_sdk.create_model(model, classes, in_channels=channels) if is_name(model) else bpkd_sdk.load_model(model)


@command("bpkd profile pspnet_r18 --input-size 512x1024")
def profile(
    model: Model,
    classes: Classes = 19,
    channels: Channels = 3,
    input_size: InputSize = "512x512",
    as_json: AsJson = False,
) -> None:
    """Count parameters, multiply-accumulates and activations."""
    size = parse_size(input_size, "--input-size") or (512, 512)
    network = _open_network(model, classes, channels)
    import bpkd_sdk

    cost = bpkd_sdk.profile(network, size)
    counts = {
        "params": cost.params,
        "macs": cost.macs,
        "flops": cost.flops,
        "paper_macs": cost.paper_macs,
        "activations": cost.activations,
        "activation_bytes": cost.activation_bytes,
    }
    if as_json:
        print_json(counts | {"by_operator": cost.by_operator, "not_counted": cost.not_counted})
        return
    table = Table("count", "value", title=f"{model} at {input_size}", title_justify="left")
    for name, value in counts.items():
        table.add_row(name, f"{value:,}")
    console.print(table)
    console.print(
        f"macs: convolutions, linear layers and matrix products. Not counted: {', '.join(cost.not_counted)}.",
        soft_wrap=True,
    )


@command("bpkd inspect runs/student --all")
def inspect(
    model: Model,
    classes: Classes = 19,
    channels: Channels = 3,
    input_size: InputSize = "512x512",
    every: Annotated[bool, typer.Option("--all", help="Show paths more than two levels deep too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a network's properties and feature maps.

    The paths of feature maps are values of --student-feature and --teacher-feature.
    """
    size = parse_size(input_size, "--input-size") or (512, 512)
    network = _open_network(model, classes, channels)
    from bpkd_sdk.features import list_features
    from bpkd_sdk.models import get_spec

    spec, rows = get_spec(network), list_features(network, size)
    logits = rows[-1].shape
    properties = {
        "network": spec.name,
        "classes": spec.num_classes,
        "class names": ", ".join(spec.class_names) or "not known",
        "images": str(spec.pixels),
        "mean": spec.mean,
        "std": spec.std,
        "sides must be multiples of": spec.size_divisor,
        "auxiliary head": "yes" if spec.aux_head else "no",
        "stride of the logits": size[0] // logits[2],
    }
    if as_json:
        print_json(properties | {"features": [row._asdict() for row in rows]})
        return
    table = Table("property", "value", title=model, title_justify="left")
    for name, value in properties.items():
        table.add_row(name, str(value))
    console.print(table)
    table = Table("path", "shape", "", title=f"feature maps of an image of {input_size}", title_justify="left")
    shown = [row for row in rows if every or row.is_default or row.path.count(".") < 2]
    for row in shown:
        table.add_row(row.path, " x ".join(map(str, row.shape)), "default" if row.is_default else "")
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} deeper paths are not shown: add --all.")


@command("bpkd models --json")
def models(as_json: AsJson = False) -> None:
    """List the paper's networks with their cost, counted and as in the paper."""
    from bpkd_sdk.evaluation.profile import profile_zoo

    with working("Counting"):
        rows = list(profile_zoo())
    if as_json:
        print_json([vars(row) for row in rows])
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
    console.print(
        "Networks of other libraries: smp/<Architecture>/<encoder>, torchvision/<network>, transformers/<folder or id>."
    )


@command("bpkd import pspnet_r101.pth teacher.safetensors", name="import")
def import_(
    official: Annotated[Path, typer.Argument(help="OpenMMLab .pth file of a network or of a distilled student.")],
    path: Annotated[Path, typer.Argument(help="Path of the checkpoint to write, ending in .safetensors.")],
) -> None:
    """Convert an OpenMMLab checkpoint to .safetensors.

    Its pickle is read without executing code.
    """
    check_sources(files=[official])
    import bpkd_sdk
    from bpkd_sdk.models.openmmlab import load_openmmlab, read_openmmlab

    content = read_openmmlab(official)
    network = load_openmmlab(official, aux_head=content.has_aux_head)
    bpkd_sdk.save_model(network, path, training={"imported_from": official.name})
    console.print(f"{path}: {network.spec.name}, {network.spec.num_classes} classes", soft_wrap=True)
    if content.left_out:
        console.print(f"Left out, since they do not belong to the network: {len(content.left_out)} entries")
        for key in content.left_out[:10]:
            console.print(f"  {key}", soft_wrap=True)
