"""bpkd triton."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bpkd_sdk.cli.common import app, console


@app.command()
def triton(
    artifact: Annotated[Path, typer.Argument(help="An ONNX file of export, or a TensorRT engine.")],
    repository: Annotated[Path, typer.Argument(help="The folder of all models of the server.")],
    name: Annotated[str | None, typer.Option(help="Of the model; by default the file's.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="'onnxruntime', 'tensorrt' or 'python'; by default what the file needs.")
    ] = None,
    max_batch_size: Annotated[int | None, typer.Option(help="Most images that are put together.")] = None,
    preferred_batch_size: Annotated[
        list[int] | None, typer.Option(help="A batch that is not held back for more; may be given several times.")
    ] = None,
    max_queue_delay: Annotated[int, typer.Option(help="How long an image waits for others, in microseconds.")] = 1000,
    instances: Annotated[int, typer.Option(help="Copies of the model that run at the same time.")] = 1,
    device: Annotated[str, typer.Option(help="'auto', 'cpu' or 'gpu'.")] = "auto",
) -> None:
    """Write a model repository for the Triton Inference Server, or the next version of a model in one."""
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
