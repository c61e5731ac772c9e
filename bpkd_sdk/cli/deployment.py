"""Commands `bpkd export`, `formats`, `doctor`, `benchmark`, `triton` and `share`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bpkd_sdk.cli.command import command
from bpkd_sdk.cli.common import (
    Fit,
    MatchClasses,
    Root,
    announce_loading,
    check_sources,
    console,
    errors,
    export_command,
    parse_size,
    selects_files,
)
from bpkd_sdk.files import find_network, read_facts, write_atomically

if TYPE_CHECKING:
    from bpkd_sdk.export import QuantizationReport


Sizes = tuple[tuple[int, int], ...]
SHOWN_LAYERS = 12


@command("bpkd export runs/student student.onnx --input-size 512x1024")
@selects_files
def export(
    *,
    model: Annotated[
        str, typer.Argument(help="Checkpoint, hf://user/name, or ONNX file to quantise, compile or show.")
    ],
    output: Annotated[
        Path,
        typer.Argument(
            help="File to write; its suffix selects the format (see `bpkd formats`). With --web: folder of the site."
        ),
    ],
    web: Annotated[bool, typer.Option("--web", help="Write a web site that runs the network in the browser.")] = False,
    precision: Annotated[
        str | None,
        typer.Option(help="'fp32', 'fp16' or 'int8'. Default: that of an ONNX file; otherwise fp32."),
    ] = None,
    input_size: Annotated[
        str | None, typer.Option(metavar="HEIGHTxWIDTH", help="Size of the images. Required for a checkpoint.")
    ] = None,
    dynamic_batch: Annotated[
        bool | None, typer.Option(help="Accept any number of images per batch.", rich_help_panel="ONNX")
    ] = None,
    dynamic_size: Annotated[
        bool | None, typer.Option(help="Accept images of any size.", rich_help_panel="ONNX")
    ] = None,
    preprocess: Annotated[
        bool | None, typer.Option(help="Accept uint8 RGB images and normalise inside.", rich_help_panel="ONNX")
    ] = None,
    argmax: Annotated[bool | None, typer.Option(help="Return masks instead of logits.", rich_help_panel="ONNX")] = None,
    opset: Annotated[int | None, typer.Option(help="Operator set, 18 to 23.", rich_help_panel="ONNX")] = None,
    force: Annotated[
        bool | None, typer.Option("--force", help="Keep a file that disagrees with torch.", rich_help_panel="ONNX")
    ] = None,
    verify_on: Annotated[
        str | None,
        typer.Option(help="Also verify on the validation images of this data set or folder.", rich_help_panel="ONNX"),
    ] = None,
    match_classes: Annotated[
        bool | None,
        typer.Option(
            "--match-classes/--no-match-classes",
            help="Match the classes of network and data by name and refuse other names, or match by position.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set or folder of calibration images.", rich_help_panel="int8")
    ] = None,
    root: Root = None,
    images: Annotated[
        int | None, typer.Option(help="Largest number of calibration images.", rich_help_panel="int8")
    ] = None,
    max_boundary_loss: Annotated[
        float | None, typer.Option(help="Largest loss of boundary IoU, 0 to 1.", rich_help_panel="int8")
    ] = None,
    fit: Annotated[
        Literal["slide", "resize", "pad"] | None,
        typer.Option(help="For int8 and --web, images of other sizes: 'slide' (overlapping windows), 'resize', 'pad'."),
    ] = None,
    batch_sizes: Annotated[
        str | None, typer.Option(help="SMALLEST,BEST,LARGEST number of images per batch.", rich_help_panel="Engine")
    ] = None,
    input_sizes: Annotated[
        str | None,
        typer.Option(
            help="For a file of any size: SMALLEST,BEST,LARGEST, each HEIGHTxWIDTH.", rich_help_panel="Engine"
        ),
    ] = None,
    workspace_mb: Annotated[
        int | None, typer.Option(help="Largest device memory for scratch, in MiB.", rich_help_panel="Engine")
    ] = None,
    version_compatible: Annotated[
        bool | None,
        typer.Option("--version-compatible", help="Later builds of TensorRT can run it.", rich_help_panel="Engine"),
    ] = None,
    hardware: Annotated[
        list[str] | None,
        typer.Option(help="GPU to compile for, such as sm86; the option can be repeated.", rich_help_panel="Engine"),
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of kernel timings to use and update.", rich_help_panel="Engine")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="'tensorrt' or 'tensorrt_rtx'.", rich_help_panel="Engine")] = None,
    example: Annotated[
        list[Path] | None,
        typer.Option(help="Image that the page offers; the option can be repeated.", rich_help_panel="Web site"),
    ] = None,
    onnxruntime_web: Annotated[
        Path | None,
        typer.Option(help="Package of onnxruntime-web, if npm cannot fetch it here.", rich_help_panel="Web site"),
    ] = None,
    selection: dict[str, Any],
) -> None:
    """Write an ONNX file, a TensorRT engine or a web site.

    A file is kept only if it passes its check. An ONNX file must agree with torch, an int8 file must keep boundary IoU
    within a limit, and an engine must have the precision of its ONNX file; engines have not yet been executed. Every
    step of a conversion is checked.
    """
    check_sources([model], [data, verify_on], root, example or ())
    size = parse_size(input_size, "--input-size")
    batches, sizes = parse_batch_sizes(batch_sizes), parse_sizes(input_sizes)
    from bpkd_sdk.export.conversion import convert, plan_steps

    if "to_onnx" in plan_steps(model, str(output), precision, web=web) and size is None:
        trained_on = read_facts(find_network(model)).get("training", {}).get("crop_size")
        call = export_command(model, output, trained_on or (512, 512))
        origin = ", with the size of its training crops" if trained_on else ""
        raise ValueError(f"Pass --input-size, the size of the images to export for. For example{origin}: {call}")
    announce_loading()
    import bpkd_sdk

    arguments = {
        "input_size": size,
        "dynamic_batch": dynamic_batch,
        "dynamic_size": dynamic_size,
        "preprocess": preprocess,
        "argmax": argmax,
        "opset": opset,
        "force": force,
        "verify_on": verify_on and bpkd_sdk.open_dataset(verify_on, root=root, split="val", **selection),
        "match_classes": match_classes,
        "calibration_data": data and bpkd_sdk.open_dataset(data, root=root, split="train", **selection),
        "images": images,
        "max_boundary_loss": max_boundary_loss,
        "fit": fit,
        "batch_sizes": batches,
        "input_sizes": sizes,
        "workspace_mb": workspace_mb,
        "version_compatible": version_compatible,
        "hardware": hardware or None,
        "timing_cache": timing_cache,
        "backend": backend,
        "examples": example or None,
        "onnxruntime_web": onnxruntime_web,
    }
    options = {name: value for name, value in arguments.items() if value is not None}
    reports = convert(model, output, web=web, precision=precision, **options)
    for report in reports:
        console.print(_format_report(report), soft_wrap=True)
        if precision == "int8" and hasattr(report, "layers"):
            console.print(_layers_table(report))
    console.print(f"{reports[-1].path}: {reports[-1].size / 1e6:.2f} MB", soft_wrap=True)


def parse_batch_sizes(text: str | None) -> tuple[int, ...] | None:
    """Parse (smallest, best, largest) from a text like 1,4,8; None stays None, other texts raise ValueError."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"Expected a range like 1,4,8 (smallest, best, largest), but got {text!r}.")
    return tuple(map(int, parts))


