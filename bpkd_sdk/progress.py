"""Progress of long work and lines of text on stderr, in one style for the whole package."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Self, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

LINE_INTERVAL = 10.0  # seconds between two lines of progress where there is no terminal

console = Console(stderr=True)


def print_fact(text: str) -> None:
    """Print a sentence on stderr as it is: names in it are neither markup nor highlighted, and lines are not broken.

    With several processes, only the main one prints: `create_accelerator` makes the console of the others quiet.
    """
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def progress_bar(*columns: TextColumn) -> Progress:
    """Return a rich progress bar on stderr with count and remaining time.

    Args:
        columns: Further columns, shown before the remaining time.
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class ProgressReport:
    """A context manager that shows how many of a number of items are done.

    On a terminal it shows a progress bar. Elsewhere, such as in a log file, it prints a line every `LINE_INTERVAL`
    seconds.

    Args:
        description: Text before the bar or the numbers.
        total: Number of items.
    """

    def __init__(self, description: str, total: int) -> None:
        self._description = description
        self._total = total
        self._done = 0
        self._printed = time.monotonic()
        self._bar = progress_bar()

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task(escape(self._description), total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """Count one more item."""
        self._done += 1
        self._bar.advance(self._task)
        self._print_line()

    def describe(self, text: str) -> None:
        """Replace the description, for example by the state of an item that takes long."""
        self._description = text
        self._bar.update(self._task, description=escape(text))
        self._print_line()

    def _print_line(self) -> None:
        if not console.is_terminal and time.monotonic() - self._printed >= LINE_INTERVAL:
            self._printed = time.monotonic()
            print_fact(f"{self._description}: {self._done} of {self._total}")


def track(items: Iterable[T], *, total: int, description: str) -> Iterable[T]:
    """Yield items and report their number, as `ProgressReport` does.

    Args:
        items: Items to yield.
        total: Number of items.
        description: Text before the number.
    """
    with ProgressReport(description, total) as report:
        for item in items:
            yield item
            report.advance()
