"""The quickstart: trains a student alone and with BPKD, exports it, and writes a report, in minutes on a CPU."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, median_low
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from bpkd_sdk.data import SegmentationDataset, ShapesDataset, as_dataset, open_dataset
from bpkd_sdk.data.names import SHAPES
from bpkd_sdk.evaluation import Metrics, evaluate
from bpkd_sdk.evaluation.profile import profile
from bpkd_sdk.export import quantize, to_onnx, to_web
from bpkd_sdk.files import SHAPES_TEACHER, write_json
from bpkd_sdk.models import create_model, load_model
from bpkd_sdk.progress import PlainConsole, format_seconds, print_fact, track, working
from bpkd_sdk.runtime import TorchRuntime
from bpkd_sdk.runtime.onnx import OnnxRuntime
from bpkd_sdk.sizes import Size, format_size, resize_images, resize_label
from bpkd_sdk.training.api import distill, train
from bpkd_sdk.training.records import read_history
from bpkd_sdk.training_report import write_report

# Both are fast on a CPU. The student's logits are a quarter of the image's height and width, which gives smooth masks;
# the teacher's have the size of the image. Whether a teacher helps within so few steps depends on the student: see
# benchmarks/results/quickstart-students.md.
STUDENT, TEACHER = "smp/PAN/tu-test_resnet", "smp/Unet/tu-test_resnet"
STEPS = 160
OPTIONS: dict[str, Any] = {
    "transform": "light",
    "batch_size": 8,
    "scale": (1.0, 1.0),
    "optimizer": "adamw",
    "learning_rate": 5e-3,
    "learning_rate_warmup": 20,
    "gradient_clip": 10.0,
    "channels_last": True,  # a sixth faster
    "device": "cpu",
    "check_data": False,
    "resume": True,
}
RUNS = ("teacher", "student_alone", "student_bpkd")  # folders of the runs
WEB_EXAMPLES = 6  # validation images that the web site offers
# Size that a user's images are resized to: about so many pixels, in multiples of MULTIPLE, at least SMALLEST multiples
# per side, because the student's decoder halves the image seven times.
PIXELS, MULTIPLE, SMALLEST = 192 * 256, 32, 4
BATCH_SIZE_OF_FOLDERS = 4  # these images have three times the pixels of the generated ones
MAX_IMAGES = {"train": 1000, "val": 100}  # largest numbers of a user's images


@dataclass(frozen=True)
class Row:
    """Costs, scores and latency of one network.

    Attributes:
        name: Display name of the network.
        params: Number of parameters.
        macs: Number of MACs for one image.
        miou: Mean IoU, 0..1.
        macc: Mean class accuracy, 0..1.
        boundary_iou: Mean boundary IoU, 0..1.
        edge_accuracy: Pixel accuracy in the edge band, 0..1.
        body_accuracy: Pixel accuracy outside of the edge band, 0..1.
        size: Size of the file in bytes; None for a network in torch.
        ms: Median time from one uint8 image to its mask in milliseconds, in torch or for a file in ONNX Runtime.
    """

    name: str
    params: int
    macs: int
    miou: float
    macc: float
    boundary_iou: float
    edge_accuracy: float
    body_accuracy: float
    size: int | None
    ms: float


def quickstart(
    folder: str | Path = "quickstart",
    *,
    data: str | Path = SHAPES,
    teacher: str | Path | None = None,
    steps: int = STEPS,
    seed: int = 0,
    **selection: Any,
) -> Path:
    """Train a student on labels alone and with BPKD, export it, and compare all in a report.

    With the generated scenes "shapes" the teacher is the one that this package contains, and nothing is downloaded. If
    npm is installed, it fetches onnxruntime-web for the web site, once.

    Args:
        folder: Folder for the training runs, ``student.onnx``, ``student.int8.onnx``, ``results.json``,
            ``report.html`` and the web site ``site``. Runs that already exist in the folder are resumed.
        data: "shapes", or the path of a folder of your images with the splits "train" and "val", see
            `bpkd_sdk.open_dataset`. These images are resized to about 192x256 pixels.
        teacher: Checkpoint or name of the teacher, see `bpkd_sdk.load_model`. None: the included one for "shapes"; for
            other data, a larger network is trained first, for twice as many steps.
        steps: Number of optimiser steps of each student.
        seed: Seed of the initial weights, and of the order and the augmentation of the images.
        **selection: Options of `bpkd_sdk.open_dataset` for a folder, such as ``val_share=0.1``.

    Returns:
        Path of ``report.html``.
    """
    folder, console, start = Path(folder), PlainConsole(), time.monotonic()
    earlier = sum(_trained_seconds(folder / run) for run in RUNS)
    options = OPTIONS | {"steps": steps, "seed": seed, "evaluate_every": (steps + 1) // 2}
    if data == SHAPES:
        scenes = ShapesDataset("train", length=2400)
        pair: Splits = scenes, open_dataset(SHAPES, split="val", **selection)
        size = scenes.size
        teacher = teacher or SHAPES_TEACHER
    else:
        pair, size = _open_resized(data, selection)
        options["batch_size"] = BATCH_SIZE_OF_FOLDERS
    options["crop_size"] = size
    train_set, val_set = pair
    classes = train_set.num_classes

    console.rule("1/4 The teacher", align="left")
    if teacher is None:
        teacher_network = train(
            _create_seeded(TEACHER, classes, seed),
            pair,
            **options | {"steps": 2 * steps, "output_dir": folder / RUNS[0]},
        ).model
    else:
        teacher_network = load_model(teacher)
    teacher_scores = evaluate(teacher_network, val_set, device="cpu")
    print_fact(f"Teacher: {teacher or TEACHER}, mIoU {teacher_scores.miou:.3f}.")
    console.rule("2/4 Train the student on labels, without the teacher", align="left")
    alone = train(_create_seeded(STUDENT, classes, seed), pair, output_dir=folder / RUNS[1], **options)
    console.rule("3/4 Train the same student on labels and teacher, with BPKD", align="left")
    student = distill(
        teacher_network,
        _create_seeded(STUDENT, classes, seed),
        pair,
        output_dir=folder / RUNS[2],
        **options,
    )
    console.rule("4/4 Export to ONNX and INT8, compare with torch, measure latency", align="left")
    exported = to_onnx(student.model, folder / "student.onnx", input_size=size)
    int8 = quantize(exported.path, folder / "student.int8.onnx", train_set, images=32)
    scores = [evaluate(path, val_set, device="cpu") for path in (exported.path, int8.path)]
    image = val_set[0][0][None]
    assert alone.metrics is not None  # noqa: S101  (the quickstart always validates)
    assert student.metrics is not None  # noqa: S101
    with working("Measuring latency"):
        rows = [
            _torch_row("teacher", teacher_network, teacher_scores, image),
            _torch_row("student alone", alone.model, alone.metrics, image),
            _torch_row("student, BPKD", student.model, student.metrics, image),
            _onnx_row("student, BPKD, ONNX", exported.path, student.model, scores[0], image),
            _onnx_row("student, BPKD, INT8", int8.path, student.model, scores[1], image),
        ]
    results = {
        "data": str(data),
        "rows": [asdict(row) for row in rows],
        "agreement": exported.agreement,
        "seconds": earlier + time.monotonic() - start,
    }
    write_json(folder / "results.json", results)
    networks = {"student alone": alone.model, "student with BPKD": student.model, "teacher": teacher_network}
    histories = {"student alone": alone.history, "student with BPKD": student.history}
    report = write_report(folder / "report.html", networks, histories, val_set, results)
    console.print(_format_table(rows, f"{data}, {len(val_set)} validation images of {format_size(size)}"))
    say = partial(console.print, soft_wrap=True)
    for line in _closing_lines(rows, exported.agreement, report):
        say(line)
    examples = [val_set[index][0].permute(1, 2, 0).numpy() for index in range(min(WEB_EXAMPLES, len(val_set)))]
    say(_write_web_site(exported.path, folder / "site", examples))
    command = ["bpkd", "serve", *map(str, (exported.path, int8.path, student.checkpoint))]
    command += ["--teacher", str(teacher or folder / RUNS[0])]
    if data != SHAPES:
        command += ["--fit", "resize"]
    resumed = f", {format_seconds(earlier)} of it in earlier calls" if earlier else ""
    say(f"Total time: {format_seconds(earlier + time.monotonic() - start)}{resumed}")
    say(f"Compare the networks in a browser:\n{shlex.join(command)}")
    return report


def _trained_seconds(folder: Path) -> float:
    """Return the seconds of training in the records of a run."""
    return float(sum(record.get("seconds", 0) for record in read_history(folder)))


Splits = tuple[SegmentationDataset, SegmentationDataset]


def _open_resized(data: str | Path, selection: Mapping[str, Any]) -> tuple[Splits, Size]:
    """Open a folder and read both splits into memory, with images and labels of one size."""
    splits = {split: open_dataset(data, split=split, **selection) for split in MAX_IMAGES}
    first = splits["train"]
    if not first.has_labels:
        raise ValueError(f"{data} has no labels, from which the quickstart trains and scores its networks.")
    if not first.pixels.is_rgb8:
        raise ValueError(
            f"{data} has images of {first.pixels}, but the networks, the report and the web site of the quickstart "
            "are for 8-bit RGB images. train() and distill() take such images: train a teacher, distil a student, and "
            "export it."
        )
    shapes = [first[index][0].shape[1:] for index in range(min(9, len(first)))]
    height, width = (median_low(sides) for sides in zip(*shapes, strict=True))
    factor = (PIXELS / (height * width)) ** 0.5
    rows, columns = (max(SMALLEST, round(side * factor / MULTIPLE)) * MULTIPLE for side in (height, width))
    size = rows, columns
    counts = {split: min(len(dataset), MAX_IMAGES[split]) for split, dataset in splits.items()}
    print_fact(
        f"{data}: the first {counts['train']} of {len(splits['train'])} training images and {counts['val']} of "
        f"{len(splits['val'])} validation images, resized to {format_size(size)} (height x width)."
    )
    train_set, val_set = (_resize(dataset, counts[split], size) for split, dataset in splits.items())
    return (train_set, val_set), size


def _resize(dataset: SegmentationDataset, count: int, size: Size) -> SegmentationDataset:
    samples = [
        (resize_images(image[None], size)[0], resize_label(label, size))
        for image, label in track(
            (dataset[i] for i in range(count)), total=count, description=f"Reading {dataset.name}"
        )
    ]
    return as_dataset(
        samples,
        class_names=dataset.class_names,
        palette=dataset.palette,
        ignore_index=dataset.ignore_index,
        name=dataset.name,
        value_range=dataset.pixels.value_range,
        bands=dataset.pixels.bands,
    )


def _create_seeded(name: str, num_classes: int, seed: int) -> nn.Module:
    """Create a network with the same random weights in every run with this seed."""
    torch.manual_seed(seed)
    return create_model(name, num_classes)


def _torch_row(name: str, network: nn.Module, scores: Metrics, image: torch.Tensor) -> Row:
    runtime = TorchRuntime(network)
    return _row(name, network, scores, image, None, lambda: runtime.segment(image))


def _onnx_row(name: str, path: Path, network: nn.Module, scores: Metrics, image: torch.Tensor) -> Row:
    runtime, array = OnnxRuntime(path, "cpu"), image.permute(0, 2, 3, 1).contiguous().numpy()
    return _row(name, network, scores, image, path.stat().st_size, lambda: runtime(array))


def _row(
    name: str, network: nn.Module, scores: Metrics, image: torch.Tensor, size: int | None, call: Callable[[], object]
) -> Row:
    """Count the costs of a network, measure its latency, and return its row."""
    height, width = image.shape[2:]
    cost = profile(network, input_size=(height, width))
    return Row(
        name,
        cost.params,
        cost.macs,
        scores.miou,
        scores.macc,
        scores.boundary_iou,
        scores.edge_accuracy,
        scores.body_accuracy,
        size,
        _measure_median_ms(call),
    )


def _measure_median_ms(call: Callable[[], object], repeats: int = 50) -> float:
    """Return the median wall time of a call in milliseconds, after ten warm-up calls."""
    times = []
    for _ in range(10 + repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return median(times[10:])


def _format_table(rows: list[Row], title: str) -> Table:
    """Format the rows as a table for the terminal."""
    table = Table(title=title, title_justify="left", padding=0)
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
            f"{row.ms:.1f}ms",
        )
    return table


def _closing_lines(rows: list[Row], agreement: float, report: Path) -> list[str]:
    teacher, alone, student, onnx, _ = rows
    return [
        "bIoU: boundary IoU with 3 px. edge, body: pixel accuracy inside and outside of the 7 px edge band.",
        f"With BPKD the student has {100 * (student.miou - alone.miou):+.1f} points of mIoU and "
        f"{100 * (student.boundary_iou - alone.boundary_iou):+.1f} of boundary IoU against the same training without "
        f"the teacher. It needs {teacher.macs / student.macs:.1f} times fewer MACs than the teacher, and its ONNX file "
        f"is {teacher.ms / onnx.ms:.1f} times as fast here.",
        f"ONNX Runtime and torch predict the same class for {agreement:.2%} of the pixels.",
        f"Report: {report}",
    ]


def _write_web_site(network: Path, folder: Path, examples: list[np.ndarray]) -> str:
    """Write a web site that runs an ONNX file, and say how to open it, or why there is none."""
    try:
        site = to_web(network, folder, examples=examples, fit="resize")
    except RuntimeError as error:
        return f"No web site was written. {error}"
    return f"Run the student inside the browser: open http://localhost:8000 after\n{site.serve_command}"