def parse_sizes(text: str | None) -> Sizes | None:
    """Parse three sizes from a text like 256x512,512x1024,1024x2048; None stays None, other texts raise ValueError."""
    if text is None:
        return None
    sizes = tuple(size for part in text.split(",") if (size := parse_size(part, "--input-sizes")) is not None)
    if len(sizes) != 3:
        raise ValueError(f"Expected three sizes like 256x512,512x1024,1024x2048, but got {text!r}.")
    return sizes


def _format_report(report: Any) -> str:
    """Describe the result of a step in one line."""
    from bpkd_sdk.export import WebReport

    if isinstance(report, WebReport):
        return f"Open http://localhost:8000 after: {report.serve_command}"
    from bpkd_sdk.export import ExportReport, QuantizationReport  # these need torch
    from bpkd_sdk.export.benchmark.facts import count_types

    if isinstance(report, ExportReport):
        edges = _percent(report.verification.edge_agreement)
        return f"ONNX: {report.agreement:.4%} of the pixels as in torch ({edges} at edges)"
    if isinstance(report, QuantizationReport):
        quantized = sum(layer.quantized for layer in report.layers)
        return (
            f"int8: {quantized} of {len(report.layers)} layers; {_format_loss(report.boundary_loss)}, "
            f"{report.agreement:.4%} of the pixels as before ({_percent(report.edge_agreement)} at edges)"
        )
    counts = sum((Counter(types) for types in report.manifest.layers.values()), Counter[str]())
    types = ", ".join(f"{count} in {type_}" for type_, count in count_types(counts.elements()).items())
    targets = ", ".join(report.manifest.targets)
    return f"Engine for {targets}: layers with weights {types}; compiled in {report.seconds:.1f} s"


