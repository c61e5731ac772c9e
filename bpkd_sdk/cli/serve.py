"""bpkd serve."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bpkd_sdk.cli.common import app, console, errors

if TYPE_CHECKING:
    from bpkd_sdk.serve.networks import ModelSet
    from bpkd_sdk.serve.service.security import Access

_NETWORK = "A checkpoint, an ONNX file, an engine or triton://host:port/model"


@app.command()
def serve(
    student: Annotated[list[str], typer.Option(help=f"{_NETWORK}; may be given several times.")],
    teacher: Annotated[str | None, typer.Option(help=f"{_NETWORK}.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 7860,
    token: Annotated[
        str | None, typer.Option(envvar="BPKD_TOKEN", help="A long secret that every request has to show.")
    ] = None,
    user: Annotated[str | None, typer.Option(envvar="BPKD_USER", help="A name to log in with.")] = None,
    password: Annotated[str | None, typer.Option(envvar="BPKD_PASSWORD", help="Of the user.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let anybody in who reaches the address.")] = False,
    device: Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda', ...")] = "auto",
    demo: Annotated[bool, typer.Option(help="Show the page for people, beside the service for programs.")] = True,
    examples: Annotated[
        Path | None,
        typer.Option(help="A folder of images that the page offers; images/ and labels/ below it, or none."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Most images that go through a network together.")] = 8,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="How long an image waits for others at most.")] = 2.0,
    parallel: Annotated[
        int, typer.Option(min=1, help="Batches of a network at the same time; more than 1 for a Triton server.")
    ] = 1,
    max_requests: Annotated[int, typer.Option(min=1, help="That are waiting; more are told to come again.")] = 64,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="Of an image's file.")] = 20.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Of an image, or of a video's frame.")] = 16.8,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an upload, and again for its answer.")] = 30.0,
) -> None:
    """Serve networks: a page for people, POST /v1/segment for programs (documented at /docs)."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is told to anybody
    from bpkd_sdk.errors import import_optional

    for package in ("fastapi", "prometheus_client", "uvicorn"):
        import_optional(package, "serve")
    from starlette.responses import RedirectResponse

    from bpkd_sdk.serve.networks import open_models
    from bpkd_sdk.serve.service.app import create_app
    from bpkd_sdk.serve.service.limits import Limits
    from bpkd_sdk.serve.service.security import Access
    from bpkd_sdk.serve.service.server import listen, mount_demo, run, url_of

    if demo and find_spec("gradio") is None:
        errors.print("No page for people: gradio is not installed. Install it with: pip install 'bpkd-sdk[serve]'")
        demo = False
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("bpkd_sdk.serve").setLevel(logging.INFO)
    access = Access(token, user, password, insecure)
    access.check_address(host)
    limits = Limits(
        body=round(1e6 * max_megabytes), pixels=round(1e6 * max_megapixels), requests=max_requests, seconds=timeout
    )
    with listen(host, port) as listening:
        with errors.status("Opening the networks"):
            models = open_models(student, teacher=teacher, device=device)
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
        _tell(models, host, url_of(listening), access, demo=demo)
        run(service, listening, seconds=timeout)
    console.print("Stopped.")


def _tell(models: ModelSet, host: str, url: str, access: Access, *, demo: bool) -> None:
    """What is served, to whom, and what is missing."""
    import torch

    from bpkd_sdk.serve.service.security import is_loopback

    table = Table("network", "runs on", "classes", "confidence")
    for model in models.available:
        confidence = "yes" if model.predictor.has_probabilities else "no, it returns masks"
        device, classes = str(model.predictor.runtime.device), str(len(model.predictor.class_names))
        table.add_row(model.name, device, classes, confidence)
    for unavailable in models.unavailable:
        table.add_row(unavailable.name, "[red]left out[/]", "", "")
    console.print(table)
    if not torch.cuda.is_available():
        errors.print("[yellow]torch sees no NVIDIA GPU here: networks run on the CPU, engines cannot run.[/]")
    if access.is_restricted:
        console.print(f"{url}: a token or a password is asked for", soft_wrap=True)
    elif is_loopback(host):
        console.print(f"{url}: open to everybody on this machine", soft_wrap=True)
    else:
        console.print(f"{url}: [bold red]open to everybody who reaches it[/], by --insecure", soft_wrap=True)
    if not is_loopback(host):
        errors.print(
            "[yellow]This is plain HTTP: beyond a network that you trust, put a proxy with TLS in front, which "
            "passes the Host header on.[/]"
        )
    console.print(f"For people: {url}/" if demo else "For people: nothing", soft_wrap=True)
    console.print(f"For programs: {url}/docs; POST {url}/v1/segment", soft_wrap=True)
    console.print("Stop with Ctrl+C.")
