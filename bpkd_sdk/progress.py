"""Progress of long work and lines of text on stderr, in one style for the whole package."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")

LINE_INTERVAL = 10.0  # seconds between two lines of progress where there is no terminal

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class PlainConsole(Console):
    """A console that shows every text as it is, in lines and in tables: no markup, no emoji codes, no highlighting.

    So names of files and classes may contain brackets. Control characters, which would change the terminal, and bytes
    of file names that are not text are shown as escapes. Styles are arguments of `print`, or of columns.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text with visible control characters."""
        return super().render_str(visible(text), **options)


def visible(text: str) -> str:
    r"""Replace control characters other than line breaks and tabs by escapes.

    Example:
        >>> print(visible("red" + chr(27) + "[31m"))
        red\x1b[31m
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


console = PlainConsole(stderr=True)


def print_line(text: str) -> None:
    """Print a text on stderr as it is, without line breaks.

    With several processes, only the main one prints: `create_accelerator` makes the console of the others quiet.
    """
    console.print(text, soft_wrap=True)


def print_fact(text: str | Callable[[], str]) -> None:
    """Print a fact about a run as `print_line` does, unless it is part of others: see `without_facts`.

    Args:
        text: The fact, or a function that returns it, which is only called to print it.
    """
    if not (_without_facts or console.quiet):
        print_line(text if isinstance(text, str) else text())


_without_facts = False


@contextmanager
def without_facts() -> Iterator[None]:
    """Print no facts within a ``with`` block, whose caller has printed them for all runs in it."""
    global _without_facts
    before, _without_facts = _without_facts, True
    try:
        yield
    finally:
        _without_facts = before


def format_rows(rows: Mapping[str, str]) -> str:
    """Format lines of a name and a text, with the texts below each other."""
    width = max(map(len, rows)) + 1
    return "\n".join(f"{name + ':':{width}} {text}" for name, text in rows.items())


def format_seconds(seconds: float) -> str:
    """Format a duration with its two largest units.

    Example:
        >>> format_seconds(42.3), format_seconds(75), format_seconds(7322)
        ('42 s', '1 min 15 s', '2 h 2 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_si(value: float, unit: str = "") -> str:
    """Format a number of at least 0 with three digits and an SI prefix; a whole number below 1000 with all its digits.

    Example:
        >>> format_si(2_301_000), format_si(999_999), format_si(42), format_si(0.0123, "s")
        ('2.30 M', '1.00 M', '42', '12.3 ms')
    """
    if value == int(value) and value < 1000:
        return f"{value:.0f} {unit}".rstrip()
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    group, shift = divmod(int(exponent), 3)
    return f"{float(mantissa) * 10**shift:.{2 - shift}f} {'nµm kMGTP'[group + 3].strip()}{unit}".rstrip()


@contextmanager
def working(description: str) -> Iterator[None]:
    """Show that work is in progress whose end is not known: a spinner, or a line every `LINE_INTERVAL` seconds."""
    if console.is_terminal:
        with console.status(visible(description)):
            yield
        return
    started, is_done = time.monotonic(), threading.Event()

    def print_lines() -> None:
        while not is_done.wait(LINE_INTERVAL):
            print_line(f"{description}: {format_seconds(time.monotonic() - started)}")

    thread = threading.Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()


def progress_bar(*columns: TextColumn) -> Progress:
    """Return a rich progress bar on stderr with count and remaining time.

    Args:
        columns: Further columns, shown before the remaining time.
    """
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
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
        self._task = self._bar.add_task(visible(self._description), total=self._total)
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
        self._bar.update(self._task, description=visible(text))
        self._print_line()

    def _print_line(self) -> None:
        if not console.is_terminal and time.monotonic() - self._printed >= LINE_INTERVAL:
            self._printed = time.monotonic()
            print_line(f"{self._description}: {self._done} of {self._total}")


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