def _format_loss(loss: float) -> str:
    """Describe a loss of boundary IoU, which is a gain below 0.

    Example:
        >>> _format_loss(0.0123), _format_loss(-0.0007), _format_loss(-0.00001)
        ('0.0123 boundary IoU lost', '0.0007 boundary IoU gained', 'boundary IoU unchanged')
    """
    rounded = round(loss, 4)
    return (
        f"{abs(rounded):.4f} boundary IoU {'lost' if rounded > 0 else 'gained'}"
        if rounded
        else "boundary IoU unchanged"
    )


def _layers_table(report: QuantizationReport) -> Table:
    """Return a table of the layers that change most pixels when each alone is in int8."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("layer", overflow="fold")
    for heading in ("kind", "edges changed", "bodies changed", "kept in"):
        table.add_column(heading, no_wrap=True)
    for layer in report.worst[:SHOWN_LAYERS]:
        damages = _percent(layer.edge_damage), _percent(layer.body_damage)
        table.add_row(layer.name, layer.kind, *damages, "int8" if layer.quantized else "fp32")
    table.caption = f"The worst of {len(report.layers)} layers; the file's metadata lists all of them."
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.4%}"


@command("bpkd formats")
def formats(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, as in docs/formats.md.")] = False,
) -> None:
    """Show the table of formats.

    Its columns are suffixes, precisions, devices, and the function that writes each format.
    """
    from bpkd_sdk.runtime import FORMATS

    headings = ("format", "suffix", "precision", "runs on", "written by", "extra")
    rows = [
        (
            format_.name,
            ", ".join(format_.suffixes),
            ", ".join(format_.precisions) or "unchanged",
            ", ".join(format_.devices),
            format_.exporter.rpartition(":")[2] if format_.exporter else "-",
            " or ".join(format_.extras) or "-",
        )
        for format_ in FORMATS
    ]
    if markdown:
        for cells in (headings, ["---"] * len(headings), *rows):
            print(f"| {' | '.join(cells)} |")  # noqa: T201
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in headings:
        table.add_column(heading, no_wrap=heading in ("format", "suffix", "written by"))
    for row in rows:
        table.add_row(*row)
    console.print(table)


@command("bpkd doctor")
def doctor() -> None:
    """Show what is installed, and how to install what is missing."""
    from bpkd_sdk.doctor import examine

    table = Table("part", "found", "what to do")
    for finding in examine():
        table.add_row(finding.part, finding.found, finding.advice)
    console.print(table)


@command("bpkd benchmark runs/student student.onnx --data my_data")
@selects_files
def benchmark(
    *,
    artifacts: Annotated[list[str], typer.Argument(help="Checkpoints, ONNX files, engines and triton:// URLs.")],
    data: Annotated[
        str | None, typer.Option(help="Data set or folder to score on, whose images are also used for timing.")
    ] = None,
    root: Root = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    batch_size: Annotated[int, typer.Option(help="Number of images per batch.")] = 1,
    input_size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Size of the images. Default: that of the data or first artifact."),
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds of timed calls for each artifact.")] = 10.0,
    device: Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda', ...")] = "auto",
    fit: Fit = "slide",
    match_classes: MatchClasses = True,
    json: Annotated[Path | None, typer.Option(help="File to write all figures to, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="File to write the table to, as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option(help="File to write a page with a plot to.")] = None,
    selection: dict[str, Any],
) -> None:
    """Measure artifacts of all formats side by side.

    The table has cost, latency, memory, inspected precision and accuracy.
    """
    check_sources(artifacts, [data], root)
    size = parse_size(input_size, "--input-size")
    announce_loading()
    import bpkd_sdk
    from bpkd_sdk.errors import import_optional
    from bpkd_sdk.export import benchmark as run

    if html is not None:  # before the measurement, which takes long
        for package in ("jinja2", "matplotlib"):
            import_optional(package)
    scored_on = bpkd_sdk.open_dataset(data, root=root, split=split, **selection) if data is not None else None
    report = run(
        artifacts,
        scored_on,
        batch_size=batch_size,
        input_size=size,
        duration=duration,
        device=device,
        fit=fit,
        match_classes=match_classes,
    )
    for path, content in ((json, report.to_json), (markdown, report.to_markdown), (html, report.to_html)):
        if path is not None:
            write_atomically(path, content().encode())
    console.print(report)
    if not report.measured:
        raise typer.Exit(1)


@command("bpkd triton student.onnx model_repository")
def triton(
    artifact: Annotated[Path, typer.Argument(help="ONNX file of `bpkd export`, or TensorRT engine.")],
    repository: Annotated[Path, typer.Argument(help="Model repository: the folder of all models of the server.")],
    name: Annotated[str | None, typer.Option(help="Name of the model. Default: that of the file.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="'onnxruntime', 'tensorrt' or 'python'. Default: the first that runs the file.")
    ] = None,
    max_batch_size: Annotated[int | None, typer.Option(help="Largest batch that the server forms.")] = None,
    preferred_batch_size: Annotated[
        list[int] | None,
        typer.Option(help="Size of a batch that waits for no more images; the option can be repeated."),
    ] = None,
    max_queue_delay: Annotated[int, typer.Option(help="Time that an image waits for others, in microseconds.")] = 1000,
    instances: Annotated[int, typer.Option(help="Number of copies of the model that run at the same time.")] = 1,
    device: Annotated[str, typer.Option(help="'auto', 'cpu' or 'gpu'.")] = "auto",
) -> None:
    """Write a model repository for the Triton Inference Server.

    If the repository contains the model already, its next version is written.
    """
    check_sources(files=[artifact])
    from bpkd_sdk.export import to_triton

    options: dict[str, Any] = {"backend": backend, "instances": instances, "device": device}
    report = to_triton(
        artifact,
        repository,
        name=name,
        max_batch_size=max_batch_size,
        preferred_batch_sizes=preferred_batch_size or None,
        max_queue_delay_us=max_queue_delay,
        **options,
    )
    console.print(f"{report.path}: version {report.version}, backend {report.config.backend}", soft_wrap=True)
    console.print(f"Serve it: tritonserver --model-repository={repository.resolve()}", soft_wrap=True)
    console.print(f"Use it: triton://localhost:8000/{report.path.name}", soft_wrap=True)


@command("bpkd share runs/student shared --input-size 512x1024 --license mit")
@selects_files
def share(
    *,
    model: Annotated[str, typer.Argument(help="Checkpoint of the network.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    input_size: Annotated[str, typer.Option(metavar="HEIGHTxWIDTH", help="Size of the images of model.onnx.")],
    license_: Annotated[
        str, typer.Option("--license", help="Licence of the weights: apache-2.0, mit, cc-by-nc-4.0, other, ...")
    ],
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="model.onnx accepts images of any size.")
    ] = False,
    data: Annotated[str | None, typer.Option(help="Data set or folder to score the network on.")] = None,
    root: Root = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    example: Annotated[
        list[Path] | None, typer.Option(help="Image to publish with its overlay; the option can be repeated.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME[@BRANCH]", help="Repository on the Hugging Face Hub to upload to.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    selection: dict[str, Any],
) -> None:
    """Write a folder to share: checkpoint, ONNX file and model card.

    With --push, it is uploaded to the Hugging Face Hub.
    """
    check_sources([model], [data], root, example or ())
    size = parse_size(input_size, "--input-size")
    import bpkd_sdk

    assert size is not None  # noqa: S101  (the option is required)
    with errors.status("Exporting and checking"):
        bpkd_sdk.save_pretrained(
            model,
            folder,
            input_size=size,
            license=license_,
            dynamic_size=dynamic_size,
            data=data and bpkd_sdk.open_dataset(data, root=root, split=split, **selection),
            examples=example or (),
            push_to_hub=push,
            private=private,
        )
    console.print(f"{folder}: read {folder / 'README.md'} before you share it.", soft_wrap=True)
    if push is not None:
        console.print(f"Use it: hf://{push.removeprefix('hf://')}", soft_wrap=True)
