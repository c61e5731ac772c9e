"""All settings of a training run, in one frozen record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bpkd_sdk.errors import check_choice, did_you_mean

Precision = Literal["auto", "fp32", "fp16", "bf16"]
Optimizer = Literal["sgd", "adamw"]
LabelSource = Literal["dataset", "teacher"]

DEFAULT_LEARNING_RATE: dict[str, float] = {"sgd": 0.01, "adamw": 6e-4}


@dataclass(frozen=True)
class TrainingConfig:
    """Settings shared by `train` and `distill`.

    Attributes:
        steps: Optimiser steps.
        batch_size: Images a step.
        crop_size: (height, width) of the training crops; None: the first image's size, at most 512 a side.
        learning_rate: At the first step; None: 0.01 for SGD, 6e-4 for AdamW.
        optimizer: "sgd" (momentum 0.9, as in the paper) or "adamw".
        weight_decay: 5e-4 in the paper.
        poly_power: The rate falls as (1 - step / steps) ** poly_power.
        gradient_clip: Largest norm of all gradients together; None: no clipping.
        scale: Lowest and highest random scale of the images.
        student_feature: Path of the student's feature map, for methods that compare features (see
            `bpkd_sdk.features`); None: the last before its classifier.
        teacher_feature: Path of the teacher's feature map; None: the last before its classifier.
        aux_weight: Weight of the auxiliary head's cross-entropy, if the student has such a head.
        labels: "dataset", or "teacher": the teacher's own prediction stands in for labels.
        precision: "auto" is bf16 where the GPU has it, else fp16; fp32 on a CPU.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        workers: Processes that load data; None: none on a CPU, up to 8 beside a GPU.
        evaluate_every: Steps between evaluations; None: five in a run.
        checkpoint_every: Steps between checkpoints; None: at each evaluation.
        log_every: Steps between records in history.jsonl.
        boundary_width: Of the boundary metrics, see `evaluate`.
        check_data: Read all the data once before the first step, and refuse what cannot be used.
        seed: Of initial shuffling, augmentation and dropout.
    """

    steps: int = 40_000
    batch_size: int = 8
    crop_size: tuple[int, int] | None = None
    learning_rate: float | None = None
    optimizer: Optimizer = "sgd"
    weight_decay: float = 5e-4
    poly_power: float = 0.9
    gradient_clip: float | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    student_feature: str | None = None
    teacher_feature: str | None = None
    aux_weight: float = 0.4
    labels: LabelSource = "dataset"
    precision: Precision = "auto"
    device: str = "auto"
    workers: int | None = None
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    log_every: int = 10
    boundary_width: int | float = 3
    check_data: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {value}.")
        if self.crop_size is not None and min(self.crop_size) < 1:
            raise ValueError(f"Expected `crop_size` to be (height, width), but got {self.crop_size}.")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"Expected `scale` to be (lowest, highest) above 0, but got {self.scale}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"Expected `learning_rate` to be above 0, but got {self.learning_rate}.")
        check_choice("optimizer", self.optimizer, get_args(Optimizer))
        check_choice("labels", self.labels, get_args(LabelSource))
        check_choice("precision", self.precision, get_args(Precision))

    @property
    def peak_learning_rate(self) -> float:
        """The rate at the first step."""
        return DEFAULT_LEARNING_RATE[self.optimizer] if self.learning_rate is None else self.learning_rate

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations."""
        return self.evaluate_every or max(1, self.steps // 5)

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints."""
        return self.checkpoint_every or self.evaluation_interval

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TrainingConfig:
        """Build from keyword options or JSON values.

        Raises:
            TypeError: For an unknown option; the nearest is named.
            ValueError: For a value out of its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                raise TypeError(f"Unknown option {key!r}.{did_you_mean(key, known)} Options are: {', '.join(known)}.")
        values = dict(options)
        for key in ("crop_size", "scale"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        return cls(**values)
