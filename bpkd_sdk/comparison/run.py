"""One run: trained, scored, measured, and kept in one JSON file that says it all."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bpkd_sdk.comparison.memory import MemoryMeter
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.evaluation import MetricCounts, Metrics
from bpkd_sdk.features import eval_mode
from bpkd_sdk.files import file_sha256, read_json, write_json
from bpkd_sdk.losses import METHODS, DistillationLoss, Method, create_method
from bpkd_sdk.models import get_spec
from bpkd_sdk.models.checkpoint import FORMAT, content_hash, write_tensors
from bpkd_sdk.progress import track
from bpkd_sdk.runtime import TorchRuntime
from bpkd_sdk.training.accelerator import create_accelerator, teacher_dtype
from bpkd_sdk.training.api import distill, train
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.loop import TrainingResult
from bpkd_sdk.training.prepare import match_teacher, open_network, open_teacher
from bpkd_sdk.training.records import RESUME_FILE, fingerprint, read_history
from bpkd_sdk.training.teacher import TeacherModel
from bpkd_sdk.training.teacher_check import warn_of_teacher

ALONE = "alone"  # the student without a teacher, which the methods are measured by

Methods = str | Sequence[str] | Mapping[str, Method]


def named_methods(methods: Methods, num_classes: int, ignore_index: int) -> dict[str, DistillationLoss | None]:
    """Each method under its name, the student alone (None) first.

    Args:
        methods: "all"; names, a list or with commas between, where "bpkd+cwd" composes two; or a mapping from any name
            to a method as `distill` takes it.
        num_classes: Of the data.
        ignore_index: Of the data.

    Raises:
        ValueError: For an unknown method, or a name that no folder can have.
    """
    if isinstance(methods, str):
        methods = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    if not isinstance(methods, Mapping):
        methods = {name: _parts(name) for name in methods}
    chosen: dict[str, DistillationLoss | None] = {ALONE: None}
    for name, method in methods.items():
        if not re.fullmatch(r"[\w+. ()-]*\w[\w+. ()-]*", name):
            raise ValueError(
                f"Expected a method's name to be of letters, digits, spaces and +-_.() only, but got {name!r}."
            )
        if name != ALONE:
            chosen[name] = create_method(method, num_classes, ignore_index=ignore_index)
    return chosen


def _parts(name: str) -> Method:
    parts = name.split("+")
    return parts if len(parts) > 1 else name


FIRST_TRIAL = 30  # steps of the first attempt to time a method
LOG_EVERY = 5  # steps between two readings of the clock; what lies before the first is warm-up
LONGEST_TRIAL = 30.0  # seconds


@dataclass(frozen=True)
class Budget:
    """An amount of training.

    Attributes:
        unit: "steps" or "seconds".
        amount: How many; steps are whole.
    """

    unit: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "steps=300" or "seconds=600".

        Raises:
            ValueError: For anything else.
        """
        unit, _, number = text.partition("=")
        try:
            amount = float(int(number) if unit == "steps" else float(number))
        except ValueError:
            amount = math.nan
        if unit not in ("steps", "seconds") or not 0 < amount < math.inf:
            raise ValueError(f"Expected `budget` to be like 'steps=300' or 'seconds=600', but got {text!r}.")
        return cls(unit, amount)

    def __str__(self) -> str:
        return f"{self.unit}={self.amount:g}"

    def steps(self, ms_per_step: float) -> int:
        """Steps that fit into the seconds.

        Args:
            ms_per_step: Milliseconds that one step takes.

        Raises:
            ValueError: If not one step fits.
        """
        steps = int(1000 * self.amount / ms_per_step)
        if steps < 1:
            raise ValueError(f"A step takes {ms_per_step / 1000:.3g} s, so a budget of {self} holds none. Raise it.")
        return steps


def step_times(history: list[dict[str, Any]]) -> list[float]:
    """Milliseconds a step in each stretch of a run's history, evaluations left out."""
    times, last = [], 0
    for record in history:
        if "terms" in record:
            times.append(1000 * record["seconds"] / (record["step"] - last))
            last = record["step"]
    return times


def time_per_step(train: Callable[[int], list[dict[str, Any]]], seconds: float) -> float:
    """Milliseconds a step takes: the median over the stretches of a trial, the first left out.

    The trial is long enough to say: a twentieth of what it is asked for, but no more than half a minute.

    Args:
        train: Trains for so many steps with a record every `LOG_EVERY`, and returns the history.
        seconds: To be filled with steps.
    """
    steps = FIRST_TRIAL
    while True:
        times = step_times(train(steps))[1:]
        if LOG_EVERY * sum(times) / 1000 >= min(LONGEST_TRIAL, seconds / 20):
            return median(times)
        steps *= 4


Teacher = nn.Module | str | Path
Student = nn.Module | str | Path | Callable[[int], nn.Module]

# Options that may change between the parts of a comparison; the device that was found may not.
MAY_CHANGE = ("device", "check_data", "check_teacher")


