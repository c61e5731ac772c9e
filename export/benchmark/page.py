"""A benchmark as one HTML page that needs no other file."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from bpkd_sdk.export.benchmark.report import (
    FIGURES,
    KIND,
    NOTHING,
    STAGE_TIMES,
    STAGES,
    BenchmarkReport,
    BenchmarkRow,
    machine,
    remarks,
    short,
    short_names,
)

WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 36, 48
RADIUS = 6
TEXT_HEIGHT, TEXT_WIDTH = 15, 6.7  # of one letter; SVG has no way to ask


class Point(NamedTuple):
    """One artifact: its name, its class in the style sheet, milliseconds, per cent, and what the mouse is told."""

    name: str
    style: str
    x: float
    y: float
    told: str


class Tick(NamedTuple):
    """A line of the grid: where, and what it says."""

    position: float
    text: str


class Mark(NamedTuple):
    """A point in the picture, with the place of its name."""

    point: Point
    x: float
    y: float
    text_x: float
    text_y: float
    is_far: bool


class Plot(NamedTuple):
    """A picture, as the template draws it."""

    title: str
    columns: list[Tick]
    rows: list[Tick]
    marks: list[Mark]


def make_plot(title: str, points: Sequence[Point]) -> Plot:
    """Place points, their names and a grid; latency is logarithmic, as ratios are what one buys with it."""
    low, high = _padded([math.log10(point.x) for point in points], least=0.12)
    bottom, top = _padded([point.y for point in points], least=0.5)
    top = min(top, 100 + 0.08 * (top - bottom))

    def across(milliseconds: float) -> float:
        return LEFT + (math.log10(milliseconds) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def up(per_cent: float) -> float:
        return HEIGHT - BOTTOM - (per_cent - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    return Plot(
        title,
        [Tick(across(value), f"{value:g}") for value in log_ticks(10**low, 10**high)],
        [Tick(up(value), f"{value:g}") for value in ticks(bottom, min(top, 100))],
        _name([(point, across(point.x), up(point.y)) for point in points]),
    )


def _padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """A range with all values well inside, of the least width at least."""
    low, high = min(values), max(values)
    margin = max(0.18 * (high - low), (least - (high - low)) / 2)
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers inside a range.

    Example:
        >>> ticks(61.2, 68.9)
        [62.0, 64.0, 66.0, 68.0]
    """
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    return [round(index * step, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers inside a range of a logarithmic axis.

    Example:
        >>> log_ticks(8, 120)
        [10.0, 20.0, 50.0, 100.0]
    """
    decades = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for steps in ((1,), (1, 2, 5)):
        found = [round(step * decade, 10) for decade in decades for step in steps if low <= step * decade <= high]
        if len(found) >= 4:
            return found
    return ticks(low, high)


def _name(places: Sequence[tuple[Point, float, float]]) -> list[Mark]:
    """Put each name where it hides no point and no other name, as near to its point as that allows."""
    taken = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for _, x, y in places]
    marks = []
    for point, x, y in sorted(places, key=lambda place: (place[2], place[1])):
        width = TEXT_WIDTH * len(point.name)
        box, is_far = next(
            ((box, is_far) for box, is_far in _offers(x, y, width) if _is_free(box, taken)),
            (next(_offers(x, y, width))[0], False),
        )
        taken.append(box)
        marks.append(Mark(point, x, y, box[0], box[3] - 4, is_far))
    return marks


Box = tuple[float, float, float, float]


def _offers(x: float, y: float, width: float) -> Iterator[tuple[Box, bool]]:
    """Places for a text beside a point: right, left, above, below, then farther and farther off, with a line to it."""
    for distance in range(RADIUS + 4, 200, TEXT_HEIGHT):
        is_far = distance > RADIUS + 4
        middle = y - TEXT_HEIGHT / 2
        beside = 0 if not is_far else TEXT_HEIGHT
        for left, upper in (
            (x + max(RADIUS + 4, beside), middle - distance * is_far),
            (x + max(RADIUS + 4, beside), middle + distance * is_far),
            (x - max(RADIUS + 4, beside) - width, middle - distance * is_far),
            (x - max(RADIUS + 4, beside) - width, middle + distance * is_far),
            (x - width / 2, y - distance - TEXT_HEIGHT),
            (x - width / 2, y + distance),
        ):
            yield (left, upper, left + width, upper + TEXT_HEIGHT), is_far


def _is_free(box: Box, taken: Sequence[Box]) -> bool:
    left, upper, right, lower = box
    inside = left >= LEFT and right <= WIDTH - 4 and upper >= TOP - 8 and lower <= HEIGHT - BOTTOM
    return inside and not any(left < r and l < right and upper < b and t < lower for l, t, r, b in taken)  # noqa: E741


# What can be plotted against latency: scores if there are any, otherwise how far the artifacts agree.
_SCORES: dict[str, Callable[[BenchmarkRow], float | None]] = {
    "mIoU in %": lambda row: row.miou,
    "boundary IoU in %": lambda row: row.boundary_iou,
}
_AGREEMENTS: dict[str, Callable[[BenchmarkRow], float | None]] = {
    "pixels as the first artifact's, in %": lambda row: row.agreement,
    "pixels at edges as the first artifact's, in %": lambda row: row.edge_agreement,
}


def to_html(report: BenchmarkReport) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((Path(__file__).parent / "page.html.jinja").read_text("utf-8"))
    formats = list(dict.fromkeys(row.format for row in report.rows))
    return template.render(
        report=report,
        figures=[column for column in FIGURES if any(column.show(row) for row in report.rows)],
        kind=KIND,
        stage_times=STAGE_TIMES[0],
        rows=list(zip(report.rows, short_names(report), strict=True)),
        nothing=NOTHING,
        styles={format_: f"s{index}" for index, format_ in enumerate(formats)},
        bars=[_bar(report, row) for row in report.rows],
        plots=_plots(report, formats),
        area=sys.modules[__name__],
        remarks=list(remarks(report)),
        machine=machine(report.environment),
    )


def _plots(report: BenchmarkReport, formats: list[str]) -> list[Plot]:
    scored = any(row.miou is not None for row in report.measured)
    names = dict(zip((row.name for row in report.rows), short_names(report), strict=True))
    plots = []
    for title, value in (_SCORES if scored else _AGREEMENTS).items():
        points = [
            Point(
                names[row.name],
                f"s{formats.index(row.format)}",
                row.latency.p50,
                100 * score,
                f"{names[row.name]}: {short(row.latency.p50)} ms, {100 * score:.2f} %",
            )
            for row in report.measured
            if row.latency and (score := value(row)) is not None
        ]
        if points:
            plots.append(make_plot(title, points))
    return plots


def _bar(report: BenchmarkReport, row: BenchmarkRow) -> list[tuple[str, float, str]]:
    """The stages of a row as (name, share of the slowest artifact's time in %, text)."""
    if not row.stages:
        return []
    slowest = max(sum(times.p50 for times in other.stages.values()) for other in report.measured)
    return [
        (stage, 100 * row.stages[stage].p50 / slowest, f"{stage}: {short(row.stages[stage].p50)} ms")
        for stage in STAGES
    ]
