"""Setup of a comparison: its methods, the budget of each run, and everything that all runs share."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from bpkd_sdk.class_map import ClassGroups, ClassMap
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.losses import METHODS, DistillationLoss, Method, create_method
from bpkd_sdk.models import get_spec
from bpkd_sdk.models.checkpoint import content_hash
from bpkd_sdk.progress import without_facts
from bpkd_sdk.training.accelerator import create_accelerator, teacher_dtype
from bpkd_sdk.training.api import distill, teach, train
from bpkd_sdk.training.augmentation import Transform, describe_transform
from bpkd_sdk.training.config import CACHE_OPTIONS, TEACHER_OPTIONS, TrainingConfig
from bpkd_sdk.training.loop import TrainingResult
from bpkd_sdk.training.records import fingerprint
from bpkd_sdk.training.teacher import NetworkSource, TeacherModel, add_views, open_network, open_teacher
from bpkd_sdk.training.teacher_cache import TeacherCache, identify_teacher
from bpkd_sdk.training.teacher_check import warn_about_teacher

BASELINE = "alone"  # name of the baseline: the student trained without a teacher

FIRST_TRIAL_STEPS = 30  # steps of the first attempt to time a method
LOG_EVERY = 5  # steps per timed interval; the first interval is warm-up
MAX_TRIAL_SECONDS = 30.0

# Options that may change when a comparison resumes. The device in use is compared separately.
OPTIONS_NOT_COMPARED = ("device", "check_data", "check_teacher")

Methods = str | Sequence[str] | Mapping[str, Method]
StudentSource = NetworkSource | Callable[[int], nn.Module]


def named_methods(methods: Methods, num_classes: int, ignore_index: int) -> dict[str, DistillationLoss | None]:
    """Create each method under its name, after the baseline without a teacher (None).

    Args:
        methods: "all"; names, in a list or separated by commas, where "bpkd+cwd" combines two methods; or a mapping
            from any name to a method as `distill` accepts it.
        num_classes: Number of classes of the data.
        ignore_index: Void label of the data.

    Raises:
        ValueError: For an unknown method, or a name that cannot be the name of a folder.
    """
    if isinstance(methods, str):
        methods = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    if not isinstance(methods, Mapping):
        methods = {name: name.split("+") if "+" in name else name for name in methods}
    created: dict[str, DistillationLoss | None] = {BASELINE: None}
    for name, method in methods.items():
        if not re.fullmatch(r"[\w+. ()-]*\w[\w+. ()-]*", name):
            raise ValueError(
                f"Expected a method's name to consist of letters, digits, spaces and +-_.() only, but got {name!r}."
            )
        if name != BASELINE:
            created[name] = create_method(method, num_classes, ignore_index=ignore_index)
    return created


@dataclass(frozen=True)
class Budget:
    """Amount of training of each run.

    Attributes:
        unit: "steps" or "seconds".
        amount: Number of steps or seconds, above 0.
    """

    unit: str
    amount: float

    @classmethod
    def create(cls, steps: int | None, seconds: float | None) -> Budget:
        """Create a budget from exactly one of `steps` and `seconds`.

        Raises:
            ValueError: If both or neither are given, or the number is out of its range.
        """
        if (steps is None) == (seconds is None):
            raise ValueError(f"Expected either `steps` or `seconds`, but got steps={steps} and seconds={seconds}.")
        if steps is not None:
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ValueError(f"Expected `steps` to be a whole number of at least 1, but got {steps!r}.")
            return cls("steps", steps)
        if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise ValueError(f"Expected `seconds` to be a number above 0, but got {seconds!r}.")
        return cls("seconds", seconds)

    def __str__(self) -> str:
        return f"{self.unit}={self.amount:.15g}"

    def steps(self, ms_per_step: float) -> int:
        """Return the number of steps that fit into the seconds.

        Args:
            ms_per_step: Milliseconds per step.

        Raises:
            ValueError: If not even one step fits.
        """
        steps = int(1000 * self.amount / ms_per_step)
        if steps < 1:
            raise ValueError(
                f"One step takes {ms_per_step / 1000:.3g} s, more than the budget of {self}. Raise the budget."
            )
        return steps


def step_times(history: list[dict[str, Any]]) -> list[float]:
    """Return the milliseconds per step in each interval between two records of a history, without evaluations."""
    times, last = [], 0
    for record in history:
        if "terms" in record:
            times.append(1000 * record["seconds"] / (record["step"] - last))
            last = record["step"]
    return times


def time_per_step(train: Callable[[int], list[dict[str, Any]]], seconds: float) -> float:
    """Measure the milliseconds per step: the median over the intervals of a trial, without the first.

    The trial is repeated with four times the steps until it takes a twentieth of the budget, or half a minute.

    Args:
        train: Function that trains for a number of steps with one record per `LOG_EVERY` steps, and returns the
            history.
        seconds: Budget of a run.
    """
    steps = FIRST_TRIAL_STEPS
    while True:
        times = step_times(train(steps))[1:]
        if LOG_EVERY * sum(times) / 1000 >= min(MAX_TRIAL_SECONDS, seconds / 20):
            return median(times)
        steps *= 4


@dataclass(frozen=True, kw_only=True)
class ComparisonSetup:
    """Everything that all runs of a comparison share.

    Attributes:
        teacher: Module in eval mode, or path of a file that `distill` accepts.
        student: Module or checkpoint that every run starts from, name of a network, or function from a number of
            classes to a module.
        train: Training data.
        val: Validation data.
        budget: Budget of every run.
        device: Device of every run.
        transform: Augmentation of the training data in every run.
        options: Further options of `distill`, the same for every run.
        classes: The teacher's classes for each class of the data; None for the same classes in the same order.
    """

    teacher: NetworkSource
    student: StudentSource
    train: SegmentationDataset
    val: SegmentationDataset
    budget: Budget
    device: torch.device
    transform: Transform
    options: dict[str, Any]
    classes: ClassGroups | None = None

    @property
    def class_map(self) -> ClassMap | None:
        """Names or ids of the teacher's classes for each class of the data; None if both have the same classes."""
        return None if self.classes is None else self.classes.class_map

    def new_student(self, seed: int) -> nn.Module:
        """Create the student before training; random weights depend only on the seed, not on the method."""
        torch.manual_seed(seed)
        if isinstance(self.student, nn.Module):
            return copy.deepcopy(self.student)
        if callable(self.student):
            return self.student(self.train.num_classes)
        return open_network(self.student, self.train.num_classes, self.options["backbone_weights"], self.train.pixels)

    def open_teacher(self, *, augment: bool = True) -> TeacherModel:
        """Open the teacher with the views that it teaches with, as `distill` does, or with its main view only."""
        config = TrainingConfig.from_options(self.options)
        opened = open_teacher(self.teacher, self.train.num_classes, config, self.device, self.train.pixels)
        return add_views(opened, config.teacher_scale, config.teacher_augment if augment else ())

    def check_teacher(self) -> None:
        """Check the teacher once for all runs and warn about findings; ValueError if its outputs are not finite."""
        config = TrainingConfig.from_options(self.options)
        teacher = self.open_teacher(augment=False)
        dtype = teacher_dtype(config, create_accelerator(config))
        height, width = self.options["crop_size"]
        warn_about_teacher(teacher, self.train, (height, width), self.device, dtype, config.base_size, self.classes)

    def teach(self, *, features: bool) -> None:
        """Write the teacher's cache that the options name, unless it is complete."""
        folder = self.options["teacher_cache"]
        if folder is not None and ((cache := TeacherCache.find(folder)) is None or not cache.is_complete):
            options = {name: self.options[name] for name in CACHE_OPTIONS}
            options |= {"transform": self.transform, "features": features, "class_map": self.class_map}
            teach(copy.deepcopy(self.teacher), self.train, folder, **options)

    def train_student(
        self,
        method: DistillationLoss | None,
        student: nn.Module,
        val: SegmentationDataset | None,
        output_dir: Path,
        **options: Any,
    ) -> TrainingResult:
        """Train a student with a copy of a method, or without a teacher (None); resume a run that was stopped.

        Args:
            method: Method, which is not changed; None trains the baseline.
            student: Result of `new_student`.
            val: Data that are evaluated during the run; None for no evaluation.
            output_dir: Folder of the run.
            **options: Options of `distill` besides those that all runs share.
        """
        options = self.options | options | {"transform": self.transform, "output_dir": output_dir, "resume": True}
        with without_facts():
            if method is None:
                options = {name: value for name, value in options.items() if name not in TEACHER_OPTIONS}
                return train(student, (self.train, val), **options)
            teacher = copy.deepcopy(self.teacher)
            options["class_map"] = self.class_map
            return distill(teacher, student, (self.train, val), method=copy.deepcopy(method), **options)

    def settings(self) -> dict[str, Any]:
        """Return the settings that must be the same for all runs in one table, as plain JSON values."""
        student = self.new_student(0)
        return {
            "budget": str(self.budget),
            "train": _data_facts(self.train),
            "val": _data_facts(self.val),
            "teacher": identify_teacher(self.teacher, TrainingConfig.from_options(self.options))["sha256"],
            "class_map": self.class_map,
            "student": {
                "network": get_spec(student).name or type(student).__name__,
                "weights_of_seed_0": content_hash(student.state_dict()),
            },
            "transform": describe_transform(self.transform),
            "options": {name: value for name, value in self.options.items() if name not in OPTIONS_NOT_COMPARED},
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "threads": torch.get_num_threads(),
        }


def _data_facts(data: SegmentationDataset) -> dict[str, Any]:
    return {"name": data.name, "images": len(data), "fingerprint": fingerprint(data)}
