"""The picture of a comparison: mIoU against seconds of training, one curve a method, named at its end."""

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

from bpkd_sdk.comparison.methods import ALONE
from bpkd_sdk.comparison.run import Run
from bpkd_sdk.comparison.summary import statistic

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
