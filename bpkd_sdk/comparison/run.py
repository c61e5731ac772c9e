"""One run: trained, scored, measured, and kept in one JSON file that says it all."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bpkd_sdk.comparison.budget import step_times
from bpkd_sdk.comparison.contest import Contest
from bpkd_sdk.comparison.memory import MemoryMeter
from bpkd_sdk.comparison.per_image import write_image_counts
from bpkd_sdk.files import read_json
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.models.checkpoint import content_hash, write_atomically
from bpkd_sdk.training.state import RESUME_FILE, read_history

RESULT_FILE = "result.json"
PER_IMAGE_FILE = "per_image.safetensors"
SCORES = ("miou", "macc", "boundary_iou", "boundary_f1", "edge_accuracy", "body_accuracy")
EVALUATIONS = 5  # in a run, unless told otherwise
PACKAGES = ("bpkd-sdk", "torch", "segmentation-models-pytorch", "timm")


@dataclass(frozen=True)
class Run:
    """What came out of one method with one seed.

    Attributes:
        method: Its name in the comparison.
        seed: Of the student's first weights, of data order and augmentation.
        steps: Optimiser steps that the budget allows.
        seconds: Time spent in steps; evaluations and checkpoints are left out.
        ms_per_step: Median over the stretches between two records of the history; None without any.
        peak_memory: Bytes at the peak of the whole run, see `MemoryMeter`; None where not known.
        metrics: Scores of the final weights on the validation data; empty if the run failed.
        error: Why the run failed: its loss stopped being finite. None otherwise.
        curve: Step, seconds of training until then, and `SCORES`, for each evaluation.
        first_terms: Sizes of the loss terms in the first record.
        last_terms: Sizes of the loss terms in the last record.
        first_weights: Hash of the student's weights before training.
        settings: Of the comparison and of the method.
        versions: Of the `PACKAGES`.
    """

    method: str
    seed: int
    steps: int
    seconds: float
    ms_per_step: float | None
    peak_memory: int | None
    metrics: dict[str, Any]
    error: str | None
    curve: list[dict[str, float]]
    first_terms: dict[str, float]
    last_terms: dict[str, float]
    first_weights: str
    settings: dict[str, Any]
    versions: dict[str, str]


def read_run(folder: Path) -> Run:
    """The finished run in a folder."""
    return Run(**read_json(folder / RESULT_FILE))


def perform(
    contest: Contest,
    name: str,
    method: DistillationLoss | None,
    *,
    seed: int,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Train a student, or go on with it, score it, and write what `read_run` reads to its folder."""
    steps, done_before = settings["plan"]["steps"], len(read_history(folder))
    meter = MemoryMeter(contest.device)
    student = contest.new_student(seed)
    first_weights = content_hash(student.state_dict())
    metrics, error = None, None
    options = {"steps": steps, "seed": seed}
    options["evaluate_every"] = contest.options["evaluate_every"] or math.ceil(steps / EVALUATIONS)
    try:
        metrics = contest.fit(method, student, contest.val, folder, **options).metrics
    except FloatingPointError as stopped:
        error = str(stopped)
    peak = meter.peak()
    if metrics is not None:
        write_image_counts(folder / PER_IMAGE_FILE, student, contest.val, metrics)
    history = read_history(folder)
    terms = [record["terms"] for record in history if "terms" in record]
    times = step_times(history)
    run = Run(
        method=name,
        seed=seed,
        steps=steps,
        seconds=sum(record.get("seconds", 0) for record in history),
        ms_per_step=median(times) if times else None,
        peak_memory=peak if len(history) > done_before else None,
        metrics=metrics.to_dict() if metrics is not None else {},
        error=error,
        curve=curve(history),
        first_terms=terms[0] if terms else {},
        last_terms=terms[-1] if terms else {},
        first_weights=first_weights,
        settings=settings,
        versions={package: version(package) for package in PACKAGES},
    )
    write_json(folder / RESULT_FILE, dataclasses.asdict(run))
    (folder / RESUME_FILE).unlink(missing_ok=True)  # often far larger than the student


def curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Scores against steps and seconds of training, from the records of a run."""
    points, seconds = [], 0.0
    for record in history:
        seconds += record.get("seconds", 0)
        if "metrics" in record:
            scores = {name: record["metrics"][name] for name in SCORES}
            points.append({"step": record["step"], "seconds": seconds} | scores)
    return points


def write_json(path: Path, content: Any) -> None:
    """Write plain values, atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
