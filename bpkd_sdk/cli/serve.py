"""Commands `bpkd predict`, which segments files, and `bpkd serve`, which serves networks over HTTP and a demo page."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from bpkd_sdk.cli.command import command
from bpkd_sdk.cli.common import Fit, check_sources, console, errors
from bpkd_sdk.progress import working

if TYPE_CHECKING:
    from bpkd_sdk.serve.networks import ModelSet
    from bpkd_sdk.serve.service.security import AccessPolicy

_NETWORK = "a checkpoint or the folder of a run, an ONNX file, a TensorRT engine or triton://host:port/model"


@command("bpkd predict student.onnx photos --output masks --overlay")
def predict(
    network: Annotated[str, typer.Argument(help=f"Network: {_NETWORK}.")],
    inputs: Annotated[
        list[str], typer.Argument(help="Images, videos, folders, or patterns in quotes, such as 'drive/**/*.jpg'.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the masks.")],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Write the images and videos with class colours and boundaries too.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Maximum images per batch. Default: what fits the image size, at most 8.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the network: 'auto', 'cpu', 'cuda', ...")] = "auto",
    fit: Fit = "slide",
) -> None:
    """Segment images and videos into mask files.

    The same command continues after an interruption.
    """
    from bpkd_sdk.serve.input_files import find_files

    check_sources([network])
    files = find_files(inputs)  # before the slow imports
    from bpkd_sdk.serve.mask_folder import segment_files
    from bpkd_sdk.serve.predictor import Predictor

    result = segment_files(Predictor(network, device, fit=fit), files, output, overlay=overlay, batch_size=batch_size)
    for name, reason in result.failed.items():
        errors.print("Failed:", style="bold red", end=" ")
        errors.print(f"{name}: {reason}", soft_wrap=True)
    skipped = f", {len(result.skipped)} were done before" if result.skipped else ""
    failed = f", {len(result.failed)} failed" if result.failed else ""
    console.print(f"{len(result.done)} files segmented{skipped}{failed}: {output}", soft_wrap=True)
    if result.failed:
        raise typer.Exit(1)


@command("bpkd serve student.onnx --teacher runs/teacher")
def serve(
    students: Annotated[
        list[str] | None, typer.Argument(metavar="NETWORK", help=f"Students, side by side: {_NETWORK}.")
    ] = None,
    student: Annotated[list[str] | None, typer.Option(help="One more student; the option can be repeated.")] = None,
    teacher: Annotated[str | None, typer.Option(help=f"Teacher: {_NETWORK}.")] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. An address that other machines can reach requires credentials.",
            rich_help_panel="Address and access",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes any that is free.", rich_help_panel="Address and access")
    ] = 7860,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="BPKD_TOKEN",
            help="Secret token that requests contain as a bearer token or as the password.",
            rich_help_panel="Address and access",
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(
            envvar="BPKD_USER",
            help="User name that requests contain, with --password.",
            rich_help_panel="Address and access",
        ),
    ] = None,
    password: Annotated[
        str | None,
        typer.Option(envvar="BPKD_PASSWORD", help="Password of the user.", rich_help_panel="Address and access"),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Accept requests without credentials, from every machine.",
            rich_help_panel="Address and access",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="Device of the networks: 'auto', 'cpu', 'cuda', ...")] = "auto",
    fit: Fit = "slide",
    demo: Annotated[
        bool, typer.Option(help="Serve the demo page beside the HTTP service.", rich_help_panel="Demo page")
    ] = True,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="Folder of example images for the demo page; with labels: a folder with images/ and labels/.",
            rich_help_panel="Demo page",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Maximum images per batch.", rich_help_panel="Batches and limits")
    ] = 8,
    max_wait_ms: Annotated[
        float,
        typer.Option(
            min=0,
            help="Maximum milliseconds that an image waits for others of its size.",
            rich_help_panel="Batches and limits",
        ),
    ] = 2.0,
    parallel: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of batches of one network at the same time; use more than 1 for a Triton server.",
            rich_help_panel="Batches and limits",
        ),
    ] = 1,
    max_requests: Annotated[
        int,
        typer.Option(min=1, help="Maximum queued requests; more get HTTP 503.", rich_help_panel="Batches and limits"),
    ] = 64,
    max_megabytes: Annotated[
        float, typer.Option(min=0.001, help="Maximum megabytes of an image file.", rich_help_panel="Batches and limits")
    ] = 20.0,
    max_megapixels: Annotated[
        float,
        typer.Option(
            min=0.001, help="Maximum megapixels of an image or video frame.", rich_help_panel="Batches and limits"
        ),
    ] = 16.8,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds allowed for an upload, and again for its segmentation.",
            rich_help_panel="Batches and limits",
        ),
    ] = 30.0,
) -> None:
    """Serve networks over HTTP, with a demo page.

    POST /v1/segment segments an image; /docs documents the service.
    """
    sources = [*(students or ()), *(student or ())]
    if not sources and teacher is None:
        raise ValueError("Expected at least one network, as in `bpkd serve student.onnx`, but got none.")
    check_sources([*sources, teacher])
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio must not send usage data
    from bpkd_sdk.errors import import_optional

    for package in ("asgi_correlation_id", "fastapi", "prometheus_client", "uvicorn"):
        import_optional(package)
    from starlette.responses import RedirectResponse

    from bpkd_sdk.serve.networks import open_models
    from bpkd_sdk.serve.service.app import create_app
    from bpkd_sdk.serve.service.limits import Limits
    from bpkd_sdk.serve.service.security import AccessPolicy
    from bpkd_sdk.serve.service.server import format_url, listen, mount_demo, run

    if demo and find_spec("gradio") is None:
        errors.print("The demo page needs gradio, which is not installed: pip install 'bpkd-sdk[serve]'")
        demo = False
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("bpkd_sdk.serve").setLevel(logging.INFO)
    access = AccessPolicy(token, user, password, insecure)
    access.check_address(host)
    limits = Limits(
        max_upload_bytes=round(1e6 * max_megabytes),
        max_pixels=round(1e6 * max_megapixels),
        max_requests=max_requests,
        timeout=timeout,
    )
    with listen(host, port) as listener:
        with working("Opening the networks"):
            models = open_models(sources, teacher=teacher, device=device, fit=fit)
        service = create_app(
            models,
            access=access,
            limits=limits,
            batch_size=batch_size,
            max_wait=max_wait_ms / 1000,
            parallel=parallel,
        )
        if demo:
            mount_demo(service, models, examples=examples, limits=limits)
        else:
            service.add_route("/", lambda _: RedirectResponse("/docs"))
        _print_summary(models, host, format_url(listener), access, demo=demo)
        run(service, listener, timeout=timeout)
    console.print("Stopped.")


def _print_summary(models: ModelSet, host: str, url: str, access: AccessPolicy, *, demo: bool) -> None:
    """Print the networks, the addresses, the required credentials and warnings."""
    from bpkd_sdk.gpu import gpu_names
    from bpkd_sdk.serve.service.security import is_loopback

    table = Table("network", "device", "classes", "confidence")
    for model in models.available:
        confidence = "yes" if model.predictor.has_probabilities else "no, masks only"
        classes = str(len(model.predictor.class_names))
        table.add_row(model.name, model.device_name, classes, confidence)
    for unavailable in models.unavailable:
        table.add_row(unavailable.name, Text("not served", style="red"), "", "")
    console.print(table)
    if not gpu_names():
        errors.print(
            "There is no NVIDIA GPU on this machine; the table states where each network runs.", style="yellow"
        )
    if access.requires_credentials:
        console.print(f"{url}: requires a token or a password", soft_wrap=True)
    elif is_loopback(host):
        console.print(f"{url}: open to every user of this machine", soft_wrap=True)
    else:
        console.print(f"{url}:", end=" ")
        console.print("open to every machine that can reach it (--insecure)", style="bold red")
    if not is_loopback(host):
        errors.print(
            "The connection is not encrypted. Outside a trusted network, run the server behind a proxy with TLS that "
            "forwards the Host header.",
            style="yellow",
        )
    console.print(f"Demo page: {url}/" if demo else "Demo page: off", soft_wrap=True)
    console.print(f"HTTP service: {url}/docs; POST {url}/v1/segment", soft_wrap=True)
    console.print("Stop with Ctrl+C.")
