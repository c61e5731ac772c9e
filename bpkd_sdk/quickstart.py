"""The first five minutes: a teacher, a student alone, a student with BPKD, an exported file, a report. No download."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.evaluation import Metrics, evaluate
from bpkd_sdk.evaluation.profile import profile
from bpkd_sdk.export import to_onnx
from bpkd_sdk.files import write_json
from bpkd_sdk.models import create_model
from bpkd_sdk.progress import console as progress_console
from bpkd_sdk.runtime.inference import to_mask, whole_logits
from bpkd_sdk.runtime.onnx import OnnxRuntime
from bpkd_sdk.training.api import distill, train
from bpkd_sdk.training.loop import TrainingResult
from bpkd_sdk.training_report import write_report

TEACHER, TEACHER_STEPS = "smp/Unet/tu-test_resnet", 300
STUDENT, STUDENT_STEPS = "smp/Linknet/tu-test_resnet", 300
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
    """One line of the table; scores are fractions, latencies milliseconds for one image (None: not measured)."""

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
    """Train, distill, export and report on the embedded `shapes` scenes, on the CPU, in a few minutes.

    Args:
        folder: Takes three runs, ``student.onnx``, ``results.json`` and ``report.html``. What is there already is used.
        teacher_steps: Optimiser steps of the teacher.
        student_steps: Optimiser steps of each student.

    Returns:
        The path of ``report.html``.
    """
    folder = Path(folder)
    train_set, val_set = data = ShapesDataset("train", length=2400), ShapesDataset("val")
    console = Console()
    classes = train_set.num_classes

    def options(name: str, steps: int) -> dict[str, Any]:
        return OPTIONS | {"steps": steps, "output_dir": folder / name}

    console.rule("1/4 A teacher learns from labels", align="left")
    teacher = train(create_seeded(TEACHER, classes), data, **options("teacher", teacher_steps))
    console.rule("2/4 A student learns from labels alone", align="left")
    alone = train(create_seeded(STUDENT, classes), data, **options("student_alone", student_steps))
    console.rule("3/4 The same student learns from labels and teacher, by BPKD", align="left")
    student = distill(teacher.model, create_seeded(STUDENT, classes), data, **options("student_bpkd", student_steps))
    console.rule("4/4 Export, parity, latency", align="left")
    with progress_console.status("Exporting to ONNX and comparing with torch"):
        exported = to_onnx(student.model, folder / "student.onnx", input_size=val_set.size)
    segmenter = OnnxRuntime(exported.path, "cpu")
    scores = evaluate(exported.path, val_set, device="cpu")
    with progress_console.status("Measuring latency"):
        image = val_set[0][0][None]
        array = image.permute(0, 2, 3, 1).contiguous().numpy()
        rows = [
            measured_row("teacher", teacher, image),
            measured_row("student alone", alone, image),
            measured_row("student, BPKD", student, image),
            row("student, BPKD, ONNX", student.model, scores, None, median_ms(lambda: segmenter(array))),
        ]
    results = {"rows": [asdict(line) for line in rows], "agreement": exported.agreement, "bytes": exported.size}
    write_json(folder / "results.json", results)
    runs = {"teacher": teacher, "student alone": alone, "student with BPKD": student}
    report = write_report(folder / "report.html", runs, val_set, results)
    console.print(as_table(rows))
    console.print("bIoU: boundary IoU, 3 px. edge, body: accuracy inside and outside the 7 px edge band.")
    console.print(f"ONNX Runtime and torch give {exported.agreement:.2%} of the pixels the same class.")
    console.print(f"Report: {report}", soft_wrap=True)
    command = serve_command(teacher.checkpoint, student.checkpoint, exported.path)
    console.print(f"See them beside each other:\n{command}", soft_wrap=True, markup=False, highlight=False)
    return report


def serve_command(teacher: Path, *students: Path) -> str:
    """What to type to see the networks in a browser."""
    return shlex.join(
        ["bpkd", "serve", "--teacher", str(teacher), *(part for path in students for part in ("--student", str(path)))]
    )


def create_seeded(name: str, num_classes: int) -> nn.Module:
    """A network whose random weights are the same in every run."""
    torch.manual_seed(0)
    return create_model(name, num_classes)


def measured_row(name: str, run: TrainingResult, image: torch.Tensor) -> Row:
    """A row for a trained network, with its latency in torch from image to mask."""
    assert run.metrics is not None  # noqa: S101  (the quickstart always validates)
    with torch.inference_mode():
        latency = median_ms(lambda: to_mask(whole_logits(run.model, image)))
    return row(name, run.model, run.metrics, latency, None)


def row(name: str, model: nn.Module, scores: Metrics, torch_ms: float | None, onnxruntime_ms: float | None) -> Row:
    """Cost, scores and latency side by side."""
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


def median_ms(call: Callable[[], object], repeats: int = 50) -> float:
    """Median wall time of a call in milliseconds, after ten calls to warm up."""
    times = []
    for _ in range(10 + repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[10:])


def as_table(rows: list[Row]) -> Table:
    """The rows for a terminal."""
    table = Table(title="shapes, 100 validation scenes of 128x128", title_justify="left", padding=0)
    table.add_column("network", no_wrap=True)
    for heading in ("params", "MACs", "mIoU", "mAcc", "bIoU", "edge", "body", "latency"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in rows:
        scores = (line.miou, line.macc, line.boundary_iou, line.edge_accuracy, line.body_accuracy)
        table.add_row(
            line.name,
            f"{line.params / 1e6:.2f}M",
            f"{line.macs / 1e9:.3f}G",
            *(f"{score:.3f}" for score in scores),
            f"{line.torch_ms or line.onnxruntime_ms:.1f}ms",
        )
    return table
