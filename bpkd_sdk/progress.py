"""Progress bars and lines of text in one style for the whole package; bars need a terminal as stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

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


def track(items: Iterable[T], *, total: int, description: str) -> Iterable[T]:
    """Yield items and show their number in a progress bar.

    Args:
        items: Items to yield.
        total: Number of items.
        description: Text before the bar.
    """
    with progress_bar() as progress:
        yield from progress.track(items, total=total, description=description)
