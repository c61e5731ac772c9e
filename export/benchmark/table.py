"""The table of a benchmark: its columns, its notes, and its form for a terminal and as Markdown."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import NamedTuple

from rich.box import HORIZONTALS
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bpkd_sdk.export.benchmark.environment import describe_machine
from bpkd_sdk.export.benchmark.report import STAGES, BenchmarkReport, BenchmarkRow
from bpkd_sdk.progress import visible

EMPTY = "–"


class Column(NamedTuple):
    """A column: its heading, and a function from a row to the text of its cell (None: empty)."""

    heading: str
    cell: Callable[[BenchmarkRow], str | None]


_NAME_WIDTH = 20  # smallest width of the artifacts' names in the table; a narrower terminal lists them below it


def to_rich(report: BenchmarkReport, width: int) -> RenderableType:
    """Return the table for a terminal of this width, with two lines per artifact, and the notes."""
    shown = {column.heading: column for column in _used_columns(report)}
    groups = [group for names in _TERMINAL_GROUPS if (group := [shown[name] for name in names if name in shown])]
    figures = [
        [
            "\n".join(column.heading for column in group),
            *("\n".join(column.cell(row) or EMPTY for column in group) for row in report.rows),
        ]
        for group in groups
    ]
    widths = [max(len(line) for cell in column for line in cell.splitlines()) for column in figures]
    names_width = width - sum(widths) - 2 * len(widths) - 4  # the padding of the figures and of the edges
    is_narrow = names_width < _NAME_WIDTH
    table = Table(box=HORIZONTALS, show_lines=True, padding=(0, 0 if names_width < 3 else 1))
    table.add_column("" if is_narrow else "artifact", overflow="fold")
    for heading, *_ in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    listed = []
    for number, (row, name, *cells) in enumerate(
        zip(report.rows, short_names(report), *(column[1:] for column in figures), strict=True), start=1
    ):
        title, kind = Text(visible(name), "bold"), " · ".join(filter(None, (column.cell(row) for column in KIND)))
        kind_text = Text(visible(kind), "dim")
        if is_narrow:
            listed.append(Text(" ").join((Text(f"{number}"), title, kind_text)))
        table.add_row(str(number) if is_narrow else Text("\n").join((title, kind_text)), *cells)
    texts = [Text(visible(note), style="yellow") for note in (*list_notes(report), *_problems(report))]
    return Group(Text(report.setting), table, *listed, *texts, Text(describe_machine(report.environment), style="dim"))


def to_markdown(report: BenchmarkReport) -> str:
    """Return the table, the notes, the setting and the machine as Markdown."""
    columns = _used_columns(report)
    lines = [
        " | ".join(["| artifact", *(column.heading for column in columns)]) + " |",
        "|".join(["|---", *("---:" for _ in columns)]) + "|",
    ]
    for row, name in zip(report.rows, short_names(report), strict=True):
        lines.append(" | ".join([f"| `{name}`", *(column.cell(row) or EMPTY for column in columns)]) + " |")
    lines += ["", *(f"- {note}" for note in (*list_notes(report), *_problems(report)))]
    return "\n".join([*lines, "", report.setting, "", describe_machine(report.environment)]) + "\n"


def short_names(report: BenchmarkReport) -> list[str]:
    """Return the names of the artifacts, without the folder if the file name is unique."""
    names = [row.name for row in report.rows]
    short = [os.path.basename(name) or name for name in names]
    return [last if short.count(last) == 1 else name for name, last in zip(names, short, strict=True)]


def list_notes(report: BenchmarkReport) -> Iterator[str]:
    """Yield the warnings about the machine, then the notes of the artifacts."""
    yield from report.environment.warnings
    for row, name in zip(report.rows, short_names(report), strict=True):
        for note in row.notes:
            yield f"{name}: {note}"


def _problems(report: BenchmarkReport) -> Iterator[str]:
    for row, name in zip(report.rows, short_names(report), strict=True):
        if row.problem is not None:
            yield f"{name} could not be measured here: {row.problem}"


def _used_columns(report: BenchmarkReport) -> list[Column]:
    """Return the columns with at least one cell that is not empty."""
    return [column for column in (*KIND, STAGE_TIMES, *FIGURES) if any(column.cell(row) for row in report.rows)]


def format_number(value: float) -> str:
    """Format a number with about three significant digits.

    Examples:
        >>> format_number(1.2345), format_number(12.345), format_number(123.45)
        ('1.23', '12.3', '123')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _formatter(unit: float, digits: int) -> Callable[[float | None], str | None]:
    return lambda value: None if value is None else f"{value / unit:,.{digits}f}"


_mega, _memory, _giga, _percent = _formatter(1e6, 2), _formatter(1e6, 0), _formatter(1e9, 2), _formatter(0.01, 2)


def _latency(row: BenchmarkRow) -> str | None:
    return " / ".join(format_number(value) for value in astuple(row.latency)) if row.latency else None


def _stages(row: BenchmarkRow) -> str | None:
    return " + ".join(format_number(row.stages[stage].p50) for stage in STAGES) if row.stages else None


def _precision(row: BenchmarkRow) -> str | None:
    if len(row.precision) == 1:
        return next(iter(row.precision))
    return ", ".join(f"{count} {type_}" for type_, count in row.precision.items()) or None


def _nodes(row: BenchmarkRow) -> str | None:
    return ", ".join(f"{count} {provider}" for provider, count in row.placement.items()) or None


KIND = (
    Column("format", lambda row: row.format),
    Column("device", lambda row: row.device),
    Column("layers", _precision),
)
STAGE_TIMES = Column("pre + infer + post", _stages)
FIGURES = (
    Column("p50 / p90 / p99 ms", _latency),
    Column("images/s", lambda row: format_number(row.throughput) if row.throughput else None),
    Column("MB", lambda row: _mega(row.file_size)),
    Column("M params", lambda row: _mega(row.params)),
    Column("GMACs", lambda row: _giga(row.macs)),
    Column("host MB", lambda row: _memory(row.host_memory)),
    Column("GPU MB", lambda row: _memory(row.device_memory)),
    Column("mIoU %", lambda row: _percent(row.miou)),
    Column("boundary IoU %", lambda row: _percent(row.boundary_iou)),
    Column("as first %", lambda row: _percent(row.agreement)),
    Column("at edges %", lambda row: _percent(row.edge_agreement)),
    Column("ORT nodes", _nodes),
)
# Headings of the columns that share one column in a terminal.
_TERMINAL_GROUPS = (
    ("p50 / p90 / p99 ms", "pre + infer + post"),
    ("images/s", "ORT nodes"),
    ("MB", "host MB", "GPU MB"),
    ("M params", "GMACs"),
    ("mIoU %", "boundary IoU %"),
    ("as first %", "at edges %"),
)
