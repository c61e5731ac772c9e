"""What all runs of a comparison share, and how one of them is made: same data, same start, another method."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bpkd_sdk.comparison.budget import Budget
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.models import get_spec
from bpkd_sdk.models.checkpoint import content_hash
from bpkd_sdk.training.accelerator import create_accelerator, teacher_dtype
from bpkd_sdk.training.api import distill, train
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.loop import TrainingResult
from bpkd_sdk.training.networks import match_teacher, open_network, open_teacher
from bpkd_sdk.training.provenance import fingerprint
from bpkd_sdk.training.teacher import Guide
from bpkd_sdk.training.teacher_check import warn_of_teacher

Teacher = nn.Module | str | Path
Student = nn.Module | str | Path | Callable[[int], nn.Module]

# Options that may change between the parts of a comparison; the device that was found may not.
MAY_CHANGE = ("device", "check_data", "check_teacher")


@dataclass(frozen=True)
class Contest:
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

    def open_teacher(self) -> Guide:
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
    with Path(teacher).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
