"""The training loop, one for supervised training and for distillation."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bpkd_sdk.data import DatasetSubset, SegmentationDataset
from bpkd_sdk.evaluation import EvaluationProtocol, Metrics, evaluate
from bpkd_sdk.features import Capture
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.models import save_model
from bpkd_sdk.models.checkpoint import SUFFIX
from bpkd_sdk.training.accelerator import broadcast_from_main, share_statistics, synchronize_batch_norm, teacher_dtype
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.loader import mixed_seed, training_loader
from bpkd_sdk.training.monitor import LiveView, LossTermMonitor, StepMeter, Trackers
from bpkd_sdk.training.objective import Objective
from bpkd_sdk.training.records import (
    HISTORY_FILE,
    RESUME_FILE,
    Position,
    append_history,
    check_same_inputs,
    read_history,
    restore_state,
    run_settings,
    save_state,
    truncate_history,
    write_run,
)
from bpkd_sdk.training.teacher import TeacherModel, create_teacher, to_device


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into an event to be looked at between steps; the second acts at once."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def request(_number: int, _frame: FrameType | None) -> None:
        requested.set()
        restore()

    for number in previous:
        signal.signal(number, request)
    try:
        yield requested
    finally:
        restore()


LAST, BEST = f"last{SUFFIX}", f"best{SUFFIX}"

Batch = tuple[Tensor, Tensor]


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
        teacher: A module in eval mode, a runtime that gives logits, or None for supervised training.
        method: The distillation method, prepared for the two networks, or None.
        features: Paths of the student's and the teacher's feature map, or None where the method takes none.
        train: Training data.
        val: Validation data, or None.
        crop_size: (height, width) of the training crops.
        config: All options.
        protocol: How validation images are segmented.
        output_dir: Where the run writes.
        accelerator: Device, precision and processes.
    """

    title: str
    student: nn.Module
    teacher: TeacherModel | None
    method: DistillationLoss | None
    features: tuple[str | None, str | None]
    train: SegmentationDataset
    val: SegmentationDataset | None
    crop_size: tuple[int, int]
    config: TrainingConfig
    protocol: EvaluationProtocol
    output_dir: Path
    accelerator: Accelerator


def run(task: Task) -> TrainingResult:
    """Train from the start, or from the state found in the output folder, to the last step."""
    with ExitStack() as stack:
        metrics = _Trainer(task, stack).run()
    task.student.eval()
    return TrainingResult(task.student, metrics, read_history(task.output_dir), task.output_dir / LAST, task.output_dir)


def _capture(network: TeacherModel | None, path: str | None) -> Capture:
    return Capture(network, [path]) if isinstance(network, nn.Module) and path else Capture(nn.Identity(), [])


