"""A benchmark's table, for terminals and as Markdown; columns in which nobody has anything are left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import NamedTuple

from rich.box import HORIZONTALS
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bpkd_sdk.export.benchmark.environment import Environment
from bpkd_sdk.export.benchmark.report import STAGES, BenchmarkReport, BenchmarkRow

NOTHING = "–"


class Column(NamedTuple):
    """One column: its heading, and what it shows of a row (None: nothing)."""

    heading: str
    show: Callable[[BenchmarkRow], str | None]


def shown_columns(report: BenchmarkReport) -> list[Column]:
    """The columns beside the artifact's name that have something to show."""
    return [column for column in (*KIND, *STAGE_TIMES, *FIGURES) if any(column.show(row) for row in report.rows)]


def short_names(report: BenchmarkReport) -> list[str]:
    """The artifacts' names without the folder, where that tells them apart."""
    names = [row.name for row in report.rows]
    short = [os.path.basename(name) or name for name in names]
    return [last if short.count(last) == 1 else name for name, last in zip(names, short, strict=True)]


def remarks(report: BenchmarkReport) -> Iterator[str]:
    """What is to be known besides the table: of the machine, then of artifacts that ran."""
    yield from report.environment.warnings
    for row, name in zip(report.rows, short_names(report), strict=True):
        for note in row.notes:
            yield f"{name}: {note}"


def problems(report: BenchmarkReport) -> Iterator[str]:
    """The artifacts that did not run, and why."""
    for row, name in zip(report.rows, short_names(report), strict=True):
        if row.problem is not None:
            yield f"{name} could not be measured here: {row.problem}"


def machine(environment: Environment) -> str:
    """The environment in a sentence or two."""
    cpu = f"{environment.cpu}, {environment.cores} cores, torch on {environment.threads} thread(s)"
    governor = f", governor {environment.governor}" if environment.governor else ""
    gpus = [f"{gpu['name']}, driver {gpu.get('driver', 'unknown')}" for gpu in environment.gpus]
    versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
    return f"{'; '.join([cpu + governor, *gpus])}. {environment.system}. {versions}."


def to_rich(report: BenchmarkReport) -> RenderableType:
    """The table, two lines an artifact, and the remarks, for a terminal."""
    shown = {column.heading: column for column in shown_columns(report)}
    groups = [group for names in _TOGETHER if (group := [shown[name] for name in names if name in shown])]
    table = Table(box=HORIZONTALS, show_lines=True, padding=(0, 1))
    table.add_column("artifact", overflow="fold")
    for group in groups:
        table.add_column("\n".join(column.heading for column in group), justify="right", no_wrap=True)
    for row, name in zip(report.rows, short_names(report), strict=True):
        kind = " · ".join(filter(None, (column.show(row) for column in KIND)))
        cells = ("\n".join(column.show(row) or NOTHING for column in group) for group in groups)
        table.add_row(f"[bold]{escape(name)}[/]\n[dim]{escape(kind)}", *cells)
    notes = [Text(note, style="yellow") for note in (*remarks(report), *problems(report))]
    return Group(Text(report.setting), table, *notes, Text(machine(report.environment), style="dim"))


def to_markdown(report: BenchmarkReport) -> str:
    """The table, the remarks, how it was measured and where."""
    columns = shown_columns(report)
    lines = [
        " | ".join(["| artifact", *(column.heading for column in columns)]) + " |",
        "|".join(["|---", *("---:" for _ in columns)]) + "|",
    ]
    for row, name in zip(report.rows, short_names(report), strict=True):
        lines.append(" | ".join([f"| `{name}`", *(column.show(row) or NOTHING for column in columns)]) + " |")
    lines += ["", *(f"- {note}" for note in (*remarks(report), *problems(report)))]
    return "\n".join([*lines, "", report.setting, "", machine(report.environment)]) + "\n"


def short(value: float) -> str:
    """With as many digits as mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _amount(unit: float, digits: int) -> Callable[[float | None], str | None]:
    return lambda value: None if value is None else f"{value / unit:,.{digits}f}"


_mega, _memory, _giga, _share = _amount(1e6, 2), _amount(1e6, 0), _amount(1e9, 2), _amount(0.01, 2)


def _latency(row: BenchmarkRow) -> str | None:
    return " / ".join(short(value) for value in astuple(row.latency)) if row.latency else None


def _stages(row: BenchmarkRow) -> str | None:
    return " + ".join(short(row.stages[stage].p50) for stage in STAGES) if row.stages else None


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
STAGE_TIMES = (Column("pre + infer + post", _stages),)
FIGURES = (
    Column("p50 / p90 / p99 ms", _latency),
    Column("images/s", lambda row: short(row.throughput) if row.throughput else None),
    Column("MB", lambda row: _mega(row.file_size)),
    Column("M params", lambda row: _mega(row.params)),
    Column("GMACs", lambda row: _giga(row.macs)),
    Column("host MB", lambda row: _memory(row.host_memory)),
    Column("GPU MB", lambda row: _memory(row.device_memory)),
    Column("mIoU %", lambda row: _share(row.miou)),
    Column("boundary IoU %", lambda row: _share(row.boundary_iou)),
    Column("as first %", lambda row: _share(row.agreement)),
    Column("at edges %", lambda row: _share(row.edge_agreement)),
    Column("ORT nodes", _nodes),
)
# Columns that share one in a terminal.
_TOGETHER = (
    ("p50 / p90 / p99 ms", "pre + infer + post"),
    ("images/s", "ORT nodes"),
    ("MB", "host MB", "GPU MB"),
    ("M params", "GMACs"),
    ("mIoU %", "boundary IoU %"),
    ("as first %", "at edges %"),
)
