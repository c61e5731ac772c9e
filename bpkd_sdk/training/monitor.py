"""Monitoring of a run: speed and mean loss terms, warnings about loss terms, live display, experiment trackers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bpkd_sdk import progress
from bpkd_sdk.errors import check_choice, flatten, warn
from bpkd_sdk.evaluation import Metrics
from bpkd_sdk.progress import console, progress_bar
from bpkd_sdk.training.config import LabelLoss, TrainingConfig

DOMINANCE_RATIO = 100  # ratio of a term to the cross-entropy above which a warning is given
STEPS_AT_ZERO = 50  # number of steps with a term at exactly 0 after which a warning is given
PROJECT = "bpkd-sdk"  # name of the project in experiment trackers


class StepMeter:
    """Mean loss terms and speed of the steps since the last record.

    Args:
        step: Number of steps that were done before.
    """

    def __init__(self, step: int) -> None:
        self.first_step = step
        self.started = time.perf_counter()
        self.images = 0
        self.sums: dict[str, Tensor] = {}
        self.teacher_sum: Tensor | float = 0.0

    def add(self, terms: dict[str, Tensor], images: int, teacher_sum: Tensor | float) -> None:
        """Add the loss terms of one step and the sum of the teacher's logits, without waiting for the device."""
        self.images += images
        self.teacher_sum = self.teacher_sum + teacher_sum
        self.sums = {name: self.sums.get(name, torch.zeros_like(term)) + term for name, term in terms.items()}

    def record(self, step: int, accelerator: Accelerator) -> dict[str, Any]:
        """Return the record of the steps up to `step`, averaged over all processes.

        Raises:
            FloatingPointError: If a loss term, or the teacher's logits, were not finite.
        """
        means = torch.stack(list(self.sums.values())) / (step - self.first_step)
        teacher_sum = torch.as_tensor(self.teacher_sum, dtype=means.dtype, device=means.device).view(1)
        *values, teacher_mean = accelerator.reduce(torch.cat([means, teacher_sum]), "mean").tolist()
        terms = dict(zip(self.sums, values, strict=True))
        if not math.isfinite(teacher_mean):
            raise FloatingPointError(
                f"The teacher's logits are not finite between steps {self.first_step + 1} and {step}. The last "
                "checkpoint is from before these steps. Check the teacher's weights and the images that it fails on. "
                "If it runs in half precision, pass teacher_precision='fp32'."
            )
        if broken := [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"The loss is not finite: {', '.join(broken)} between steps {self.first_step + 1} and {step}. The last "
                "checkpoint is from before these steps. Lower the learning rate, set gradient_clip, or use "
                "precision='fp32'."
            )
        seconds = time.perf_counter() - self.started
        return {
            "step": step,
            "loss": sum(terms.values()),
            "terms": terms,
            "images_per_second": self.images / seconds,
            "seconds": seconds,
        }


class DominantTermWarning(UserWarning):
    """Warning that the size of a distillation term is more than `DOMINANCE_RATIO` times the loss on the labels."""


class ZeroTermWarning(UserWarning):
    """Warning that a loss term was exactly 0 for `STEPS_AT_ZERO` steps or more."""


class LossTermMonitor:
    """Warns about terms that dominate the cross-entropy or stay at zero.

    Args:
        features: Module paths of the student's and the teacher's feature map; None for a network without one.
    """

    def __init__(self, features: tuple[str | None, str | None]) -> None:
        self.features = features
        self.zero_since: dict[str, int] = {}
        self.reported: set[tuple[str, type[UserWarning]]] = set()

    def observe(self, record: Mapping[str, Any], first_step: int) -> None:
        """Check the record of the steps after `first_step`."""
        on_labels = {name: value for name, value in record["terms"].items() if name in get_args(LabelLoss)}
        label_loss = sum(on_labels.values())
        label_loss_name = "cross-entropy" if set(on_labels) == {"ce"} else "loss on the labels"
        for name, value in record["terms"].items():
            if label_loss > 0 and abs(value) > DOMINANCE_RATIO * label_loss:
                self._warn_once(
                    name,
                    f"At step {record['step']} the term {name!r} is {value:.3g}, {abs(value) / label_loss:.0f} "
                    f"times the {label_loss_name} ({label_loss:.3g}), so the labels have almost no effect. Lower its "
                    "weight.",
                    DominantTermWarning,
                )
            if value != 0:
                self.zero_since.pop(name, None)
            elif record["step"] - self.zero_since.setdefault(name, first_step) >= STEPS_AT_ZERO:
                self._warn_of_zero(name, record["step"])

    def _warn_of_zero(self, name: str, step: int) -> None:
        checks = ["whether the labels are all void (the data set's ignore_index)"]
        if name not in get_args(LabelLoss):
            checks += [
                "for a term on edges, whether the crops contain edges at the logits' size (crop_size, scale)",
                "whether the teacher is trained, and is another network than the student",
            ]
        if None not in self.features:
            checks.append(
                f"for a term on feature maps, the feature maps {self.features[0]!r} of the student and "
                f"{self.features[1]!r} of the teacher (`bpkd inspect` lists others)"
            )
        self._warn_once(
            name,
            f"The term {name!r} has been exactly 0 for {step - self.zero_since[name]} steps, so it has no effect. "
            f"Check {'; '.join(checks)}.",
            ZeroTermWarning,
        )

    def _warn_once(self, name: str, message: str, category: type[UserWarning]) -> None:
        if (name, category) not in self.reported:
            self.reported.add((name, category))
            warn(message, category)


