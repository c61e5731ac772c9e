"""bpkd benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bpkd_sdk.cli.common import MatchClasses, Root, app, console, parse_size


@app.command()
def benchmark(
    artifacts: Annotated[list[str], typer.Argument(help="Checkpoints, ONNX files, engines, triton:// URLs.")],
    data: Annotated[
        str | None, typer.Option(help="Score them on this data set or folder, and time them on its images.")
    ] = None,
    root: Root = None,
    split: Annotated[str, typer.Option(help="Of the data set.")] = "val",
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 1,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH of the images; by default the data's, or the first artifact's.")
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds of timed calls for each artifact.")] = 10.0,
    device: Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda', ...")] = "auto",
    match_classes: MatchClasses = True,
    json: Annotated[Path | None, typer.Option(help="Also write all figures to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a plot to this file.")] = None,
) -> None:
    """Measure artifacts of all formats side by side: cost, latency, memory, precision as found, accuracy."""
    import bpkd_sdk
    from bpkd_sdk.export import benchmark as run
    from bpkd_sdk.models.checkpoint import write_atomically

    scored_on = bpkd_sdk.open_dataset(data, root, split) if data is not None else None
    report = run(
        artifacts,
        scored_on,
        batch=batch,
        size=parse_size(size),
        duration=duration,
        device=device,
        match_classes=match_classes,
    )
    for path, content in ((json, report.to_json), (markdown, report.to_markdown), (html, report.to_html)):
        if path is not None:
            write_atomically(path, content().encode())
    console.print(report)
    if not report.measured:
        raise typer.Exit(1)
