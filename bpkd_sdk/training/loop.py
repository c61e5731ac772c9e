"""The training loop, for supervised training and for distillation. `_Trainer._step` is one optimiser step."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from bpkd_sdk.data import DatasetSubset
from bpkd_sdk.data.randomness import mixed_seed
from bpkd_sdk.evaluation import Metrics, evaluate
from bpkd_sdk.features import Capture
from bpkd_sdk.files import LAST_CHECKPOINT
from bpkd_sdk.models import get_spec, save_model
from bpkd_sdk.models.spec import set_provenance
from bpkd_sdk.output import SegmentationOutput
from bpkd_sdk.progress import print_fact, print_line
from bpkd_sdk.training.accelerator import (
    average_batch_norm_statistics,
    broadcast_from_main,
    synchronize_batch_norm,
    teacher_dtype,
)
from bpkd_sdk.training.cache_writer import fill_cache
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.freezing import FrozenEncoder, find_encoder
from bpkd_sdk.training.label_losses import LabelLosses
from bpkd_sdk.training.loader import training_loader
from bpkd_sdk.training.monitor import LiveView, LossTermMonitor, StepMeter, Trackers
from bpkd_sdk.training.objective import Objective, predicted_labels, to_device
from bpkd_sdk.training.records import (
    Task,
    append_history,
    check_same_inputs,
    read_history,
    truncate_history,
    write_run,
)
from bpkd_sdk.training.state import BEST, STATE_FILE, Position, restore_state, run_settings, save_state
from bpkd_sdk.training.summary import describe_result
from bpkd_sdk.training.teacher import Teacher, TeacherModel
from bpkd_sdk.training.teacher_cache import CachedTeacher

CHECKPOINT_SECONDS = 600.0  # largest time without a checkpoint
STOPPING = "Stopping: the current step is finished and a checkpoint written. Press Ctrl-C again to stop at once."

Batch = tuple[Tensor, Tensor, dict[str, Tensor]]  # images, labels, and arrays of the teacher's cache


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training run.

    Attributes:
        model: Student with its final weights, in eval mode.
        metrics: Scores of `model` on the validation data; None without validation data.
        history: Records of history.jsonl: loss terms every few steps, and the scores of each evaluation.
        checkpoint: Self-describing file of the final weights; ``best.safetensors`` beside it contains the weights of
            the highest mIoU.
        output_dir: Folder of the run.
    """

    model: nn.Module
    metrics: Metrics | None
    history: list[dict[str, Any]]
    checkpoint: Path
    output_dir: Path


def run_training(task: Task) -> TrainingResult:
    """Train to the last step, from the beginning or from the state in the output folder."""
    started = monotonic()
    if task.cache is not None and task.teacher is not None and not task.cache.is_complete:
        fill_cache(
            task.cache,
            task.teacher,
            task.train,
            task.transform,
            task.config,
            task.accelerator,
            use_labels=not task.labels_from_teacher,
        )
    if task.cache is not None and not task.labels_from_teacher:
        task = replace(task, teacher=None)  # its memory is not needed any more
    with ExitStack() as stack:
        trainer = _Trainer(task, stack)
        if first_step := trainer.position.step:
            print_fact(f"The run resumes after step {first_step}.")
        metrics = trainer.train()
    print_fact(describe_result(task, metrics, trainer.position.step - first_step, monotonic() - started))
    task.student.eval()
    set_provenance(task.student, trainer.provenance(metrics))
    return TrainingResult(
        task.student, metrics, read_history(task.output_dir), task.output_dir / LAST_CHECKPOINT, task.output_dir
    )


