"""Plot of a comparison: mIoU against seconds of training, one labelled curve per method (matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from bpkd_sdk.comparison.run import Run
from bpkd_sdk.comparison.setup import BASELINE
from bpkd_sdk.comparison.statistics import statistic

# Colours by Okabe and Ito, which colour-blind readers can distinguish, without yellow, which is invisible on white.
# With one marker fewer than colours, a pair of colour and marker repeats only after 42 methods.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#666666"
LABEL_OFFSET = 9  # points between the end of a curve and its label


def plot_comparison(runs: Iterable[Run], title: str, teacher_miou: float) -> bytes:
    """Draw the mean mIoU over seeds of each method, in a band of one sample standard deviation, as a PNG.

    Args:
        runs: Runs of all methods; failed ones are left out.
        title: Title above the plot.
        teacher_miou: mIoU of the teacher, as a fraction.
    """
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        if run.error is None:
            by_method.setdefault(run.method, []).append(run)
    figure = Figure(figsize=(9, 5.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    styles = zip(cycle(COLORS), cycle(MARKERS), strict=False)
    labels = [
        _draw_method(axes, method, group, *((GREY, "o") if method == BASELINE else next(styles)))
        for method, group in by_method.items()
    ]
    _mark_teacher(axes, 100 * teacher_miou)
    axes.set_xlim(0, 1.22 * axes.dataLim.x1)
    axes.set_xlabel("seconds of training, without evaluation")
    axes.set_ylabel("mIoU in %, validation")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _separate_labels(figure, labels)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_method(axes: Axes, method: str, runs: list[Run], color: str, marker: str) -> Annotation:
    evaluations = list(zip(*(run.curve for run in runs), strict=True))  # by evaluation, then by seed
    x, y, spread = [], [], []
    for points in evaluations:
        score = statistic(None if point["miou"] is None else 100 * point["miou"] for point in points)
        seconds = statistic(point["seconds"] for point in points)
        if score and seconds:
            x.append(seconds.mean)
            y.append(score.mean)
            spread.append(score.deviation or 0.0)
    low, high = ([mean + sign * half for mean, half in zip(y, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.13, lw=0)
    axes.plot(x, y, color=color, marker=marker, markersize=4.5, lw=1.7, ls="--" if method == BASELINE else "-")
    label = axes.annotate(
        f"{method} {y[-1]:.1f}",
        (x[-1], y[-1]),
        (LABEL_OFFSET, 0),
        textcoords="offset points",
        va="center",
        color=tuple(0.7 * part for part in to_rgb(color)),  # darker, because light colours are hard to read as text
        arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 0, "shrinkB": 3},
    )
    label.set_path_effects([withStroke(linewidth=3, foreground="white")])
    return label


def _mark_teacher(axes: Axes, miou: float) -> None:
    """Draw a line at the teacher's mIoU, or only a note if the line would leave little room for the curves."""
    low, high = axes.get_ylim()
    note = axes.annotate(f"teacher {miou:.1f}", (0, miou), (4, 3), textcoords="offset points", color=GREY)
    if miou < high + (high - low) / 2:
        axes.axhline(miou, color=GREY, lw=1, ls=":")
    else:
        axes.set_ylim(low, high)
        note.set_text(f"{note.get_text()}, far above")
        note.xy, note.xyann, note.xycoords = (0, 1), (4, -12), "axes fraction"


def _separate_labels(figure: Figure, labels: list[Annotation]) -> None:
    """Move labels down, from the highest to the lowest, until no two of them overlap."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw_without_rendering()
    placed: list[Bbox] = []
    for label in sorted(labels, key=lambda label: -label.xy[1]):
        start = box = label.get_window_extent(renderer)
        while hit := [other for other in placed if other.overlaps(box)]:
            box = box.translated(0, min(other.y0 for other in hit) - box.y1 - 1)
        label.set_position((LABEL_OFFSET, (box.y0 - start.y0) * 72 / figure.dpi))
        placed.append(box)
