"""What a benchmark found: one row an artifact, with the machine that it was found on. To and from JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from rich.box import HORIZONTALS
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bpkd_sdk.export.benchmark.facts import Environment

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


FORMAT = "bpkd-benchmark/1"
STAGES = ("pre", "inference", "post")

# An artifact whose slowest round was slower than its fastest by more than this share was not measured in peace.
UNSTEADY = 0.2


@dataclass(frozen=True)
class Percentiles:
    """Of times, in milliseconds, interpolated linearly."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """Of calls that took so many seconds each."""
        return cls(*(float(1000 * value) for value in np.percentile(seconds, (50, 90, 99))))


@dataclass(frozen=True)
class BenchmarkRow:
    """One artifact.

    Attributes:
        name: Its path or URL; of a module its network's name.
        format: As the table of formats names it.
        problem: Why it could not be measured; all else but `name`, `format` and `file_size` is then unknown.
        device: Where it ran.
        file_size: In bytes.
        params: Of the network.
        macs: Multiply-accumulates for one image; None where the network is not known.
        precision: How many layers with weights compute in which type, as found.
        claim: The precision that its metadata states.
        placement: How many nodes ONNX Runtime ran on which provider.
        executed: How many layers ONNX Runtime ran in which type; on a CPU it computes half precision in float32.
        latency: Of a batch, from images on the host to masks on the host.
        stages: The same of its three stages, in calls of their own that wait for the device after each: "pre" (to the
            device, normalisation where it is not inside), "inference", "post" (argmax where it is not inside, to the
            host). The stages of one call overlap on a GPU, so they may add up to more than `latency`.
        throughput: Images per second, one batch after the other.
        calls: How many `latency` comes from.
        rounds: The median of each round in milliseconds: how steady the machine was.
        warm_up_calls: Before the first round.
        settled: Whether the times were steady after them.
        host_memory: Bytes of its process at the peak, beyond those before it was opened; None for a module, which runs
            in the caller's process, or where the system does not tell.
        device_memory: Bytes of the GPU at the peak, of opening and warming up, its code included; None without a GPU,
            and for a module or runtime, which may have been there before.
        miou: On the data, as a fraction.
        boundary_iou: On the data, as a fraction.
        agreement: Share of pixels with the class that the first artifact gives them, on the images of the timing.
        edge_agreement: The same within the edge band of the first artifact's masks, 7 pixels wide.
        notes: What else to know.
    """

    name: str
    format: str
    problem: str | None = None
    device: str | None = None
    file_size: int | None = None
    params: int | None = None
    macs: int | None = None
    precision: Mapping[str, int] = field(default_factory=dict)
    claim: str | None = None
    placement: Mapping[str, int] = field(default_factory=dict)
    executed: Mapping[str, int] = field(default_factory=dict)
    latency: Percentiles | None = None
    stages: Mapping[str, Percentiles] = field(default_factory=dict)
    throughput: float | None = None
    calls: int = 0
    rounds: tuple[float, ...] = ()
    warm_up_calls: int = 0
    settled: bool = False
    host_memory: int | None = None
    device_memory: int | None = None
    miou: float | None = None
    boundary_iou: float | None = None
    agreement: float | None = None
    edge_agreement: float | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchmarkRow:
        """From plain JSON values."""
        latency = values["latency"]
        return cls(
            **{
                **values,
                "latency": latency and Percentiles(**latency),
                "stages": {stage: Percentiles(**times) for stage, times in values["stages"].items()},
                "rounds": tuple(values["rounds"]),
                "notes": tuple(values["notes"]),
            }
        )


@dataclass(frozen=True)
class BenchmarkReport:
    """What `bpkd_sdk.export.benchmark` returns; print it with rich.

    Attributes:
        rows: In the order of the artifacts.
        batch: Images at a time.
        size: (height, width) of the images.
        images: Where they come from.
        data: The data set behind mIoU and boundary IoU; None without.
        duration: Seconds of timed calls for each artifact.
        rounds: How many rounds they were spread over; every second one in the opposite order.
        gap: Idle seconds before each artifact's part of a round.
        environment: The machine, before the first call.
        clocks_after: Facts of the GPUs right after the last call.
    """

    rows: tuple[BenchmarkRow, ...]
    batch: int
    size: tuple[int, int]
    images: str
    data: str | None
    duration: float
    rounds: int
    gap: float
    environment: Environment
    clocks_after: tuple[Mapping[str, str], ...] = ()

    @property
    def measured(self) -> tuple[BenchmarkRow, ...]:
        """The rows of artifacts that ran here."""
        return tuple(row for row in self.rows if row.problem is None)

    @property
    def setting(self) -> str:
        """How it was measured, in a sentence."""
        height, width = self.size
        return (
            f"Batches of {self.batch} image(s) of {height}x{width} from {self.images}; {self.duration:g} s of calls "
            f"for each artifact in {self.rounds} rounds in which they take turns, every second one in the opposite "
            f"order, {self.gap:g} s idle before each turn. From uint8 images to uint8 masks on the host."
        )

    def to_json(self) -> str:
        """All of it; `from_json` is the inverse."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BenchmarkReport:
        """Read what `to_json` wrote; ValueError for anything else."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"Expected JSON of BenchmarkReport.to_json (format {FORMAT!r}).")
        height, width = values["size"]
        return cls(
            **{
                **values,
                "rows": tuple(BenchmarkRow.from_dict(row) for row in values["rows"]),
                "size": (height, width),
                "environment": Environment.from_dict(values["environment"]),
                "clocks_after": tuple(values["clocks_after"]),
            }
        )

    def to_markdown(self) -> str:
        """The table, how it was measured, and the machine."""
        from bpkd_sdk.export.benchmark.report import to_markdown

        return to_markdown(self)

    def to_html(self) -> str:
        """A page that needs no other file: the table, and accuracy against latency as a plot."""
        from bpkd_sdk.export.benchmark.page import to_html

        return to_html(self)

    def __rich__(self) -> RenderableType:
        from bpkd_sdk.export.benchmark.report import to_rich

        return to_rich(self)
