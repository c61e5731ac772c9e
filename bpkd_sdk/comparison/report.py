"""What a comparison says: one table, for a terminal, as Markdown and as JSON, and one picture."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bpkd_sdk.comparison.run import ALONE, Run
from bpkd_sdk.comparison.statistics import Row, Statistic, statistic, summarize
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
    "Scores in %: mean ± sample standard deviation over the seeds; below it the difference to the student alone, "
    "seed by seed. bIoU, bF1: boundary IoU and F1; edge, body: pixel accuracy inside and outside the edge band. "
    "Marked as best: better than every other method by more than noise, which is a paired t-test over the seeds at 5 % "
    "(so never with one seed). Seconds: spent in training steps. MB: peak memory of a run beyond what the process held "
    "before it."
)

Mark = Callable[[str], str]


@dataclass(frozen=True)
class Comparison:
    """What a comparison leaves. It can be printed with rich.

    Attributes:
        settings: What all runs share.
        teacher: Scores of the teacher, fractions in 0..1.
        runs: One for each method and seed.
        output_dir: Holds ``table.md``, ``table.json``, ``miou_over_time.png``; and for each run a folder
            ``<method>/seed<k>`` with its checkpoints, ``result.json``, and ``per_image.safetensors`` for
            `paired_bootstrap`.
    """

    settings: dict[str, Any]
    teacher: dict[str, float]
    runs: list[Run]
    output_dir: Path

    @property
    def rows(self) -> list[Row]:
        """The table: one row for each method, the student alone first."""
        return summarize(self.runs)

    @property
    def title(self) -> str:
        """What was compared, on what, and for how long."""
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
        """How to read the table."""
        unit, amount = self.settings["budget"].split("=")
        shares = [run.seconds / float(amount) for run in self.runs if unit == "seconds" and run.error is None]
        if not shares:
            return LEGEND
        used = f"{min(shares):.2f} to {max(shares):.2f}"
        return f"{LEGEND} Runs took {used} times the seconds of the budget; far from 1, the machine was not free."

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table for a terminal; on a narrow one the costs are below the scores."""
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
            method, *cells = _cells(row, best=_green, below=_dim_line)
            table.add_row(method, *cells[first:end])
        if first == 0:
            table.add_row("[dim]teacher", *(f"[dim]{100 * self.teacher[name]:.1f}" for name in HEADINGS))
        return table

    def to_markdown(self) -> str:
        """The table for a page."""
        headings = ("method", *HEADINGS.values(), *COSTS)
        lines = [headings, ("---", *["---:"] * (len(headings) - 1))]
        lines += [_cells(row, best=_bold, below=_new_line) for row in self.rows]
        lines += [("teacher", *(f"{100 * self.teacher[name]:.1f}" for name in HEADINGS), *[""] * len(COSTS))]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return f"**{self.title}**\n\n{table}\n{self.legend}\n"

    def write(self) -> None:
        """Write table and picture of the runs so far to `output_dir`."""
        from bpkd_sdk.comparison.report import draw

        write_atomically(self.output_dir / "table.md", self.to_markdown().encode())
        write_json(
            self.output_dir / "table.json",
            {
                "settings": self.settings,
                "teacher": self.teacher,
                "rows": [dataclasses.asdict(row) for row in self.rows],
            },
        )
        picture = draw(self.runs, self.title, self.teacher["miou"])
        write_atomically(self.output_dir / "miou_over_time.png", picture)


def _cells(row: Row, *, best: Mark, below: Mark) -> tuple[str, ...]:
    scores = []
    for name in HEADINGS:
        score = _written(row.scores.get(name), 100, ".1f")
        gain = below(_written(row.gains[name], 100, "+.1f")) if name in row.gains else ""
        scores.append((best(score) if name in row.best else score) + gain)
    costs = (_written(row.seconds), _written(row.ms_per_step), _written(row.peak_memory, 1e-6))
    return row.method + (below(f"{row.failed} failed") if row.failed else ""), *scores, str(row.steps), *costs


