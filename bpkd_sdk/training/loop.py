"""The training loop, one for supervised training and for distillation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.errors import check_choice
from bpkd_sdk.evaluation import Metrics, evaluate
from bpkd_sdk.evaluation.inference import to_mask
from bpkd_sdk.features import Capture
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.losses.method import at_least_float32
from bpkd_sdk.models import get_spec, save_model
from bpkd_sdk.models.checkpoint import SUFFIX
from bpkd_sdk.output import SegmentationOutput, as_output
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.interrupt import deferred_interrupt
from bpkd_sdk.training.live import LiveView
from bpkd_sdk.training.loader import mixed_seed, training_loader
from bpkd_sdk.training.state import (
    RESUME_FILE,
    Position,
    append_history,
    read_history,
    restore_state,
    save_state,
    truncate_history,
)

LAST, BEST = f"last{SUFFIX}", f"best{SUFFIX}"


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves.

    Attributes:
        model: The student with its final weights, in eval mode.
        metrics: Scores of `model` on the validation data; None without any.
        history: The records of history.jsonl: loss terms every few steps, scores at each evaluation.
        checkpoint: Final weights, self-describing; ``best.safetensors`` beside it has those of the highest mIoU.
        output_dir: The folder of the run.
    """

    model: nn.Module
    metrics: Metrics | None
    history: list[dict[str, Any]]
    checkpoint: Path
    output_dir: Path


@dataclass(frozen=True)
class Task:
    """Everything a run is about, resolved and checked.

    Attributes:
        title: For the progress bar.
        student: The network to train; its spec holds the data's classes.
        teacher: In eval mode, or None for supervised training.
        method: The distillation method, prepared for the two networks, or None.
        features: Paths of the student's and the teacher's feature map, or None where the method takes none.
        train: Training data.
        val: Validation data, or None.
        crop_size: (height, width) of the training crops.
        config: All options.
        output_dir: Where the run writes.
    """

    title: str
    student: nn.Module
    teacher: nn.Module | None
    method: DistillationLoss | None
    features: tuple[str | None, str | None]
    train: SegmentationDataset
    val: SegmentationDataset | None
    crop_size: tuple[int, int]
    config: TrainingConfig
    output_dir: Path


def run(task: Task) -> TrainingResult:
    """Train from the start, or from the state found in the output folder, to the last step."""
    accelerator = create_accelerator(task.config)
    with _capture(task.student, task.features[0]) as student, _capture(task.teacher, task.features[1]) as teacher:
        metrics = _Trainer(task, accelerator, student, teacher).run()
    task.student.eval()
    return TrainingResult(task.student, metrics, read_history(task.output_dir), task.output_dir / LAST, task.output_dir)


def _capture(network: nn.Module | None, path: str | None) -> Capture:
    return Capture(nn.Identity(), []) if network is None or path is None else Capture(network, [path])


def create_accelerator(config: TrainingConfig) -> Accelerator:
    """Device and precision from the configuration.

    Raises:
        ValueError: If the device is not there.
    """
    kind = config.device.partition(":")[0]
    check_choice("device", kind, ("auto", "cpu", "cuda", "mps"))
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={config.device!r} was asked for, but torch sees no CUDA device. Run `bpkd doctor`.")
    if ":" in config.device:
        torch.cuda.set_device(config.device)
    on_cpu = kind == "cpu" or not torch.accelerator.is_available()
    # accelerate keeps one state a process; without this a second run could not choose another device or precision.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=_mixed_precision(config.precision, on_cuda=not on_cpu and torch.cuda.is_available()),
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
    )


def _mixed_precision(precision: str, *, on_cuda: bool) -> str:
    if precision == "auto" and on_cuda:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "no" if precision in ("auto", "fp32") else precision


class Objective(nn.Module):
    """Student and method as one module from a batch to its loss terms.

    One forward pass of one module is what distributed data parallelism and autocast wrap; the student inside stays as
    it is, so that it is evaluated and saved in full precision.
    """

    def __init__(
        self,
        student: nn.Module,
        capture: Capture,
        method: DistillationLoss | None,
        config: TrainingConfig,
        ignore_index: int,
    ) -> None:
        super().__init__()
        self.student = student
        self.capture = capture
        self.method = method
        self.spec = get_spec(student)
        self.config = config
        self.ignore_index = ignore_index

    def forward(self, images: Tensor, labels: Tensor, teacher: SegmentationOutput | None) -> dict[str, Tensor]:
        """Images (N, 3, h, w) uint8, labels (N, h, w) and the teacher's output -> weighted scalar terms by name."""
        if self.config.labels == "teacher" and teacher is not None:
            labels = torch.where(labels == self.ignore_index, labels, to_mask(_resized(teacher.logits, labels)))
        student = as_output(self.student(self.spec.normalize(images)))
        student = replace(student, features=self.capture.take())
        terms = {"ce": cross_entropy(student.logits, labels, self.ignore_index)}
        if student.aux_logits is not None:
            terms["aux"] = self.config.aux_weight * cross_entropy(student.aux_logits, labels, self.ignore_index)
        if self.method is not None and teacher is not None:
            terms |= self.method(student, teacher, labels)
        return terms


