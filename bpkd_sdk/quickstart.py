"""The quickstart: trains a teacher and two students on generated scenes, exports one student, and writes a report."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.evaluation import Metrics, evaluate
from bpkd_sdk.evaluation.profile import profile
from bpkd_sdk.export import to_onnx, to_web
from bpkd_sdk.files import write_json
from bpkd_sdk.models import create_model
from bpkd_sdk.progress import console as progress_console
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.runtime.module import whole_logits
from bpkd_sdk.runtime.onnx import OnnxRuntime
from bpkd_sdk.training.api import distill, train
from bpkd_sdk.training.loop import TrainingResult
from bpkd_sdk.training_report import write_report

TEACHER, TEACHER_STEPS = "smp/Unet/tu-test_resnet", 300
STUDENT, STUDENT_STEPS = "smp/Linknet/tu-test_resnet", 300
WEB_EXAMPLES = 6  # validation images that the web site offers
OPTIONS: dict[str, Any] = {
    "optimizer": "adamw",
    "learning_rate": 5e-3,
    "gradient_clip": 10.0,
    "batch_size": 8,
    "crop_size": (128, 128),
    "scale": (1.0, 1.0),
    "device": "cpu",
    "check_data": False,
    "resume": True,
}


@dataclass(frozen=True)
class Row:
    """Costs, scores and latency of one network.

    Attributes:
        name: Display name of the network.
        params: Number of parameters.
        macs: Number of MACs for one image of 128x128 pixels.
        miou: Mean IoU, 0..1.
        macc: Mean class accuracy, 0..1.
        boundary_iou: Mean boundary IoU, 0..1.
        edge_accuracy: Pixel accuracy in the edge band, 0..1.
        body_accuracy: Pixel accuracy outside of the edge band, 0..1.
        torch_ms: Median latency in milliseconds of one image in torch; None if it was not measured.
        onnxruntime_ms: Median latency in milliseconds of one image in ONNX Runtime; None if it was not measured.
    """

    name: str
    params: int
    macs: int
    miou: float
    macc: float
    boundary_iou: float
    edge_accuracy: float
    body_accuracy: float
    torch_ms: float | None
    onnxruntime_ms: float | None


def quickstart(
    folder: str | Path = "quickstart", *, teacher_steps: int = TEACHER_STEPS, student_steps: int = STUDENT_STEPS
) -> Path:
    """Train, distill, export and report on the embedded data set `shapes`, on the CPU, in a few minutes.

    No data and no weights are downloaded. If npm is installed, it fetches onnxruntime-web for the web site, once.

    Args:
        folder: Folder for three runs, ``student.onnx``, ``results.json``, ``report.html`` and the web site ``site``.
            Runs that already exist in the folder are resumed.
        teacher_steps: Number of optimiser steps of the teacher.
        student_steps: Number of optimiser steps of each student.

    Returns:
        Path of ``report.html``.
    """
    folder = Path(folder)
    train_set, val_set = data = ShapesDataset("train", length=2400), ShapesDataset("val")
    console = Console()
    classes = train_set.num_classes

    def options(name: str, steps: int) -> dict[str, Any]:
        return OPTIONS | {"steps": steps, "output_dir": folder / name}

    console.rule("1/4 Train a teacher on labels", align="left")
    teacher = train(create_seeded(TEACHER, classes), data, **options("teacher", teacher_steps))
    console.rule("2/4 Train a student on labels, without the teacher", align="left")
    alone = train(create_seeded(STUDENT, classes), data, **options("student_alone", student_steps))
    console.rule("3/4 Train the same student on labels and teacher, with BPKD", align="left")
    student = distill(teacher.model, create_seeded(STUDENT, classes), data, **options("student_bpkd", student_steps))
    console.rule("4/4 Export the student, compare it with torch, measure latency", align="left")
    with progress_console.status("Exporting to ONNX and comparing with torch"):
        exported = to_onnx(student.model, folder / "student.onnx", input_size=val_set.size)
    segmenter = OnnxRuntime(exported.path, "cpu")
    scores = evaluate(exported.path, val_set, device="cpu")
    with progress_console.status("Measuring latency"):
        image = val_set[0][0][None]
        array = image.permute(0, 2, 3, 1).contiguous().numpy()
        rows = [
            measure_torch_row("teacher", teacher, image),
            measure_torch_row("student alone", alone, image),
            measure_torch_row("student, BPKD", student, image),
            create_row("student, BPKD, ONNX", student.model, scores, None, measure_median_ms(lambda: segmenter(array))),
        ]
    results = {"rows": [asdict(row) for row in rows], "agreement": exported.agreement, "bytes": exported.size}
    write_json(folder / "results.json", results)
    runs = {"teacher": teacher, "student alone": alone, "student with BPKD": student}
    report = write_report(folder / "report.html", runs, val_set, results)
    console.print(format_table(rows))
    console.print("bIoU: boundary IoU with 3 px. edge, body: pixel accuracy inside and outside of the 7 px edge band.")
    console.print(f"ONNX Runtime and torch predict the same class for {exported.agreement:.2%} of the pixels.")
    console.print(f"Report: {report}", soft_wrap=True)
    examples = [val_set[index][0].permute(1, 2, 0).numpy() for index in range(min(WEB_EXAMPLES, len(val_set)))]
    web = format_web_site(exported.path, folder / "site", examples)
    console.print(web, soft_wrap=True, markup=False, highlight=False)
    command = format_serve_command(teacher.checkpoint, student.checkpoint, exported.path)
    console.print(f"Compare the networks in a browser:\n{command}", soft_wrap=True, markup=False, highlight=False)
    return report


def format_web_site(network: Path, folder: Path, examples: list[np.ndarray]) -> str:
    """Write a web site that runs an ONNX file, and say how to open it, or why there is none."""
    try:
        site = to_web(network, folder, examples=examples)
    except RuntimeError as error:
        return f"No web site was written. {error}"
    return f"Run the student inside the browser: open http://localhost:8000 after\n{site.serve_command}"


def format_serve_command(teacher: Path, *students: Path) -> str:
    """Format the shell command that shows the networks in a browser."""
    return shlex.join(
        ["bpkd", "serve", "--teacher", str(teacher), *(part for path in students for part in ("--student", str(path)))]
    )


def create_seeded(name: str, num_classes: int) -> nn.Module:
    """Create a network with the same random weights in every run."""
    torch.manual_seed(0)
    return create_model(name, num_classes)


def measure_torch_row(name: str, run: TrainingResult, image: torch.Tensor) -> Row:
    """Measure the latency of a trained network in torch, from the image to its mask, and return its row."""
    assert run.metrics is not None  # noqa: S101  (the quickstart always validates)
    with torch.inference_mode():
        latency = measure_median_ms(lambda: to_mask(whole_logits(run.model, image)))
    return create_row(name, run.model, run.metrics, latency, None)


def create_row(
    name: str, model: nn.Module, scores: Metrics, torch_ms: float | None, onnxruntime_ms: float | None
) -> Row:
    """Count the costs of a network and return its row."""
    cost = profile(model, input_size=(128, 128))
    return Row(
        name,
        cost.params,
        cost.macs,
        scores.miou,
        scores.macc,
        scores.boundary_iou,
        scores.edge_accuracy,
        scores.body_accuracy,
        torch_ms,
        onnxruntime_ms,
    )


def measure_median_ms(call: Callable[[], object], repeats: int = 50) -> float:
    """Return the median wall time of a call in milliseconds, after ten warm-up calls."""
    times = []
    for _ in range(10 + repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[10:])


def format_table(rows: list[Row]) -> Table:
    """Format the rows as a table for the terminal."""
    table = Table(title="shapes, 100 validation scenes of 128x128", title_justify="left", padding=0)
    table.add_column("network", no_wrap=True)
    for heading in ("params", "MACs", "mIoU", "mAcc", "bIoU", "edge", "body", "latency"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        scores = (row.miou, row.macc, row.boundary_iou, row.edge_accuracy, row.body_accuracy)
        table.add_row(
            row.name,
            f"{row.params / 1e6:.2f}M",
            f"{row.macs / 1e9:.3f}G",
            *(f"{score:.3f}" for score in scores),
            f"{row.torch_ms or row.onnxruntime_ms:.1f}ms",
        )
    return table