class _Trainer:
    """Networks, optimiser, loader and position of one run."""

    def __init__(self, task: Task, stack: ExitStack) -> None:
        self.task = task
        self.config = config = task.config
        self.settings = run_settings(config, task.method, task.protocol)
        self.accelerator = task.accelerator
        device = self.accelerator.device
        if self.accelerator.num_processes > 1 and device.type == "cuda":  # torch's SyncBatchNorm needs CUDA
            synchronize_batch_norm(task.student)
            synchronize_batch_norm(task.method or nn.Identity())
        # Feature hooks must be set after `synchronize_batch_norm` has replaced layers, and before the first forward
        # pass: torch.compile ignores hooks that are set later.
        student_capture = stack.enter_context(_capture(task.student, task.features[0]))
        teacher_capture = stack.enter_context(_capture(task.teacher if task.cache is None else None, task.features[1]))
        self.teacher: Teacher | CachedTeacher | None = None
        if task.cache is not None:
            self.teacher = CachedTeacher(task.cache, task.classes)
        elif task.teacher is not None:
            dtype = teacher_dtype(config, self.accelerator)
            self.teacher = Teacher(task.teacher, teacher_capture, config, device, dtype, task.classes)
        losses = LabelLosses(config.loss_weights, task.train.ignore_index, task.class_weights)
        self.objective = Objective(task.student, student_capture, task.method, config, losses, task.classes)
        to_device(self.objective, device, config)
        optimizer = _create_optimizer([p for p in self.objective.parameters() if p.requires_grad], config)
        self.position = self._restore(optimizer)
        if self.accelerator.is_main_process:
            write_run(task, self.position.step)
        self.trackers = stack.enter_context(Trackers(self.accelerator, config, task.output_dir))
        loader = training_loader(
            task.train,
            config,
            task.crop_size,
            use_labels=not task.labels_from_teacher,
            transform=task.transform,
            first_step=self.position.step,
            on_gpu=device.type == "cuda",
            network=get_spec(task.student),
            cache=task.cache,
            with_features=task.features[1] is not None,
        )
        # accelerate moves batches to the device, runs the objective in autocast, and wraps it in
        # DistributedDataParallel; the objective without the wrapper is for saving and loading.
        self.wrapped_objective, self.optimizer, self.loader = self.accelerator.prepare(
            self.objective, optimizer, loader
        )
        if self.accelerator.num_processes > 1:
            # DDP would broadcast all buffers at every step, CIRKD's memory included. Only the statistics of batch norm
            # differ between processes, and `average_batch_norm_statistics` averages them.
            self.wrapped_objective.broadcast_buffers = False
        self.objective.train()
        self.frozen: FrozenEncoder | None = None
        if self.position.step < config.freeze_encoder_steps:
            keep_graph = self.accelerator.num_processes > 1
            self.frozen = FrozenEncoder(find_encoder(task.student), keep_graph=keep_graph)
            stack.callback(self._release_encoder)
        self.is_graph_recorded = False
        self.metrics: Metrics | None = None
        self.saved_at = monotonic()

    def _restore(self, optimizer: torch.optim.Optimizer) -> Position:
        folder = self.task.output_dir
        position, scaler = Position(), dict[str, Any]()
        if read_history(folder) and self.accelerator.is_main_process:
            check_same_inputs(self.task)
        if (folder / STATE_FILE).is_file():
            position, scaler = restore_state(folder, self.settings, self.objective, optimizer)
        if broadcast_from_main(position.step) != position.step:
            raise ValueError(
                f"This process resumes from step {position.step} in {folder}, the main process from another step. The "
                "folder must be the same on all machines: put it on a shared file system."
            )
        if scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        if self.accelerator.is_main_process:
            truncate_history(folder, position.step)
        # The state of a step is written before its evaluation, so only the history contains the best score so far.
        scored = [record for record in read_history(folder, position.step) if "metrics" in record]
        best = max((_miou(record) for record in scored), default=position.best_miou)
        is_due = self._is_evaluated_at(position.step) and not any(record["step"] == position.step for record in scored)
        self.is_evaluation_due, best = broadcast_from_main((is_due, best))
        return replace(position, best_miou=max(best, position.best_miou))

    def train(self) -> Metrics | None:
        """Do the remaining steps; return the scores of the final weights."""
        config, view = self.config, LiveView(self.task.title, self.config.steps, self.position.step)
        term_monitor = LossTermMonitor(self.task.features)
        with _deferred_interrupt() as interrupt, view:
            if self.is_evaluation_due:  # the run was stopped between a checkpoint and its evaluation
                self._evaluate(interrupt)
                view.log_checkpoint(self.position.step, self.metrics)
            meter = StepMeter(self.position.step)
            for micro_batches in self._batches():
                terms, teacher_sum = self._step(micro_batches)
                meter.add(terms, config.batch_size, teacher_sum)
                step = self.position.step + 1
                self.position = replace(self.position, step=step)
                is_evaluated = self._is_evaluated_at(step)
                is_saved = is_evaluated or step % config.checkpoint_interval == 0
                is_logged = is_saved or step % config.log_every == 0
                interrupted, is_due = self._agree_to_stop(interrupt, at_record=is_logged)
                is_evaluated = is_evaluated and not interrupted
                is_saved = is_saved or interrupted or is_due
                if is_logged or is_saved:
                    self._log(meter, term_monitor, view)
                    if is_saved:
                        average_batch_norm_statistics(self.objective, self.accelerator)
                        self._save()
                    if is_evaluated:
                        self._evaluate(interrupt)
                    if is_saved:
                        self.saved_at = monotonic()
                        view.log_checkpoint(step, self.metrics if is_evaluated else None)
                    meter = StepMeter(step)
                view.step(step)
                if interrupted:
                    break
            if self._agree_to_stop(interrupt, at_record=True)[0]:
                raise KeyboardInterrupt(self._describe_stop())
        return self.metrics if self.metrics is not None else self._score()

    def _step(self, micro_batches: list[Batch]) -> tuple[dict[str, Tensor], Tensor | float]:
        """Do one optimiser step on the micro-batches of a batch.

        The critics of SKDS and IFVD do a step of their own in the forward pass of the objective.

        Args:
            micro_batches: `config.accumulate` triples of images (N, channels, h, w), uint8 or float32, labels
                (N, h, w), and the arrays of the teacher's cache; without a cache there are none.

        Returns:
            The mean of each loss term over the micro-batches, and the sum of the teacher's logits, to detect NaN and
            infinity.
        """
        step = self.position.step
        if step >= self.config.freeze_encoder_steps:
            self._release_encoder()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(step)
        taught_batches = self._taught_batches(micro_batches)
        if self.task.labels_from_teacher and self.task.class_map is not None:
            # The teacher makes pixels void, and their number is needed before the first backward pass.
            listed = list(taught_batches)
            taught_batches, micro_batches = iter(listed), [(images, labels, {}) for images, labels, _ in listed]
        method_factor, labelled_pixels = self.config.method_factor_at(step), self._labelled_pixels(micro_batches)
        self.optimizer.zero_grad()
        mean_terms: dict[str, Tensor] = {}
        teacher_sum: Tensor | float = 0.0
        for index, (images, labels, teacher_output) in enumerate(taught_batches):
            if teacher_output is not None:
                teacher_sum = teacher_sum + teacher_output.logits.sum(dtype=torch.float32)
            with self._gradient_synchronization(is_last=index == len(micro_batches) - 1):
                terms: dict[str, Tensor] = self.wrapped_objective(
                    images, labels, teacher_output, labelled_pixels, method_factor
                )
                loss = torch.stack(list(terms.values())).sum() / len(micro_batches)
                self.accelerator.backward(loss)
            for name, term in terms.items():
                mean_terms[name] = mean_terms.get(name, 0) + term.detach() / len(micro_batches)
        if self.frozen is not None:
            self.frozen.drop_gradients()
        if self.config.gradient_clip is not None:
            self.accelerator.clip_grad_norm_(self.wrapped_objective.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        return mean_terms, teacher_sum

    def _taught_batches(self, micro_batches: list[Batch]) -> Iterator[tuple[Tensor, Tensor, SegmentationOutput | None]]:
        """Yield images, labels and the teacher's output of each micro-batch of a step, and seed torch before each."""
        data = self.task.train
        for index, (images, labels, kept) in enumerate(micro_batches):
            # The seed (dropout) depends on run, step and micro-batch only, so resuming needs no saved random state.
            number = self.accelerator.process_index * len(micro_batches) + index
            torch.manual_seed(mixed_seed(self.config.seed, 2, self.position.step, number))
            output = None if self.teacher is None else self.teacher(images, kept)
            if output is not None and self.task.labels_from_teacher:
                labels = predicted_labels(output.logits, labels, data.ignore_index, data.num_classes)
            yield images, labels, output

    def _release_encoder(self) -> None:
        if self.frozen is not None:
            self.frozen.release()
            self.frozen = None

    def _batches(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each remaining step."""
        batches = iter(self.loader)
        while micro_batches := list(islice(batches, self.config.accumulate)):
            yield [(images, labels, *(kept or [{}])) for images, labels, *kept in micro_batches]

    def _labelled_pixels(self, micro_batches: list[Batch]) -> Tensor:
        """Return the number of labelled pixels in a micro-batch, averaged over all of them and all processes.

        If the loss of each micro-batch were divided by its own number of labelled pixels, the gradient of a step would
        depend on how the batch is split.
        """
        labelled = torch.stack([(labels != self.task.train.ignore_index).sum() for _, labels, _ in micro_batches]).sum()
        shards: int = len(micro_batches) * self.accelerator.num_processes
        total: Tensor = self.accelerator.reduce(labelled)
        return total.clamp(min=1) / shards

    def _gradient_synchronization(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context in which gradients are averaged over processes only with the last micro-batch.

        The first backward pass must average too, because DDP records the static graph in it.
        """
        if is_last or not self.is_graph_recorded:
            self.is_graph_recorded = True
            return nullcontext()
        no_sync: AbstractContextManager[Any] = self.accelerator.no_sync(self.wrapped_objective)
        return no_sync

    def _describe_stop(self) -> str:
        return (
            f"stopped after step {self.position.step} of {self.config.steps}, with a checkpoint. To continue, repeat "
            f"the call with output_dir='{self.task.output_dir}' and resume=True"
        )

    def _agree_to_stop(self, interrupt: threading.Event, *, at_record: bool) -> tuple[bool, bool]:
        """Return whether to stop after this step, and whether a checkpoint is due by time; the same on all processes.

        Several processes exchange their requests only at records, because the exchange waits for the device. The clock
        of the main process decides on the checkpoint.
        """
        accelerator = self.accelerator
        is_due = accelerator.is_main_process and monotonic() - self.saved_at >= CHECKPOINT_SECONDS
        if accelerator.num_processes == 1:
            return interrupt.is_set(), is_due
        if not at_record:
            return False, False
        votes = torch.tensor([int(interrupt.is_set()), int(is_due)], device=accelerator.device)
        stops, saves = accelerator.reduce(votes).tolist()
        return bool(stops), bool(saves)

    def _is_evaluated_at(self, step: int) -> bool:
        return step > 0 and (step % self.config.evaluation_interval == 0 or step == self.config.steps)

    def _log(self, meter: StepMeter, term_monitor: LossTermMonitor, view: LiveView) -> None:
        last_step = self.position.step - 1
        record = meter.record(self.position.step, self.accelerator)
        record["weights"] = self.objective.weights(record["terms"], self.config.method_factor_at(last_step))
        record["learning_rate"] = self.config.learning_rate_at(last_step)
        if last_step < self.config.freeze_encoder_steps:
            record["encoder"] = "frozen"
        self.position = replace(self.position, seconds=self.position.seconds + record["seconds"])
        if self.accelerator.is_main_process:
            self._append_record(record)
            term_monitor.observe(record, meter.first_step)
            view.log(record)

    def _append_record(self, record: dict[str, Any]) -> None:
        append_history(self.task.output_dir, record)
        self.trackers.log(record)

    def _score(self) -> Metrics | None:
        val = self.task.val
        if val is None:
            return None
        return evaluate(
            self.task.student,
            DatasetSubset(val, range(self.accelerator.process_index, len(val), self.accelerator.num_processes)),
            protocol=self.task.protocol,
            boundary_width=self.config.boundary_width,
            reference=self.task.teacher if self.task.labels_from_teacher else None,
            match_classes=self.config.match_classes,
            class_map=self.task.class_map if self.task.labels_from_teacher else None,
            sum_across_processes=lambda count: self.accelerator.reduce(count.to(self.accelerator.device)).cpu(),
        )

    def _evaluate(self, interrupt: _Interrupt) -> None:
        """Score the student, whose checkpoint exists already, and copy it if its mIoU is the highest so far."""
        with interrupt.raised(self._describe_stop()):
            self.metrics = metrics = self._score()
        if metrics is None:
            return
        is_best = metrics.miou > self.position.best_miou
        self.position = replace(self.position, best_miou=max(metrics.miou, self.position.best_miou))
        if self.accelerator.is_main_process:
            # The record is written last: if the run stops before, resuming repeats the evaluation.
            with self._explained_write_errors():
                if is_best:
                    self._save_model(BEST, metrics)
                self._save_model(LAST_CHECKPOINT, metrics)
            self._append_record({"step": self.position.step, "metrics": metrics.to_dict()})
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        """Write the student and the state to resume from."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
            with self._explained_write_errors():
                # The state is written last: a run that stops in between resumes from the previous state, and writes
                # both files again.
                self._save_model(LAST_CHECKPOINT, None)
                save_state(
                    self.task.output_dir, self.position, self.settings, self.objective, self.optimizer.optimizer, scaler
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
                f"({error.strerror}). Free disk space and resume with resume=True; the previous checkpoint is intact.",
            ) from error

    def provenance(self, metrics: Metrics | None) -> dict[str, Any]:
        """Return the facts about this run that its checkpoints contain, as plain JSON values."""
        facts = {
            "title": self.task.title,
            "data": self.task.train.name,
            "validation_data": self.task.val.name if self.task.val is not None else None,
            "step": self.position.step,
            "origin": dict(self.task.origin),
            "config": self.config.to_dict(),
            "method": self.settings["method"],
            "crop_size": self.task.crop_size,
            "protocol": self.settings["protocol"],
            "metrics": metrics.to_dict() if metrics is not None else None,
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain

    def _save_model(self, name: str, metrics: Metrics | None) -> None:
        save_model(self.task.student, self.task.output_dir / name, training=self.provenance(metrics))


def _capture(network: TeacherModel | None, path: str | None) -> Capture:
    """Return a recorder of one feature map; without a module or a path it records nothing."""
    return Capture(network, [path]) if isinstance(network, nn.Module) and path else Capture(nn.Identity(), [])


def _create_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate_at(0), config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)


def _miou(record: dict[str, Any]) -> float:
    """Return the mIoU of a record of history.jsonl, or -1 if it is not a number."""
    miou = record["metrics"]["miou"]
    return -1.0 if miou is None else float(miou)


class _Interrupt(threading.Event):
    """The first SIGINT or SIGTERM: an event that is checked between steps, and an error within `raised`."""

    _message: str | None = None

    @contextmanager
    def raised(self, message: str) -> Iterator[None]:
        """Raise KeyboardInterrupt at once within a ``with`` block, for work that a resumed run repeats.

        Of several processes each ends by itself: a launcher sends the signal to all of them.
        """
        self._message = message
        try:
            if self.is_set():
                raise KeyboardInterrupt(message)
            yield
        finally:
            self._message = None

    def request(self) -> None:
        """Set the event, or raise KeyboardInterrupt."""
        self.set()
        if self._message is not None:
            raise KeyboardInterrupt(self._message)
        # Not in this thread: the signal may have interrupted it while it was printing.
        threading.Thread(target=print_line, args=(STOPPING,)).start()


@contextmanager
def _deferred_interrupt() -> Iterator[_Interrupt]:
    """Turn the first SIGINT or SIGTERM into an `_Interrupt`; a second one acts at once."""
    interrupt = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def request(_number: int, _frame: FrameType | None) -> None:
        restore()
        interrupt.request()

    for number in previous:
        signal.signal(number, request)
    try:
        yield interrupt
    finally:
        restore()
