"""Report of a comparison: one table for a terminal, as Markdown and as JSON, and one plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bpkd_sdk.comparison.run import Run
from bpkd_sdk.comparison.statistics import Row, Statistic, summarize
from bpkd_sdk.files import write_atomically, write_json

HEADINGS = {
    "miou": "mIoU",
    "macc": "mAcc",
    "boundary_iou": "bIoU",
    "boundary_f1": "bF1",
    "edge_accuracy": "edge",
    "body_accuracy": "body",
}
COSTS = ("steps", "seconds", "ms/step", "MB")
LEGEND = (
    "Scores in %: mean ± sample standard deviation over the seeds; below it the difference to the student trained "
    "alone, seed by seed. bIoU, bF1: boundary IoU and F1. edge, body: pixel accuracy inside and outside of the edge "
    "band. Marked as best: significantly better than every other method by a two-sided paired t-test over the seeds at "
    "5 % (never with one seed). seconds: time in training steps. MB: peak memory of a run above the memory before it."
)

Markup = Callable[[str], str]


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison, which rich can print.

    Attributes:
        settings: Settings that all runs share.
        teacher: Scores of the teacher, fractions in 0..1.
        runs: One run per method and seed.
        output_dir: Folder with ``table.md``, ``table.json`` and ``miou_over_time.png``, and with a folder
            ``<method>/seed<k>`` per run, which contains its checkpoints, ``result.json``, and ``per_image.safetensors``
            for `paired_bootstrap`.
    """

    settings: dict[str, Any]
    teacher: dict[str, float]
    runs: list[Run]
    output_dir: Path

    @property
    def rows(self) -> list[Row]:
        """Rows of the table, one per method, the student trained alone first."""
        return summarize(self.runs)

    @property
    def title(self) -> str:
        """Title of the table: student, data, budget and seeds."""
        train, val = (
            f"{self.settings[split]['name']} ({self.settings[split]['images']})" for split in ("train", "val")
        )
        unit, amount = self.settings["budget"].split("=")
        seeds = len({run.seed for run in self.runs})
        return (
            f"{self.settings['student']['network']}, images of {train} and {val}: "
            f"{amount} {unit}, {seeds} {'seeds' if seeds > 1 else 'seed'}"
        )

    @property
    def legend(self) -> str:
        """Explanation of the table."""
        unit, amount = self.settings["budget"].split("=")
        ratios = [run.seconds / float(amount) for run in self.runs if unit == "seconds" and run.error is None]
        if not ratios:
            return LEGEND
        return (
            f"{LEGEND} Runs took {min(ratios):.2f} to {max(ratios):.2f} times the seconds of the budget; a ratio far "
            "from 1 means that other programs used the machine."
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table for a terminal; on a narrow one the costs are below the scores."""
        whole = self._table(0, len(HEADINGS) + len(COSTS))
        yield Text(self.title, style="italic")
        if Measurement.get(console, options.update(width=1000), whole).maximum <= options.max_width:
            yield whole
        else:
            yield self._table(0, len(HEADINGS))
            yield self._table(len(HEADINGS), len(HEADINGS) + len(COSTS))
        yield Text(self.legend, style="dim")

    def _table(self, first: int, end: int) -> Table:
        table = Table("method", padding=(0, 1, 0, 0), box=None)
        for heading in (*HEADINGS.values(), *COSTS)[first:end]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            method, *cells = _cells(
                row, best=lambda text: f"[bold green]{text}[/]", second_line=lambda text: f"\n[dim]{text}[/]"
            )
            table.add_row(*map(Text.from_markup, (method, *cells[first:end])))
        if first == 0:
            table.add_row("teacher", *(f"{100 * self.teacher[name]:.1f}" for name in HEADINGS), style="dim")
        return table

    def to_markdown(self) -> str:
        """Return title, table and legend as Markdown."""
        headings = ("method", *HEADINGS.values(), *COSTS)
        lines = [headings, ("---", *["---:"] * (len(headings) - 1))]
        lines += [
            _cells(row, best=lambda text: f"**{text}**", second_line=lambda text: f"<br>{text}") for row in self.rows
        ]
        lines += [("teacher", *(f"{100 * self.teacher[name]:.1f}" for name in HEADINGS), *[""] * len(COSTS))]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return f"**{self.title}**\n\n{table}\n{self.legend}\n"

    def write(self) -> None:
        """Write the table and the plot of the runs so far to `output_dir`."""
        from bpkd_sdk.comparison.plot import plot_comparison  # matplotlib is an optional package

        write_atomically(self.output_dir / "table.md", self.to_markdown().encode())
        write_json(
            self.output_dir / "table.json",
            {
                "settings": self.settings,
                "teacher": self.teacher,
                "rows": [dataclasses.asdict(row) for row in self.rows],
            },
        )
        plot = plot_comparison(self.runs, self.title, self.teacher["miou"])
        write_atomically(self.output_dir / "miou_over_time.png", plot)


def _cells(row: Row, *, best: Markup, second_line: Markup) -> tuple[str, ...]:
    """Format the cells of a row.

    Args:
        row: One method.
        best: Markup of scores that are significantly better.
        second_line: Markup of text below the first line of a cell.
    """
    scores = []
    for name in HEADINGS:
        score = _format_statistic(row.scores.get(name), 100, ".1f")
        gain = second_line(_format_statistic(row.gains[name], 100, "+.1f")) if name in row.gains else ""
        scores.append((best(score) if name in row.best else score) + gain)
    costs = (
        _format_statistic(row.seconds),
        _format_statistic(row.ms_per_step),
        _format_statistic(row.peak_memory, 1e-6),
    )
    method = row.method + (second_line(f"{row.failed} failed") if row.failed else "")
    return method, *scores, str(row.steps), *costs


def _format_statistic(value: Statistic | None, factor: float = 1, number_format: str = ".0f") -> str:
    if value is None:
        return "-"
    deviation = ""
    if value.deviation is not None:
        deviation = f" ±{factor * value.deviation:{number_format.removeprefix('+')}}"
    return f"{factor * value.mean:{number_format}}{deviation}"