@dataclass(frozen=True)
class ComparisonSetup:
    """The equal terms.

    Attributes:
        teacher: A module in eval mode, or a file that `distill` takes.
        student: A module or a checkpoint to start from, a name, or what makes a student from a number of classes.
        train: Training data.
        val: Validation data.
        budget: Of every run.
        device: Where the runs are.
        options: Further options of `distill`, the same for every run.
    """

    teacher: Teacher
    student: Student
    train: SegmentationDataset
    val: SegmentationDataset
    budget: Budget
    device: torch.device
    options: dict[str, Any]

    def new_student(self, seed: int) -> nn.Module:
        """The student before training; random weights follow from the seed alone, whatever the method."""
        torch.manual_seed(seed)
        if isinstance(self.student, nn.Module):
            return copy.deepcopy(self.student)
        if not isinstance(self.student, (str, Path)):
            return self.student(self.train.num_classes)
        return open_network(self.student, self.train.num_classes)

    def open_teacher(self) -> TeacherModel:
        """The teacher, ready to be asked."""
        config = TrainingConfig.from_options(self.options)
        return open_teacher(self.teacher, self.train.num_classes, config, self.device)

    def check_teacher(self) -> None:
        """Warn of what does not fit in the teacher, once for all runs; ValueError if its outputs are not finite."""
        config = TrainingConfig.from_options(self.options)
        teacher = match_teacher(self.open_teacher(), self.train, config)
        dtype = teacher_dtype(config, create_accelerator(config))
        height, width = self.options["crop_size"]
        warn_of_teacher(teacher, self.train, (height, width), self.device, dtype, config.base_size)

    def fit(
        self,
        method: DistillationLoss | None,
        student: nn.Module,
        val: SegmentationDataset | None,
        output_dir: Path,
        **options: Any,
    ) -> TrainingResult:
        """Train a student, or go on with it: with a copy of the method, or alone (None).

        Args:
            method: Not changed.
            student: As `new_student` makes it.
            val: To evaluate on along the run, or None.
            output_dir: The folder of the run.
            **options: Options of `distill` on top of those that all runs share.
        """
        options = self.options | options | {"output_dir": output_dir, "resume": True}
        if method is None:
            return train(student, (self.train, val), **options)
        teacher = copy.deepcopy(self.teacher)
        return distill(teacher, student, (self.train, val), method=copy.deepcopy(method), **options)

    def settings(self) -> dict[str, Any]:
        """What must not change while the runs are made, as plain JSON values."""
        student = self.new_student(0)
        return {
            "budget": str(self.budget),
            "train": _described(self.train),
            "val": _described(self.val),
            "teacher": _identity(self.teacher),
            "student": {
                "network": get_spec(student).name or type(student).__name__,
                "weights_of_seed_0": content_hash(student.state_dict()),
            },
            "options": {name: value for name, value in self.options.items() if name not in MAY_CHANGE},
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "threads": torch.get_num_threads(),
        }


def _described(data: SegmentationDataset) -> dict[str, Any]:
    return {"name": data.name, "images": len(data), "fingerprint": fingerprint(data)}


def _identity(teacher: Teacher) -> str:
    """Which teacher it is: a hash of its weights, or of its file."""
    if isinstance(teacher, nn.Module):
        return content_hash(teacher.state_dict())
    return file_sha256(teacher)


def write_image_counts(path: Path, model: nn.Module, dataset: SegmentationDataset, metrics: Metrics) -> None:
    """Write the counts of each image of a data set, int64, as safetensors.

    ``region`` (N, 3, C): pixels that are right, of the label, of the prediction. ``boundary`` (N, 3, C): pixels of
    both inner boundaries, of the label's, of the prediction's. ``contour`` (N, 4, C): the label's contour pixels
    matched and all, the prediction's matched and all. ``band`` (N, 2, 2): in the edge band and outside, pixels right
    and all.

    Args:
        path: Of the file.
        model: It stays in the mode it is in.
        dataset: Images and labels.
        metrics: The scores over the whole data set, whose widths are used.
    """
    with eval_mode(model):
        runtime = TorchRuntime(model)
        images = track(range(len(dataset)), total=len(dataset), description=f"Counting in {dataset.name}")
        each = [_counts(runtime, *dataset[index], dataset, metrics) for index in images]
    tensors = {name: torch.stack([counts[name] for counts in each]) for name in each[0]}
    header = {"format": FORMAT, "data": dataset.name, "classes": dataset.class_names}
    write_tensors(path, tensors, header | {"boundary_width": metrics.boundary_width, "edge_width": metrics.edge_width})


def _counts(
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
    region = torch.stack([confusion.diag(), confusion.sum(1), confusion.sum(0)])
    return {"region": region, "boundary": counts.boundary, "contour": counts.contour, "band": counts.band}


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


def run_one(
    setup: ComparisonSetup,
    name: str,
    method: DistillationLoss | None,
    *,
    seed: int,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Train a student, or go on with it, score it, and write what `read_run` reads to its folder."""
    steps, done_before = settings["plan"]["steps"], len(read_history(folder))
    meter = MemoryMeter(setup.device)
    student = setup.new_student(seed)
    first_weights = content_hash(student.state_dict())
    metrics, error = None, None
    options = {"steps": steps, "seed": seed}
    options["evaluate_every"] = setup.options["evaluate_every"] or math.ceil(steps / EVALUATIONS)
    try:
        metrics = setup.fit(method, student, setup.val, folder, **options).metrics
    except FloatingPointError as stopped:
        error = str(stopped)
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
