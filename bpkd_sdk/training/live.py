"""What a run shows while it works: a bar, the loss terms, and the scores so far."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bpkd_sdk.progress import console, progress_bar


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
