"""What a run shows while it works: a bar, the loss terms, and the scores so far."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bpkd_sdk.errors import check_choice, flattened
from bpkd_sdk.progress import console, progress_bar
from bpkd_sdk.training.config import TrainingConfig


class LiveView:
    """A live table on a terminal; elsewhere one line for each evaluation.

    Args:
        title: What is being trained.
        steps: Of the whole run.
        done: Steps done before.
    """

    def __init__(self, title: str, steps: int, done: int) -> None:
        self.progress = progress_bar()
        self.task = self.progress.add_task(title, total=steps, completed=done)
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
        """Move the bar."""
        self.progress.update(self.task, completed=done)

    def log(self, record: Mapping[str, Any]) -> None:
        """Show the terms of a training record and their weights, warm-up included."""
        self.terms, self.weights = record["terms"], record["weights"]
        self.status = f"learning rate {record['learning_rate']:.2e}   {record['images_per_second']:.1f} images/s"

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Show scores; a line of its own where there is no terminal to redraw."""
        self.scores = f"step {step}   " + "   ".join(f"{name} {value:.3f}" for name, value in scores.items())
        if not console.is_terminal:
            terms = "  ".join(f"{name} {value:.3f}" for name, value in self.terms.items())
            line = f"{self.progress.tasks[0].description}: {self.scores}   {terms}   {self.status}"
            console.print(line, highlight=False, soft_wrap=True)

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


DROWNING = 100  # a term this many times the cross-entropy leaves the labels nothing to say
SILENT = 50  # steps at exactly 0, after which it is no chance


class LoudTermWarning(UserWarning):
    """A distillation term is two orders of magnitude above the cross-entropy."""


class SilentTermWarning(UserWarning):
    """A term is exactly 0 and stays so."""


class LossTermMonitor:
    """Reads the records of a run and warns of what its user should look into.

    Args:
        features: Paths of the student's and the teacher's feature map, or None where there is none.
    """

    def __init__(self, features: tuple[str | None, str | None]) -> None:
        self.features = features
        self.silent_since: dict[str, int] = {}
        self.reported: set[tuple[str, type[UserWarning]]] = set()

    def observe(self, record: Mapping[str, Any], first_step: int) -> None:
        """Look at the record of the steps after `first_step`."""
        reference = record["terms"]["ce"]
        for name, value in record["terms"].items():
            if reference > 0 and value > DROWNING * reference:
                self._warn_once(
                    name,
                    f"At step {record['step']} the term {name!r} is {value:.3g}, {value / reference:.0f} times the "
                    f"cross-entropy ({reference:.3g}). It drowns the labels: lower its weight.",
                    LoudTermWarning,
                )
            if value != 0:
                self.silent_since.pop(name, None)
            elif record["step"] - self.silent_since.setdefault(name, first_step) >= SILENT:
                self._report_silence(name, record["step"])

    def _report_silence(self, name: str, step: int) -> None:
        checks = ["whether the labels are all void (the data set's ignore_index)"]
        if name != "ce":
            checks += [
                "whether classes meet in the crops at the logits' size, if the term looks at edges (crop_size, scale)",
                "whether the teacher is another network than the student, and trained",
            ]
        if None not in self.features:
            checks.append(
                f"the feature maps, if the term compares them: {self.features[0]!r} of the student and "
                f"{self.features[1]!r} of the teacher (`bpkd inspect` lists others)"
            )
        self._warn_once(
            name,
            f"The term {name!r} has been exactly 0 for {step - self.silent_since[name]} steps, so it teaches nothing. "
            f"Check {'; '.join(checks)}.",
            SilentTermWarning,
        )

    def _warn_once(self, name: str, message: str, category: type[UserWarning]) -> None:
        if (name, category) not in self.reported:
            self.reported.add((name, category))
            warnings.warn(message, category, stacklevel=4)


PROJECT = "bpkd-sdk"


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ValueError for a tracker that accelerate does not know, ImportError for one that is not installed."""
    for name in names:
        check_choice("trackers", name, sorted(LOGGER_TYPE_TO_CLASS))
        if not filter_trackers([name], logging_dir="."):
            raise ImportError(f"trackers={names!r} needs the package {name!r}. Install it with: pip install {name}")


class Trackers:
    """All trackers of a run, started and finished with a ``with`` block; what they keep in files goes into its folder.

    Args:
        accelerator: Knows the processes.
        config: Names the trackers, and is shown by them.
        folder: Of the run.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, folder: Path) -> None:
        self.accelerator = accelerator
        if config.trackers:
            accelerator.project_configuration.set_directories(str(folder))
            accelerator.log_with = filter_trackers(list(config.trackers), accelerator.logging_dir)
            facts = {key: _plain(value) for key, value in config.to_dict().items()}
            accelerator.init_trackers(PROJECT, config=facts)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send one record of history.jsonl; nested values get names like "terms/edge"."""
        values = {key: value for key, value in flattened(record, "/").items() if isinstance(value, (int, float))}
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


class StepMeter:
    """Sums up steps until `record` tells what happened in them.

    Args:
        step: Steps done before.
    """

    def __init__(self, step: int) -> None:
        self.first_step = step
        self.started = time.perf_counter()
        self.images = 0
        self.sums: dict[str, Tensor] = {}
        self.teacher: Tensor | float = 0.0

    def add(self, terms: dict[str, Tensor], images: int, teacher: Tensor | float) -> None:
        """Add one step's terms and the sum of the teacher's logits, without waiting for the device."""
        self.images += images
        self.teacher = self.teacher + teacher
        self.sums = {name: self.sums.get(name, torch.zeros_like(term)) + term for name, term in terms.items()}

    def record(self, step: int, accelerator: Accelerator) -> dict[str, Any]:
        """What happened since the last record, on all processes together.

        Raises:
            FloatingPointError: If a term, or the teacher's logits, were not finite.
        """
        means = torch.stack(list(self.sums.values())) / (step - self.first_step)
        teacher = torch.as_tensor(self.teacher, dtype=means.dtype, device=means.device).view(1)
        *values, taught = accelerator.reduce(torch.cat([means, teacher]), "mean").tolist()
        terms = dict(zip(self.sums, values, strict=True))
        if not math.isfinite(taught):
            raise FloatingPointError(
                f"The teacher's logits are not finite between steps {self.first_step + 1} and {step}. The last "
                "checkpoint is older. Check the teacher's weights and the images it fails on; where it runs in half "
                "precision, pass teacher_precision='fp32'."
            )
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
            "images_per_second": self.images / seconds,
            "seconds": seconds,
        }
