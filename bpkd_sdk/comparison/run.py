"""One run of a comparison: trained, scored and measured, with its results in one JSON file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bpkd_sdk.comparison.setup import ComparisonSetup, step_times
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.evaluation import MetricCounts, Metrics
from bpkd_sdk.features import eval_mode
from bpkd_sdk.files import parse_record, read_json, write_json
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.memory import MemoryMeter
from bpkd_sdk.models.checkpoint import FORMAT, content_hash, write_tensors
from bpkd_sdk.progress import track
from bpkd_sdk.runtime import TorchRuntime
from bpkd_sdk.training.records import read_history
from bpkd_sdk.training.state import STATE_FILE

RESULT_FILE = "result.json"
PER_IMAGE_FILE = "per_image.safetensors"
SCORES = ("miou", "macc", "boundary_iou", "boundary_f1", "edge_accuracy", "body_accuracy")
PACKAGES = ("bpkd-sdk", "torch", "segmentation-models-pytorch", "timm")


@dataclass(frozen=True)
class Run:
    """Result of one method with one seed.

    Attributes:
        method: Name of the method in the comparison.
        seed: Seed of the student's initial weights, of the order of the data and of the augmentation.
        steps: Number of optimiser steps that the budget allows.
        seconds: Time spent in steps, without evaluations and checkpoints.
        ms_per_step: Milliseconds per step, the median over the intervals between records; None without records.
        peak_memory: Peak memory of the run in bytes, see `MemoryMeter`; None if it could not be measured.
        metrics: Scores of the final weights on the validation data; empty if the run failed.
        error: Why the run failed (its loss was not finite); None if it succeeded.
        curve: Step, seconds of training and `SCORES` of each evaluation.
        first_terms: Loss terms of the first record.
        last_terms: Loss terms of the last record.
        first_weights: SHA-256 of the student's weights before training.
        settings: Settings of the comparison, the method and the budget.
        versions: Versions of the `PACKAGES`.
    """

    method: str
    seed: int
    steps: int
    seconds: float
    ms_per_step: float | None
    peak_memory: int | None
    metrics: dict[str, Any]
    error: str | None
    curve: list[dict[str, int | float | None]]
    first_terms: dict[str, float]
    last_terms: dict[str, float]
    first_weights: str
    settings: dict[str, Any]
    versions: dict[str, str]


def read_run(folder: Path) -> Run:
    """Read the result of a finished run.

    Raises:
        FileNotFoundError: If the folder contains no result.
        ValueError: If the file is damaged, or another version wrote other fields.
    """
    path = folder / RESULT_FILE
    content, fields = read_json(path), {field.name for field in dataclasses.fields(Run)}
    if isinstance(content, dict) and (missing := sorted(fields - content.keys())):
        raise other_version(path, missing)
    return parse_record(Run, content, str(path))


def other_version(path: Path, keys: list[str]) -> ValueError:
    """Return the error for a file of a comparison that another version of this package wrote.

    Args:
        path: The file.
        keys: Names of the values that only one of both versions writes.
    """
    return ValueError(
        f"{path} is not of this version of bpkd-sdk ({version('bpkd-sdk')}): they differ in {', '.join(keys)}. Finish "
        "the comparison with the version that it was started with, or start again with another output_dir."
    )


def run_one(
    setup: ComparisonSetup,
    name: str,
    method: DistillationLoss | None,
    *,
    seed: int,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Train a student, or resume its run; score it, and write the file that `read_run` reads.

    Args:
        setup: Setup of the comparison.
        name: Name of the method.
        method: Distillation method; None trains the student without a teacher.
        seed: Seed of the run.
        folder: Folder of the run.
        settings: Settings to record; ``settings["plan"]["steps"]`` is the number of steps.
    """
    steps, records_before = settings["plan"]["steps"], len(read_history(folder))
    meter = MemoryMeter(setup.device)
    student = setup.new_student(seed)
    first_weights = content_hash(student.state_dict())
    metrics, error = None, None
    try:
        metrics = setup.train_student(method, student, setup.val, folder, steps=steps, seed=seed).metrics
    except FloatingPointError as failure:
        error = str(failure)
    peak = meter.peak()
    if metrics is not None:
        write_image_counts(folder / PER_IMAGE_FILE, student, setup.val, metrics)
    history = read_history(folder)
    terms = [record["terms"] for record in history if "terms" in record]
    times = step_times(history)
    run = Run(
        method=name,
        seed=seed,
        steps=steps,
        seconds=sum(record.get("seconds", 0) for record in history),
        ms_per_step=median(times) if times else None,
        peak_memory=peak if len(history) > records_before else None,
        metrics=metrics.to_dict() if metrics is not None else {},
        error=error,
        curve=_curve(history),
        first_terms=terms[0] if terms else {},
        last_terms=terms[-1] if terms else {},
        first_weights=first_weights,
        settings=settings,
        versions={package: version(package) for package in PACKAGES},
    )
    write_json(folder / RESULT_FILE, dataclasses.asdict(run))
    (folder / STATE_FILE).unlink(missing_ok=True)  # the state is often far larger than the student


def _curve(history: list[dict[str, Any]]) -> list[dict[str, int | float | None]]:
    """Return the scores of each evaluation with the steps and seconds of training before it."""
    points, seconds = [], 0.0
    for record in history:
        seconds += record.get("seconds", 0)
        if "metrics" in record:
            scores = {name: record["metrics"][name] for name in SCORES}
            points.append({"step": record["step"], "seconds": seconds} | scores)
    return points


def write_image_counts(path: Path, model: nn.Module, dataset: SegmentationDataset, metrics: Metrics) -> None:
    """Write the counts of correct pixels of every image as int64 tensors to a safetensors file.

    Every score is a ratio of sums of these counts over images, so `paired_bootstrap` can score any draw of images.

    ``region`` (N, 3, C): correct pixels, pixels of the label, pixels of the prediction. ``boundary`` (N, 3, C): pixels
    of both inner boundaries, of the label's, of the prediction's. ``contour`` (N, 4, C): contour pixels of the label
    that are matched, all of them; contour pixels of the prediction that are matched, all of them. ``band`` (N, 2, 2):
    correct pixels and all pixels, in the edge band and outside of it.

    Args:
        path: File to write.
        model: Network; its mode (training or eval) is restored.
        dataset: Images and labels.
        metrics: Scores over the whole data set, whose boundary and edge widths are used.
    """
    with eval_mode(model):
        runtime = TorchRuntime(model)
        images = track(range(len(dataset)), total=len(dataset), description=f"Counting in {dataset.name}")
        image_counts = [_count_image(runtime, *dataset[index], dataset, metrics) for index in images]
    tensors = {name: torch.stack([counts[name] for counts in image_counts]) for name in image_counts[0]}
    header = {"format": FORMAT, "data": dataset.name, "classes": dataset.class_names}
    write_tensors(path, tensors, header | {"boundary_width": metrics.boundary_width, "edge_width": metrics.edge_width})


def _count_image(
    runtime: TorchRuntime, image: Tensor, label: Tensor, dataset: SegmentationDataset, metrics: Metrics
) -> dict[str, Tensor]:
    counts = MetricCounts(
        dataset.class_names,
        ignore_index=dataset.ignore_index,
        boundary_width=metrics.boundary_width,
        edge_width=metrics.edge_width,
    )
    mask = runtime.segment(image[None])
    counts.update(mask, label[None].to(mask.device))
    confusion = counts.confusion
    region = np.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)])
    arrays = {"region": region, "boundary": counts.boundary, "contour": counts.contour, "band": counts.band}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
