"""A benchmark as one HTML page that needs no other file: the table, and plots of accuracy against latency."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bpkd_sdk.errors import import_optional
from bpkd_sdk.export.benchmark.environment import describe_machine
from bpkd_sdk.export.benchmark.report import STAGES, BenchmarkReport, BenchmarkRow
from bpkd_sdk.export.benchmark.table import EMPTY, FIGURES, KIND, STAGE_TIMES, format_number, list_notes, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# matplotlib draws in these colours. In the SVG each of them becomes a variable of the page's style sheet, which has
# values for light and dark pages.
FORMAT_COLOURS = {f"s{index}": f"#0000f{index}" for index in range(6)}
COLOURS = FORMAT_COLOURS | {"text": "#0000e0", "soft": "#0000e1", "line": "#0000e2", "card": "#0000e3"}
MARKERS = "osD^vPX*"
LEAST_DECADES, LEAST_PER_CENT = 0.12, 0.5  # smallest ranges of the axes, so that noise does not fill the plot

Score = Callable[[BenchmarkRow], float | None]

# Scores to plot against latency; without scores, the agreement with the first artifact.
_SCORES: dict[str, Score] = {
    "mIoU in %": lambda row: row.miou,
    "boundary IoU in %": lambda row: row.boundary_iou,
}
_AGREEMENTS: dict[str, Score] = {
    "pixels as the first artifact's, in %": lambda row: row.agreement,
    "pixels at edges as the first artifact's, in %": lambda row: row.edge_agreement,
}


class Point(NamedTuple):
    """An artifact in a plot: its name, the name of its colour, its marker, its latency in ms, its score in per cent."""

    name: str
    colour: str
    marker: str
    latency: float
    score: float


def to_html(report: BenchmarkReport) -> str:
    """Return the page.

    Raises:
        ImportError: If matplotlib or jinja2 is not installed.
    """
    jinja2 = import_optional("jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((Path(__file__).parent / "page.html.jinja").read_text("utf-8"))
    formats = dict.fromkeys(row.format for row in report.rows)
    colours = dict(zip(formats, cycle(FORMAT_COLOURS), strict=False))
    page: str = template.render(
        report=report,
        figures=[column for column in FIGURES if any(column.cell(row) for row in report.rows)],
        kind=KIND,
        stage_times=STAGE_TIMES,
        rows=list(zip(report.rows, short_names(report), strict=True)),
        empty=EMPTY,
        colours=colours,
        bars=[_bar(report, row) for row in report.rows],
        plots=_plots(report, colours),
        notes=list(list_notes(report)),
        machine=describe_machine(report.environment),
    )
    return page


def _bar(report: BenchmarkReport, row: BenchmarkRow) -> list[tuple[str, float, str]]:
    """Return the stages of a row as (name, share of the slowest artifact's time in %, tooltip)."""
    if not row.stages:
        return []
    slowest = max(sum(times.p50 for times in other.stages.values()) for other in report.measured)
    return [
        (stage, 100 * row.stages[stage].p50 / slowest, f"{stage}: {format_number(row.stages[stage].p50)} ms")
        for stage in STAGES
    ]


def _plots(report: BenchmarkReport, colours: dict[str, str]) -> list[str]:
    scored = any(row.miou is not None for row in report.measured)
    names = dict(zip((row.name for row in report.rows), short_names(report), strict=True))
    markers = {format_: cycle(MARKERS) for format_ in colours}
    marker_of = {row.name: next(markers[row.format]) for row in report.measured}
    plots = []
    for title, score in (_SCORES if scored else _AGREEMENTS).items():
        points = [
            Point(names[row.name], colours[row.format], marker_of[row.name], row.latency.p50, 100 * value)
            for row in report.measured
            if row.latency and (value := score(row)) is not None
        ]
        if points:
            plots.append(to_svg(title, points))
    return plots


def to_svg(title: str, points: Sequence[Point]) -> str:
    """Return a plot as an SVG element in the colours of the page, with the figures of each point as a tooltip."""
    matplotlib = import_optional("matplotlib")
    file = io.StringIO()
    # Without the salt, the ids in the SVG are random and the same report gives another page each time.
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 9}
    with matplotlib.rc_context(style):
        draw(title, points).savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", file.getvalue())  # the same in every plot of a page
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(title)} against latency"', 1)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    for index, point in enumerate(points):
        tooltip = f"{point.name}: {format_number(point.latency)} ms, {point.score:.2f} %"
        svg = svg.replace(f'<g id="point{index}">', f'<g class="point"><title>{escape(tooltip)}</title>')
    return svg


def draw(title: str, points: Sequence[Point]) -> Figure:
    """Draw scores against latency, with the names of the points in a legend below.

    Latency has a logarithmic axis, because speed is compared by ratios.
    """
    matplotlib = import_optional("matplotlib.figure")
    from matplotlib.ticker import LogLocator

    columns = 1 if max(len(point.name) for point in points) > 34 else 2
    height = 3.2 + 0.21 * math.ceil(len(points) / columns)
    figure: Figure = matplotlib.Figure(figsize=(5.8, height), layout="constrained")
    axes = figure.add_subplot()
    dots = [
        axes.plot(
            [point.latency],
            [point.score],
            point.marker,
            markersize=9,
            color=COLOURS[point.colour],
            markeredgecolor=COLOURS["card"],
            clip_on=False,
            gid=f"point{index}",
        )[0]
        for index, point in enumerate(points)
    ]
    axes.set_xscale("log")
    low, high = _padded([math.log10(point.latency) for point in points], LEAST_DECADES)
    axes.set_xlim(10**low, 10**high)
    axes.set_ylim(*_padded([point.score for point in points], LEAST_PER_CENT))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks([tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= min(100, axes.get_ylim()[1])])
    axes.set_xlabel("latency in ms at the median, image to mask", color=COLOURS["soft"], loc="right")
    axes.set_title(title, color=COLOURS["text"], loc="left", weight="bold")
    axes.grid(color=COLOURS["line"], clip_on=False)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=COLOURS["soft"])
    axes.spines[:].set_visible(False)
    figure.legend(
        dots,
        [textwrap.fill(point.name, 70) for point in points],
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        labelcolor=COLOURS["text"],
    )
    return figure


def _padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """Return a range that contains all values with a margin and is at least `least` wide."""
    low, high = min(values), max(values)
    margin = max(0.12 * (high - low), (least - (high - low)) / 2)
    return low - margin, high + margin
