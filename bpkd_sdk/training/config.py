"""All settings of a training run, in one frozen record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bpkd_sdk.errors import check_choice, did_you_mean

Precision = Literal["auto", "fp32", "fp16", "bf16"]
Optimizer = Literal["sgd", "adamw"]
LabelSource = Literal["dataset", "teacher"]

DEFAULT_LEARNING_RATE: dict[str, float] = {"sgd": 0.01, "adamw": 6e-4}
LEAST = {
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "log_every": 1,
    "evaluate_every": 1,
    "checkpoint_every": 1,
    "learning_rate_warmup": 0,
    "method_warmup": 0,
}


@dataclass(frozen=True)
class TrainingConfig:
    """Settings shared by `train` and `distill`.

    Attributes:
        steps: Optimiser steps.
        batch_size: Images a step, of all processes together.
        accumulate: Parts that a step's images go through the networks in, one after the other, to save memory. Only
            what compares the images of a batch notices: batch norm, CIRKD's mini-batch term, and the critics of SKDS
            and IFVD, which make a step with each part.
        crop_size: (height, width) of the training crops; None: the first image's size, at most 512 a side.
        learning_rate: At the first step, without warm-up; None: 0.01 for SGD, 6e-4 for AdamW.
        optimizer: "sgd" (momentum 0.9, as in the paper) or "adamw".
        weight_decay: 5e-4 in the paper.
        poly_power: The rate falls to `final_learning_rate` as (1 - step / steps) ** poly_power.
        final_learning_rate: What the rate falls to; 1e-4 in the paper's configurations.
        learning_rate_warmup: Steps over which the rate first rises, linearly, to where it then falls.
        method_warmup: Steps over which the method's terms rise, linearly, to their full weight.
        gradient_clip: Largest norm of all gradients together; None: no clipping.
        scale: Lowest and highest random scale of the images.
        base_size: (longer side, shorter side) that images are fitted into at scale 1; None: they stay as they are.
        max_class_share: Crops of which one class fills more than this share, void apart, are drawn again, ten times at
            most; 1: any crop will do.
        student_feature: Path of the student's feature map, for methods that compare features (see
            `bpkd_sdk.features`); None: the last before its classifier.
        teacher_feature: Path of the teacher's feature map; None: the last before its classifier.
        aux_weight: Weight of the auxiliary head's cross-entropy, if the student has such a head.
        labels: "dataset", or "teacher": the teacher's own prediction stands in for labels.
        precision: "auto" is bf16 where the GPU has it, else fp16; fp32 on a CPU.
        teacher_precision: Of the teacher alone; None: as `precision`.
        teacher_mean: For a teacher in an ONNX file that does not say it: what it expects to be subtracted from images
            in 0..1, per RGB channel; None: ImageNet's.
        teacher_std: And what they are divided by then; None: ImageNet's.
        channels_last: Keep networks and images in the memory format that GPUs convolve fastest in half precision.
        compile: Compile student and teacher with torch.compile; the first step then takes a minute.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        workers: Processes that load data beside each training process; None: none on a CPU, up to 8 beside a GPU.
        evaluate_every: Steps between evaluations; None: five in a run.
        checkpoint_every: Steps between checkpoints; None: at each evaluation.
        log_every: Steps between records in history.jsonl.
        trackers: Experiment trackers that get the records too, by accelerate's names: "tensorboard", "wandb", ...
        boundary_width: Of the boundary metrics, see `evaluate`.
        check_data: Read all the data once before the first step, and refuse what cannot be used.
        check_teacher: Score the teacher on a few training images before the first step, and warn of what does not fit.
        match_classes: Hold the class names of teacher and student against the data's, and put their classes in the
            data's order; False takes them by position.
        seed: Of initial shuffling, augmentation and dropout.
    """

    steps: int = 40_000
    batch_size: int = 8
    accumulate: int = 1
    crop_size: tuple[int, int] | None = None
    learning_rate: float | None = None
    optimizer: Optimizer = "sgd"
    weight_decay: float = 5e-4
    poly_power: float = 0.9
    final_learning_rate: float = 0.0
    learning_rate_warmup: int = 0
    method_warmup: int = 0
    gradient_clip: float | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    base_size: tuple[int, int] | None = None
    max_class_share: float = 1.0
    student_feature: str | None = None
    teacher_feature: str | None = None
    aux_weight: float = 0.4
    labels: LabelSource = "dataset"
    precision: Precision = "auto"
    teacher_precision: Precision | None = None
    teacher_mean: tuple[float, float, float] | None = None
    teacher_std: tuple[float, float, float] | None = None
    channels_last: bool = False
    compile: bool = False
    device: str = "auto"
    workers: int | None = None
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    log_every: int = 10
    trackers: tuple[str, ...] = ()
    boundary_width: int | float = 3
    check_data: bool = True
    check_teacher: bool = True
    match_classes: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}.")
        if self.crop_size is not None and min(self.crop_size) < 1:
            raise ValueError(f"Expected `crop_size` to be (height, width), but got {self.crop_size}.")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"Expected `scale` to be (lowest, highest) above 0, but got {self.scale}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"Expected `learning_rate` to be above 0, but got {self.learning_rate}.")
        if self.base_size is not None and not 1 <= self.base_size[1] <= self.base_size[0]:
            raise ValueError(f"Expected `base_size` to be (longer side, shorter side), but got {self.base_size}.")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"Expected `max_class_share` to be above 0, at most 1, but got {self.max_class_share}.")
        if not 0 <= self.final_learning_rate <= self.start_learning_rate:
            raise ValueError(
                f"Expected `final_learning_rate` to be between 0 and the rate at the start, "
                f"{self.start_learning_rate}, but got {self.final_learning_rate}."
            )
        check_choice("optimizer", self.optimizer, get_args(Optimizer))
        check_choice("labels", self.labels, get_args(LabelSource))
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("teacher_precision", self.teacher_precision, (*get_args(Precision), None))

    @property
    def start_learning_rate(self) -> float:
        """`learning_rate`, or the optimiser's own default."""
        return DEFAULT_LEARNING_RATE[self.optimizer] if self.learning_rate is None else self.learning_rate

    def learning_rate_at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        fall = self.start_learning_rate - self.final_learning_rate
        rate = self.final_learning_rate + fall * math.pow(1 - step / self.steps, self.poly_power)
        return _ramp(step, self.learning_rate_warmup) * rate

    def method_share_at(self, step: int) -> float:
        """What the method's terms are multiplied with at a step, counted from 0: above 0, at most 1."""
        return _ramp(step, self.method_warmup)

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
        for key, value in options.items():
            if isinstance(value, list):
                values[key] = tuple(value)
        return cls(**values)


def _ramp(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