class LiveView:
    """Live table of progress, loss terms and scores on a terminal; elsewhere lines.

    A line with loss terms is printed for each record, and one with the remaining time when nothing was printed for
    `LINE_INTERVAL` seconds. Each checkpoint and each evaluation prints a line, on a terminal too.

    Args:
        title: Title of the run.
        steps: Number of steps of the whole run.
        done: Number of steps that were done before.
    """

    def __init__(self, title: str, steps: int, done: int) -> None:
        self.progress = progress_bar()
        self.task = self.progress.add_task(progress.visible(title), total=steps, completed=done)
        self.steps, self.first_step, self.done = steps, done, done
        self.started = self.printed = time.monotonic()
        self.terms: Mapping[str, float] = {}
        self.weights: Mapping[str, float] = {}
        self.status = ""
        self.scores = ""
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        if console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.live.stop()

    def step(self, done: int) -> None:
        """Set the number of steps that are done."""
        self.done = done
        self.progress.update(self.task, completed=done)
        if not console.is_terminal and time.monotonic() - self.printed >= progress.LINE_INTERVAL:
            self._print_line([self._remaining()])

    def log(self, record: Mapping[str, Any]) -> None:
        """Show the loss terms of a record with their weights, warm-up included."""
        self.terms, self.weights = record["terms"], record["weights"]
        self.status = f"learning rate {record['learning_rate']:.2e}, {record['images_per_second']:.1f} images/s"
        if "encoder" in record:
            self.status += f", encoder {record['encoder']}"
        if not console.is_terminal:
            self.done = record["step"]
            self._print_line([*self._terms(), self.status, self._remaining()])

    def log_checkpoint(self, step: int, metrics: Metrics | None) -> None:
        """Print a line for the checkpoint of a step, with the scores if it was evaluated."""
        self.done = step
        texts = ["checkpoint written"]
        if metrics is not None:
            texts = [f"mIoU {metrics.miou:.3f}", f"boundary IoU {metrics.boundary_iou:.3f}"]
            self.scores = f"step {step}   " + "   ".join(texts)
        # Without a terminal, the loss terms are in the line before.
        self._print_line([*texts, *self._terms(), self.status] if console.is_terminal else texts)

    def _terms(self) -> list[str]:
        return [f"{name} {value:.3f}" for name, value in self.terms.items()]

    def _remaining(self) -> str:
        seconds = (time.monotonic() - self.started) / max(1, self.done - self.first_step) * (self.steps - self.done)
        return f"{progress.format_seconds(seconds)} left"

    def _print_line(self, texts: Iterable[str]) -> None:
        self.printed = time.monotonic()
        progress.print_line(f"Step {self.done} of {self.steps}: {', '.join(filter(None, texts))}")

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        if self.terms:
            table.add_column(style="dim")
            for name in self.terms:
                table.add_column(name, justify="right")
            table.add_row("loss", *(f"{value:.4f}" for value in self.terms.values()))
            weights = (self.weights.get(name) for name in self.terms)
            table.add_row("weight", *("" if weight is None else f"{weight:.4g}" for weight in weights))
        return Group(self.progress, table, Text(self.status, style="dim"), Text(self.scores, style="green"))


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ValueError for a tracker that accelerate does not support, ImportError for one that is not installed."""
    for name in names:
        check_choice("trackers", name, sorted(LOGGER_TYPE_TO_CLASS))
        if not filter_trackers([name], logging_dir="."):
            package = name.replace("_", "-")  # the name in the package index
            raise ImportError(f"The tracker {name!r} needs the package {package!r}: pip install {package}")


class Trackers:
    """Context manager for the experiment trackers of a run, which closes them; their files go to the run's folder.

    Args:
        accelerator: Accelerator of the run, which owns the trackers.
        config: Options of the run: the names of the trackers, and the values that the trackers show.
        folder: Folder of the run.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, folder: Path) -> None:
        self.accelerator = accelerator
        if config.trackers:
            accelerator.project_configuration.set_directories(str(folder))
            accelerator.log_with = filter_trackers(list(config.trackers), accelerator.logging_dir)
            options = {key: _plain(value) for key, value in config.to_dict().items()}
            accelerator.init_trackers(PROJECT, config=options)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send one record of history.jsonl; nested values get names like "terms/edge"."""
        values = {key: value for key, value in flatten(record, "/").items() if isinstance(value, (int, float))}
        self.accelerator.log(values, step=values.pop("step"))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _plain(value: object) -> object:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