def _written(statistic: Statistic | None, factor: float = 1, form: str = ".0f") -> str:
    if statistic is None:
        return "-"
    deviation = "" if statistic.deviation is None else f" ±{factor * statistic.deviation:{form.removeprefix('+')}}"
    return f"{factor * statistic.mean:{form}}{deviation}"


def _green(text: str) -> str:
    return f"[bold green]{text}[/]"


def _dim_line(text: str) -> str:
    return f"\n[dim]{text}[/]"


def _bold(text: str) -> str:
    return f"**{text}**"


def _new_line(text: str) -> str:
    return f"<br>{text}"


# Okabe and Ito's colours, which colour-blind eyes tell apart, without the yellow that is lost on white. The markers are
# one fewer, so that no pair comes twice soon.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#666666"
BESIDE = 9  # points between a curve's end and its name


def draw(runs: Iterable[Run], title: str, teacher_miou: float) -> bytes:
    """A PNG: means over the seeds, in bands of one sample standard deviation to either side.

    Args:
        runs: Those that failed are left out.
        title: Above the plot.
        teacher_miou: As a fraction.
    """
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        if run.error is None:
            by_method.setdefault(run.method, []).append(run)
    figure = Figure(figsize=(9, 5.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    styles = zip(cycle(COLORS), cycle(MARKERS), strict=False)
    names = [
        _draw_method(axes, method, group, *((GREY, "o") if method == ALONE else next(styles)))
        for method, group in by_method.items()
    ]
    _mark_teacher(axes, 100 * teacher_miou)
    axes.set_xlim(0, 1.22 * axes.dataLim.x1)
    axes.set_xlabel("seconds of training, evaluation left out")
    axes.set_ylabel("mIoU in %, validation")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _keep_apart(figure, names)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_method(axes: Axes, method: str, runs: list[Run], color: str, marker: str) -> Annotation:
    points = list(zip(*(run.curve for run in runs), strict=True))  # by evaluation, then by seed
    x = [sum(point["seconds"] for point in seeds) / len(seeds) for seeds in points]
    scores = [statistic(100 * point["miou"] for point in seeds) for seeds in points]
    y = [score.mean for score in scores if score]
    spread = [score.deviation or 0.0 for score in scores if score]
    low, high = ([mean + sign * half for mean, half in zip(y, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.13, lw=0)
    axes.plot(x, y, color=color, marker=marker, markersize=4.5, lw=1.7, ls="--" if method == ALONE else "-")
    name = axes.annotate(
        f"{method} {y[-1]:.1f}",
        (x[-1], y[-1]),
        (BESIDE, 0),
        textcoords="offset points",
        va="center",
        color=tuple(0.7 * part for part in to_rgb(color)),  # the lighter ones are hard to read as text
        arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 0, "shrinkB": 3},
    )
    name.set_path_effects([withStroke(linewidth=3, foreground="white")])
    return name


def _mark_teacher(axes: Axes, miou: float) -> None:
    """A line at its height; no more than a note where the line would leave little room for the curves."""
    low, high = axes.get_ylim()
    note = axes.annotate(f"teacher {miou:.1f}", (0, miou), (4, 3), textcoords="offset points", color=GREY)
    if miou < high + (high - low) / 2:
        axes.axhline(miou, color=GREY, lw=1, ls=":")
    else:
        axes.set_ylim(low, high)
        note.set_text(f"{note.get_text()}, far above")
        note.xy, note.xyann, note.xycoords = (0, 1), (4, -12), "axes fraction"


def _keep_apart(figure: Figure, names: list[Annotation]) -> None:
    """Move names down, from the highest on, until none lies on another."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw_without_rendering()
    placed: list[Bbox] = []
    for name in sorted(names, key=lambda name: -name.xy[1]):
        start = box = name.get_window_extent(renderer)
        while hit := [other for other in placed if other.overlaps(box)]:
            box = box.translated(0, min(other.y0 for other in hit) - box.y1 - 1)
        name.set_position((BESIDE, (box.y0 - start.y0) * 72 / figure.dpi))
        placed.append(box)