class _Trainer:
    """The moving parts of one run."""

    def __init__(self, task: Task, stack: ExitStack) -> None:
        self.task = task
        self.config = config = task.config
        self.settings = run_settings(config, task.method, task.protocol)
        self.accelerator = task.accelerator
        device = self.accelerator.device
        if self.accelerator.num_processes > 1 and device.type == "cuda":  # torch has none for the CPU
            synchronize_batch_norm(task.student)
            synchronize_batch_norm(task.method or nn.Identity())
        # Hooks come before torch.compile's first forward pass, which ignores later ones, and after layers are replaced.
        student = stack.enter_context(_capture(task.student, task.features[0]))
        teacher = stack.enter_context(_capture(task.teacher, task.features[1]))
        dtype = teacher_dtype(config, self.accelerator)
        self.teacher = None if task.teacher is None else create_teacher(task.teacher, teacher, config, device, dtype)
        self.state = Objective(task.student, student, task.method, config, task.train.ignore_index)
        to_device(self.state, device, config)
        trainable = [parameter for parameter in self.state.parameters() if parameter.requires_grad]
        optimizer = _create_optimizer(trainable, config)
        self.position = self._restore(optimizer)
        if self.accelerator.is_main_process:
            write_run(task, self.position.step)
        self.trackers = stack.enter_context(Trackers(self.accelerator, config, task.output_dir))
        loader = training_loader(
            task.train, config, task.crop_size, first_step=self.position.step, on_gpu=device.type == "cuda"
        )
        self.objective, self.optimizer, self.loader = self.accelerator.prepare(self.state, optimizer, loader)
        if self.accelerator.num_processes > 1:
            # `share_statistics` does it when it counts; DDP would send CIRKD's memory, equal everywhere, at each step.
            self.objective.broadcast_buffers = False
        self.is_graph_known = False
        self.metrics: Metrics | None = None

    def _restore(self, optimizer: torch.optim.Optimizer) -> Position:
        folder = self.task.output_dir
        position, scaler = Position(), dict[str, Any]()
        if (folder / HISTORY_FILE).is_file() and self.accelerator.is_main_process:
            check_same_inputs(self.task)
        if (folder / RESUME_FILE).is_file():
            position, scaler = restore_state(folder, self.settings, self.state, optimizer)
        if broadcast_from_main(position.step) != position.step:
            raise ValueError(
                f"The main process goes on from another step than this one, which found step {position.step} in "
                f"{self.task.output_dir}. That folder must be the same on all machines: put it on a shared file system."
            )
        if scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        if self.accelerator.is_main_process:
            truncate_history(folder, position.step)
        # The state of a step is written before its evaluation, so the best score so far is in the history alone.
        scored = [record for record in read_history(folder, position.step) if "metrics" in record]
        best = max((_score_of(record) for record in scored), default=position.best_miou)
        due = self._is_evaluated_at(position.step) and not any(record["step"] == position.step for record in scored)
        self.evaluation_is_due, best = broadcast_from_main((due, best))
        return replace(position, best_miou=max(best, position.best_miou))

    def run(self) -> Metrics | None:
        """All the steps that are left; returns the scores of the final weights."""
        config, view = self.config, LiveView(self.task.title, self.config.steps, self.position.step)
        watch = LossTermMonitor(self.task.features)
        self.objective.train()
        with deferred_interrupt() as requested, view:
            if self.evaluation_is_due:  # the run was stopped between a checkpoint and its evaluation
                self._evaluate(view)
            meter = StepMeter(self.position.step)
            for parts in self._steps():
                terms, teacher = self._step(parts)
                meter.add(terms, config.batch_size, teacher)
                step = self.position.step + 1
                self.position = replace(self.position, step=step)
                view.step(step)
                evaluation_due = self._is_evaluated_at(step)
                saving = evaluation_due or step % config.checkpoint_interval == 0
                interrupted = self._agree_to_stop(requested, at_record=saving or step % config.log_every == 0)
                if saving or interrupted or step % config.log_every == 0:
                    self._log(meter, watch, view)
                    if saving or interrupted:
                        share_statistics(self.state, self.accelerator)
                        self._save()
                    if evaluation_due:
                        self._evaluate(view)
                    meter = StepMeter(step)
                if interrupted:
                    break
            if self._agree_to_stop(requested, at_record=True):
                raise KeyboardInterrupt(f"stopped after step {self.position.step}; go on with resume=True")
        return self.metrics if self.metrics is not None else self._score()

    def _is_evaluated_at(self, step: int) -> bool:
        return step > 0 and (step % self.config.evaluation_interval == 0 or step == self.config.steps)

    def _steps(self) -> Iterator[list[Batch]]:
        batches = iter(self.loader)
        while parts := list(islice(batches, self.config.accumulate)):
            yield parts

    def _agree_to_stop(self, requested: Event, *, at_record: bool) -> bool:
        """Whether to stop here. Several processes ask each other at records only, as it costs a wait for the device."""
        if self.accelerator.num_processes == 1:
            return requested.is_set()
        if not at_record:
            return False
        votes = torch.tensor(int(requested.is_set()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(votes).item())

    def _step(self, parts: list[Batch]) -> tuple[dict[str, Tensor], Tensor | float]:
        """Make one optimiser step; return its loss terms, and the sum of the teacher's logits."""
        step = self.position.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(step)
        share, pixels = self.config.method_share_at(step), self._pixels(parts)
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        teacher: Tensor | float = 0.0
        for index, (images, labels) in enumerate(parts):
            # Every part has its own random stream (dropout), so a resumed run has nothing to restore.
            part = self.accelerator.process_index * len(parts) + index
            torch.manual_seed(mixed_seed(self.config.seed, 2, step, part))
            with self._gradients_shared(is_last=index == len(parts) - 1):
                taught = self.teacher(images) if self.teacher is not None else None
                if taught is not None:
                    teacher = teacher + taught.logits.sum(dtype=torch.float32)
                terms: dict[str, Tensor] = self.objective(images, labels, taught, pixels, share)
                self.accelerator.backward(torch.stack(list(terms.values())).sum() / len(parts))
            sums = {name: sums.get(name, 0) + term.detach() / len(parts) for name, term in terms.items()}
        if self.config.gradient_clip is not None:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        return sums, teacher

    def _gradients_shared(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Processes share what has come together with a step's last part; at the first, where DDP learns, with each."""
        if is_last or not self.is_graph_known:
            self.is_graph_known = True
            return nullcontext()
        unshared: AbstractContextManager[Any] = self.accelerator.no_sync(self.objective)
        return unshared

    def _pixels(self, parts: list[Batch]) -> Tensor:
        """Pixels with a label in a part of the step, on the average over parts and processes.

        A part divided by its own number would count for as much as one that has more, so that a step's gradient would
        depend on how the step is split.
        """
        known = torch.stack([(labels != self.task.train.ignore_index).sum() for _, labels in parts]).sum()
        shares: int = len(parts) * self.accelerator.num_processes
        total: Tensor = self.accelerator.reduce(known)
        return total.clamp(min=1) / shares

    def _log(self, meter: StepMeter, watch: LossTermMonitor, view: LiveView) -> None:
        done = self.position.step - 1
        record = meter.record(self.position.step, self.accelerator)
        record["weights"] = self.state.weights(record["terms"], self.config.method_share_at(done))
        record["learning_rate"] = self.config.learning_rate_at(done)
        self.position = replace(self.position, seconds=self.position.seconds + record["seconds"])
        if self.accelerator.is_main_process:
            self._keep(record)
            watch.observe(record, meter.first_step)
            view.log(record)

    def _keep(self, record: dict[str, Any]) -> None:
        append_history(self.task.output_dir, record)
        self.trackers.log(record)

    def _score(self) -> Metrics | None:
        val = self.task.val
        if val is None:
            return None
        return evaluate(
            self.task.student,
            DatasetSubset(val, range(self.accelerator.process_index, len(val), self.accelerator.num_processes)),
            boundary_width=self.config.boundary_width,
            reference=self.task.teacher if self.config.labels == "teacher" else None,
            match_classes=self.config.match_classes,
            sum_over_processes=lambda count: self.accelerator.reduce(count.to(self.accelerator.device)).cpu(),
            protocol=self.task.protocol,
        )

    def _evaluate(self, view: LiveView) -> None:
        """Score the student, whose checkpoint is written already; copy it if its mIoU is the highest so far."""
        self.metrics = metrics = self._score()
        if metrics is None:
            return
        is_best = metrics.miou > self.position.best_miou
        self.position = replace(self.position, best_miou=max(metrics.miou, self.position.best_miou))
        if self.accelerator.is_main_process:
            # The record is written last: a run stopped before this line repeats the evaluation.
            with self._explained_write_errors():
                if is_best:
                    self._save_model(BEST, metrics)
                self._save_model(LAST, metrics)
            self._keep({"step": self.position.step, "metrics": metrics.to_dict()})
            view.evaluated(self.position.step, {"mIoU": metrics.miou, "boundary IoU": metrics.boundary_iou})
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        """Write the student, and the state to resume from."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
            with self._explained_write_errors():
                # The state is written last: a run stopped in between resumes from the older one and writes both again.
                self._save_model(LAST, None)
                save_state(
                    self.task.output_dir, self.position, self.settings, self.state, self.optimizer.optimizer, scaler
                )
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _explained_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"The checkpoint of step {self.position.step} could not be written to {self.task.output_dir} "
                f"({error.strerror}). Free disk space and go on with resume=True; the checkpoint before is intact.",
            ) from error

    def _save_model(self, name: str, metrics: Metrics | None) -> None:
        training = {
            "title": self.task.title,
            "data": self.task.train.name,
            "step": self.position.step,
            "config": self.config.to_dict(),
            "metrics": metrics.to_dict() if metrics is not None else None,
        }
        save_model(self.task.student, self.task.output_dir / name, training=training)


def _score_of(record: dict[str, Any]) -> float:
    """The mIoU in a record of history.jsonl; -1, the best score before the first, where it is not a number."""
    miou = record["metrics"]["miou"]
    return -1.0 if miou is None else float(miou)


def _create_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate_at(0), config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)
