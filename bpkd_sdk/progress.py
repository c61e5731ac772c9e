"""Progress bars: one style for the whole package, silent where there is nobody to watch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

console = Console(stderr=True)


def progress_bar(*columns: TextColumn) -> Progress:
    """A rich bar on stderr with count and time left; further columns go before the time."""
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
    """Yield the items while a bar counts them."""
    with progress_bar() as progress:
        yield from progress.track(items, total=total, description=description)
