"""Options of a training run, as one frozen dataclass that checks its values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

from bpkd_sdk.errors import check_choice, did_you_mean
from bpkd_sdk.pixels import MAX_CHANNELS
from bpkd_sdk.sizes import check_size

Precision = Literal["auto", "fp32", "fp16", "bf16"]
Optimizer = Literal["sgd", "adamw"]
LabelSource = Literal["dataset", "teacher"]
LabelLoss = Literal["ce", "dice", "focal", "lovasz"]

DEFAULT_LEARNING_RATE: dict[str, float] = {"sgd": 0.01, "adamw": 6e-4}
MINIMUM = {
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "log_every": 1,
    "evaluate_every": 1,
    "checkpoint_every": 1,
    "learning_rate_warmup": 0,
    "method_warmup": 0,
    "weight_decay": 0,
    "aux_weight": 0,
    "freeze_encoder_steps": 0,
    "workers": 0,
    "seed": 0,
    "views": 1,
    "teacher_top_k": 1,
}

# Types that are checked, by the annotation of a field without "| None".
_TUPLE = (tuple, list), "a tuple of numbers"
CHECKED_TYPES: dict[str, tuple[Any, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "int | float": (Real, "a number"),
    "tuple[float, float]": _TUPLE,
    "tuple[float, ...]": _TUPLE,
}

# Options without an effect in training without a teacher.
TEACHER_OPTIONS = (
    "labels",
    "method_warmup",
    "student_feature",
    "teacher_feature",
    "teacher_precision",
    "teacher_mean",
    "teacher_std",
    "teacher_scale",
    "teacher_augment",
    "teacher_cache",
    "views",
    "teacher_top_k",
    "check_teacher",
)

# Options of a teacher's cache: those that choose the crops and the teacher's outputs, and how they are computed.
CACHE_OPTIONS = (
    "batch_size",
    "crop_size",
    "scale",
    "base_size",
    "max_class_share",
    "teacher_feature",
    "precision",
    "teacher_mean",
    "teacher_std",
    "teacher_scale",
    "teacher_augment",
    "views",
    "teacher_top_k",
    "channels_last",
    "compile",
    "device",
    "workers",
    "check_data",
    "check_teacher",
    "match_classes",
)


@dataclass(frozen=True)
class TrainingConfig:
    """Options of a training run, shared by `train` and `distill`.

    Attributes:
        steps: Number of optimiser steps.
        batch_size: Number of images per step, over all processes.
        accumulate: Number of micro-batches that a batch is split into, which pass through the networks one after the
            other to save memory. Only operations that compare images of a batch depend on it: batch norm, CIRKD's
            mini-batch term, the Dice and Lovasz losses, and the critics of SKDS and IFVD, which do one step per
            micro-batch.
        crop_size: (height, width) of the training crops; None: the median size of the images, at most 512
            per side; see `bpkd_sdk.training.crop.default_crop`.
        learning_rate: Learning rate at the first step, without warm-up; None: 0.01 for SGD, 6e-4 for AdamW.
        optimizer: "sgd" (momentum 0.9, as in the paper) or "adamw".
        weight_decay: Weight decay; 5e-4 in the paper.
        poly_power: Exponent of the learning rate's decay to `final_learning_rate`: (1 - step / steps) ** exponent.
        final_learning_rate: Learning rate at the end of the decay; 1e-4 in the paper's configurations.
        learning_rate_warmup: Number of steps of a linear rise of the learning rate at the start.
        method_warmup: Number of steps of a linear rise of the weights of the method's terms at the start.
        gradient_clip: Largest norm of all gradients together; None: no clipping.
        scale: Lowest and highest random scale of the images.
        base_size: (longer side, shorter side) of the rectangle that images are fitted into before the random scale,
            with their aspect ratio; None: images keep their size.
        max_class_share: Largest share of labelled pixels that one class may fill in a crop; crops above it are drawn
            again, at most ten times. 1 accepts every crop.
        student_feature: Module path of the student's feature map, for methods that compare features (see
            `bpkd_sdk.features`); None: the last one before its classifier.
        teacher_feature: Module path of the teacher's feature map; None: the last one before its classifier.
        losses: Losses on the labels, each a name, or a name and a weight as in "dice:0.5": "ce" (cross-entropy), and
            "dice", "focal" and "lovasz" of segmentation-models-pytorch.
        class_weights: Weight of each class in the cross-entropy: one number per class, or "balanced" for
            w_c = N / (K n_c), where n_c of the N labelled training pixels have the class c, and K classes occur.
        aux_weight: Weight of the same losses on the logits of the auxiliary head, for a student with one.
        freeze_encoder_steps: Number of steps at the start during which the student's encoder does not change; its batch
            norm then uses its stored statistics.
        backbone_weights: Weights that the encoder of a network given by name starts from: "imagenet" (downloaded by the
            network's library), "none" for random ones, or the path of a file with a state dict of the encoder.
        labels: "dataset", or "teacher", which replaces all labels by the teacher's predictions.
        precision: "auto", "fp32", "fp16" or "bf16"; "auto" is bf16 on a GPU that supports it, fp16 on other GPUs and
            fp32 on a CPU.
        teacher_precision: Precision of the teacher, as `precision`; None: that of the student.
        teacher_mean: Mean per channel of images in 0..1, for a teacher in an ONNX file that does not contain it;
            None: ImageNet's.
        teacher_std: Standard deviation per channel of images in 0..1, for the same teachers; None: ImageNet's.
        teacher_scale: Factor on the size of the crops for the teacher, which are resized bilinearly; the result is
            rounded to a size that the teacher accepts. 1.5 costs 2.25 times as much. Methods that compare features use
            the feature map of this size.
        teacher_augment: Further views of the crops for the teacher: "flip" adds the mirror image of every view, a
            number a view at `teacher_scale` times this factor. Probabilities are averaged over all views, features are
            those of the view without augmentation. A view costs its scale squared: ("flip", 0.75, 1.25) is 2 (1 +
            0.75^2 + 1.25^2) = 6.25 times as much as no augmentation.
        teacher_cache: Folder of the teacher's cache. The teacher's outputs are written there before the first step, for
            `views` crops of each image, and read from there by this and all further runs with the same teacher, data
            and crops, which do not load the teacher. The student's colours still vary at every step, and the teacher
            sees the images without them. None: the teacher runs at every step.
        views: Number of different crops of each image in the cache; None: as many as the cache has, and 12 in a new
            one.
        teacher_top_k: Number of largest logits that the cache keeps for each position; the others then share one logit.
            None: all. It saves space if there are many classes, and the error is measured.
        channels_last: Whether networks and images use the channels-last memory format, in which GPUs convolve fastest
            in half precision.
        compile: Whether student and teacher are compiled by torch.compile; the first step then takes a minute.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        workers: Number of processes that load data for each training process; None: 0 on a CPU, up to 8 with a GPU.
        evaluate_every: Number of steps between evaluations; None: a fifth of the steps, rounded up.
        checkpoint_every: Number of steps between checkpoints; None: one checkpoint per evaluation.
        log_every: Number of steps between records in history.jsonl.
        trackers: Experiment trackers that receive the records too, by accelerate's names: "tensorboard", "wandb", ...
        boundary_width: Distance of the boundary metrics in pixels, or as a share of the diagonal if below 1.
        check_data: Whether all data are read once before the first step, to find samples that cannot be used.
        check_teacher: Whether the teacher runs on a few training images before the first step, to warn about a wrong
            normalisation, a wrong order of channels or classes, or missing weights.
        match_classes: Whether classes of teacher and student are matched to the data's by name and put in the data's
            order; False uses them by position.
        seed: Seed of shuffling, augmentation and dropout.
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
    losses: tuple[str, ...] = ("ce",)
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    aux_weight: float = 0.4
    freeze_encoder_steps: int = 0
    backbone_weights: str = "imagenet"
    labels: LabelSource = "dataset"
    precision: Precision = "auto"
    teacher_precision: Precision | None = None
    teacher_mean: tuple[float, ...] | None = None
    teacher_std: tuple[float, ...] | None = None
    teacher_scale: float = 1.0
    teacher_augment: tuple[str | float, ...] = ()
    teacher_cache: str | None = None
    views: int | None = None
    teacher_top_k: int | None = None
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
        _ = self.loss_weights  # raises an error if `losses` cannot be read
        self._check_class_weights()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            annotation = str(field.type).removesuffix(" | None")
            if annotation not in CHECKED_TYPES or (value is None and field.default is None):
                continue
            types, description = CHECKED_TYPES[annotation]
            if isinstance(value, bool) or not isinstance(value, types):
                raise ValueError(f"Expected `{field.name}` to be {description}, but got {value!r}.")
        for name, minimum in MINIMUM.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"Expected `{name}` to be at least {minimum}, but got {value}.")
        for name in ("gradient_clip", "learning_rate", "poly_power", "teacher_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Expected `{name}` to be above 0, but got {value}.")
        for name in ("teacher_mean", "teacher_std"):
            value = getattr(self, name)
            if value is not None and not 1 <= len(value) <= MAX_CHANNELS:
                raise ValueError(
                    f"Expected `{name}` to be 1 to {MAX_CHANNELS} numbers, one per channel, but got {value}."
                )
        _check_augmentation(self.teacher_augment)
        for name in ("crop_size", "base_size"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_size(name, value))
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"Expected `scale` to be (lowest, highest) above 0, but got {self.scale}.")
        if self.base_size is not None and self.base_size[0] < self.base_size[1]:
            raise ValueError(f"Expected `base_size` to be (longer side, shorter side), but got {self.base_size}.")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"Expected `max_class_share` to be above 0, at most 1, but got {self.max_class_share}.")
        if not 0 <= self.final_learning_rate <= self.start_learning_rate:
            raise ValueError(
                f"Expected `final_learning_rate` to be between 0 and the learning rate at the start, "
                f"{self.start_learning_rate}, but got {self.final_learning_rate}."
            )
        for name in ("views", "teacher_top_k"):
            if self.teacher_cache is None and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value} needs a teacher's cache. Pass its folder as teacher_cache, or leave it out."
                )
        check_choice("optimizer", self.optimizer, get_args(Optimizer))
        check_choice("labels", self.labels, get_args(LabelSource))
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("teacher_precision", self.teacher_precision, (*get_args(Precision), None))

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss on the labels by name."""
        if not isinstance(self.losses, (tuple, list)) or not all(isinstance(entry, str) for entry in self.losses):
            raise ValueError(f"Expected `losses` to be a tuple such as ('ce', 'dice:0.5'), but got {self.losses!r}.")
        weights: dict[str, float] = {}
        for entry in self.losses:
            name, _, text = entry.partition(":")
            check_choice("losses", name, get_args(LabelLoss))
            try:
                weight = float(text or 1)
            except ValueError:
                weight = math.nan
            if not 0 < weight < math.inf or name in weights:
                raise ValueError(
                    f"Expected each entry of `losses` to be another name, or a name with a weight above 0 such as "
                    f"'dice:0.5', but got {self.losses}."
                )
            weights[name] = weight
        if not weights:
            raise ValueError("Expected at least one name in `losses`, but got none. The default is ('ce',).")
        return weights

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if weights is None:
            return
        if isinstance(weights, (tuple, list)):
            numbers = [isinstance(weight, Real) and not isinstance(weight, bool) for weight in weights]
            valid = all(numbers) and all(0 <= weight < math.inf for weight in weights) and any(weights)
        else:
            valid = weights == "balanced"
        if not valid:
            raise ValueError(
                "Expected `class_weights` to be 'balanced', or one number per class, 0 or above and not all 0, but got "
                f"{weights!r}."
            )
        if "ce" not in self.loss_weights:
            raise ValueError(
                f"`class_weights` apply to the cross-entropy, and `losses` is {self.losses}. Add 'ce' to `losses`, or "
                "leave `class_weights` out."
            )

    @property
    def start_learning_rate(self) -> float:
        """Learning rate at the first step: `learning_rate`, or the optimiser's default."""
        return DEFAULT_LEARNING_RATE[self.optimizer] if self.learning_rate is None else self.learning_rate

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        fall = self.start_learning_rate - self.final_learning_rate
        rate = self.final_learning_rate + fall * math.pow(1 - step / self.steps, self.poly_power)
        return _ramp(step, self.learning_rate_warmup) * rate

    def method_factor_at(self, step: int) -> float:
        """Return the factor on the method's terms at a step, counted from 0: above 0, at most 1."""
        return _ramp(step, self.method_warmup)

    @property
    def evaluation_interval(self) -> int:
        """Number of steps between evaluations."""
        return self.evaluate_every or math.ceil(self.steps / 5)

    @property
    def checkpoint_interval(self) -> int:
        """Number of steps between checkpoints."""
        return self.checkpoint_every or self.evaluation_interval

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TrainingConfig:
        """Create a configuration from keyword options or JSON values.

        Raises:
            TypeError: For an unknown option; the nearest known one is named.
            ValueError: For a value out of its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                names = [*known, "class_names", "class_map", "output_dir", "protocol", "resume", "transform"]
                raise TypeError(f"Unknown option {key!r}.{did_you_mean(key, names)} Options are: {', '.join(names)}.")
        values = dict(options)
        for key, value in options.items():
            if isinstance(value, list):
                values[key] = tuple(value)
            if isinstance(value, Path):
                values[key] = str(value)
        return cls(**values)


def _check_augmentation(augment: object) -> None:
    """Raise ValueError unless `teacher_augment` is a tuple of "flip" and scales other than 1, each once."""
    items: list[Any] = list(augment) if isinstance(augment, (tuple, list)) else [None]
    scales = [item for item in items if item != "flip"]
    is_number = all(isinstance(item, Real) and not isinstance(item, bool) for item in scales)
    if (
        not is_number
        or not all(0 < scale < math.inf and scale != 1 for scale in scales)
        or len(set(items)) < len(items)
    ):
        raise ValueError(
            'Expected `teacher_augment` to be a tuple of "flip" and scales above 0, such as ("flip", 0.75, 1.25), each '
            f"once and without 1, which is always a view, but got {augment!r}."
        )


def _ramp(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
