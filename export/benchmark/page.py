"""A benchmark as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2

from bpkd_sdk.export.benchmark import plot, table
from bpkd_sdk.export.benchmark.report import STAGES, BenchmarkReport, BenchmarkRow

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
        figures=[column for column in table.FIGURES if any(column.show(row) for row in report.rows)],
        kind=table.KIND,
        stage_times=table.STAGE_TIMES[0],
        rows=list(zip(report.rows, table.short_names(report), strict=True)),
        nothing=table.NOTHING,
        styles={format_: f"s{index}" for index, format_ in enumerate(formats)},
        bars=[_bar(report, row) for row in report.rows],
        plots=_plots(report, formats),
        area=plot,
        remarks=list(table.remarks(report)),
        machine=table.machine(report.environment),
    )


def _plots(report: BenchmarkReport, formats: list[str]) -> list[plot.Plot]:
    scored = any(row.miou is not None for row in report.measured)
    names = dict(zip((row.name for row in report.rows), table.short_names(report), strict=True))
    plots = []
    for title, value in (_SCORES if scored else _AGREEMENTS).items():
        points = [
            plot.Point(
                names[row.name],
                f"s{formats.index(row.format)}",
                row.latency.p50,
                100 * score,
                f"{names[row.name]}: {table.short(row.latency.p50)} ms, {100 * score:.2f} %",
            )
            for row in report.measured
            if row.latency and (score := value(row)) is not None
        ]
        if points:
            plots.append(plot.make_plot(title, points))
    return plots


def _bar(report: BenchmarkReport, row: BenchmarkRow) -> list[tuple[str, float, str]]:
    """The stages of a row as (name, share of the slowest artifact's time in %, text)."""
    if not row.stages:
        return []
    slowest = max(sum(times.p50 for times in other.stages.values()) for other in report.measured)
    return [
        (stage, 100 * row.stages[stage].p50 / slowest, f"{stage}: {table.short(row.stages[stage].p50)} ms")
        for stage in STAGES
    ]