class _Trainer:
    """The moving parts of one run."""

    def __init__(self, task: Task, accelerator: Accelerator, student: Capture, teacher: Capture) -> None:
        self.task = task
        self.teacher_capture = teacher
        self.config = task.config
        self.accelerator = accelerator
        self.device = accelerator.device
        self.teacher = task.teacher.to(self.device) if task.teacher is not None else None
        self.state = Objective(task.student, student, task.method, task.config, task.train.ignore_index)
        self.state.to(self.device)
        trainable = [parameter for parameter in self.state.parameters() if parameter.requires_grad]
        optimizer = _create_optimizer(trainable, self.config)
        self.position = self._restore(optimizer)
        loader = training_loader(
            task.train,
            self.config,
            task.crop_size,
            first_step=self.position.step,
            on_gpu=self.device.type == "cuda",
        )
        self.objective, self.optimizer, self.loader = accelerator.prepare(self.state, optimizer, loader)
        self.metrics: Metrics | None = None

    def _restore(self, optimizer: torch.optim.Optimizer) -> Position:
        position, scaler = Position(), dict[str, Any]()
        if (self.task.output_dir / RESUME_FILE).is_file():
            position, scaler = restore_state(self.task.output_dir, self.config, self.state, optimizer)
        if scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        truncate_history(self.task.output_dir, position.step)
        return position

    def run(self) -> Metrics | None:
        """All the steps that are left; returns the scores of the final weights."""
        config, view = self.config, LiveView(self.task.title, self.config.steps, self.position.step)
        window = _Window(self.position.step)
        self.objective.train()
        with deferred_interrupt() as interrupted, view:
            for images, labels in self.loader:
                window.add(self._step(self.position.step, images, labels), len(images))
                step = self.position.step + 1
                self.position = replace(self.position, step=step)
                view.step(step)
                evaluating = step % config.evaluation_interval == 0 or step == config.steps
                saving = evaluating or step % config.checkpoint_interval == 0 or interrupted.is_set()
                if saving or step % config.log_every == 0:
                    self._log(window.record(step, self.optimizer.param_groups[0]["lr"]), view)
                    if evaluating:
                        self._evaluate(view)
                    if saving:
                        self._save()
                    window = _Window(step)
                if interrupted.is_set() and step < config.steps:
                    raise KeyboardInterrupt(f"stopped after step {step}; go on with resume=True")
        return self.metrics if self.metrics is not None else self._score()

    def _log(self, record: dict[str, Any], view: LiveView) -> None:
        self.position = replace(self.position, seconds=self.position.seconds + record["seconds"])
        append_history(self.task.output_dir, record)
        view.log(record)

    def _step(self, step: int, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.peak_learning_rate * (1 - step / self.config.steps) ** self.config.poly_power
        # Every step has its own random stream (dropout), so a resumed run has nothing to restore.
        torch.manual_seed(mixed_seed(self.config.seed, 2, step))
        terms: dict[str, Tensor] = self.objective(images, labels, self._teach(images))
        self.optimizer.zero_grad()
        self.accelerator.backward(torch.stack(list(terms.values())).sum())
        if self.config.gradient_clip is not None:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def _teach(self, images: Tensor) -> SegmentationOutput | None:
        if self.teacher is None:
            return None
        with torch.inference_mode(), self.accelerator.autocast():
            output = as_output(self.teacher(get_spec(self.teacher).normalize(images)))
            features = self.teacher_capture.take()
        # Inference tensors cannot be saved for a backward pass; a clone made outside can.
        return SegmentationOutput(output.logits.clone(), {path: x.clone() for path, x in features.items()})

    def _score(self) -> Metrics | None:
        if self.task.val is None:
            return None
        return evaluate(
            self.task.student,
            self.task.val,
            boundary_width=self.config.boundary_width,
            device=self.device,
            reference=self.teacher if self.config.labels == "teacher" else None,
        )

    def _evaluate(self, view: LiveView) -> None:
        self.metrics = metrics = self._score()
        if metrics is None:
            return
        append_history(self.task.output_dir, {"step": self.position.step, "metrics": metrics.to_dict()})
        view.evaluated(self.position.step, {"mIoU": metrics.miou, "boundary IoU": metrics.boundary_iou})
        if metrics.miou > self.position.best_miou:
            self.position = replace(self.position, best_miou=metrics.miou)
            self._save_model(BEST)

    def _save(self) -> None:
        self._save_model(LAST)
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        save_state(self.task.output_dir, self.position, self.config, self.state, self.optimizer.optimizer, scaler)

    def _save_model(self, name: str) -> None:
        training = {
            "title": self.task.title,
            "data": self.task.train.name,
            "step": self.position.step,
            "config": self.config.to_dict(),
            "metrics": self.metrics.to_dict() if self.metrics is not None else None,
        }
        save_model(self.task.student, self.task.output_dir / name, training=training)


class _Window:
    """Means of the loss terms, and the speed, since the last record."""

    def __init__(self, step: int) -> None:
        self.first_step = step
        self.started = time.perf_counter()
        self.images = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor], images: int) -> None:
        """Add one step's terms, without waiting for the device."""
        self.images += images
        self.sums = {name: self.sums.get(name, torch.zeros_like(term)) + term for name, term in terms.items()}

    def record(self, step: int, learning_rate: float) -> dict[str, Any]:
        """What happened since the last record.

        Raises:
            FloatingPointError: If a term was not finite.
        """
        terms = {name: (total / (step - self.first_step)).item() for name, total in self.sums.items()}
        if broken := [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"The loss is not finite: {', '.join(broken)} between steps {self.first_step + 1} and {step}. "
                "The last checkpoint is older. Lower the learning rate, set gradient_clip, or use precision='fp32'."
            )
        seconds = time.perf_counter() - self.started
        return {
            "step": step,
            "loss": sum(terms.values()),
            "terms": terms,
            "learning_rate": learning_rate,
            "images_per_second": self.images / seconds,
            "seconds": seconds,
        }


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean over the pixels that are not void, on logits resized to the labels; 0 where all are void.

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W) int64.
        ignore_index: The void label.
    """
    total = F.cross_entropy(_resized(logits, labels), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def _resized(logits: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(at_least_float32(logits), labels.shape[1:], mode="bilinear", align_corners=False)


def _create_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    rate, decay = config.peak_learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)
