"""Tables of the study, as Markdown, from its records: the primary questions, then every folder of runs."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.records import EMPTY, markdown_table
from benchmarks.study.methods import method_name
from benchmarks.study.scores import Effect, adjust_by_holm, effects, mean, verdict
from benchmarks.study.setup import WORLDS
from benchmarks.study.training import CURVE_STEPS, MAIN_STEPS, PLATEAU_FROM, factorial_cells
from bpkd_sdk.comparison.setup import BASELINE
from bpkd_sdk.comparison.statistics import statistic

Records = Mapping[str, Mapping[str, Any]]
Runs = dict[str, dict[int, Mapping[str, Any]]]  # by method and seed

PRIMARY = ("edge 3 px", "edge 7 px", "boundary IoU")
MEASURES = ("mIoU", *PRIMARY, "body 7 px")
PLATEAU = 0.003  # a run is converged if its mIoU moves less after `PLATEAU_FROM` of its steps
RIVALS = {"CWD": "cwd", "KD": "kd", "DIST": "dist"}
FAMILY = (1 + len(RIVALS)) * len(PRIMARY) * len(WORLDS)  # tests of the primary questions: the edge term, and each rival


def tables(records: Records) -> str:
    """Return the answers to the primary questions, and one section for each world and folder."""
    sections = ["# Study: tables\n", *_primary(records)]
    for world in WORLDS:
        if tune := records.get(f"{world}/tune"):
            sections += [f"## {world}: tuned weights\n", _tuned(tune, records.get(f"{world}/rate", {}))]
            sections += [*_factorial(records, world, tune), *_curve(records, world, tune)]
        for folder in _folders(records, world):
            sections += [f"## {world}: {folder}\n", _scores(runs_of(records, world, folder))]
    return "\n".join(sections).rstrip() + "\n"


def runs_of(records: Records, world: str, folder: str) -> Runs:
    """Return the runs of a folder that did not fail, by method and seed."""
    runs: Runs = {}
    for key, record in records.items():
        if key.startswith(f"{world}/{folder}/") and record["error"] is None:
            runs.setdefault(record["method"], {})[record["seed"]] = record
    return runs


def score(run: Mapping[str, Any], measure: str) -> float:
    """Return a score of a run, as a fraction."""
    if measure == "edge 3 px":
        return float(run["edge_widths"]["3"][0])
    names = {"mIoU": "miou", "edge 7 px": "edge_accuracy", "boundary IoU": "boundary_iou", "body 7 px": "body_accuracy"}
    return float(run["metrics"][names[measure]])


def move_at_the_end(run: Mapping[str, Any]) -> float | None:
    """Return by how much the mIoU moves in the last part of a run; None if it was scored at the end only."""
    curve = run["curve"]
    return abs(curve[-1]["miou"] - curve[-2]["miou"]) if len(curve) > 1 else None


def primary_effects(records: Records, world: str) -> dict[str, dict[str, Effect]]:
    """Return the effects of the primary questions by question and measure, mIoU included."""
    best = records.get(f"{world}/tune")
    if best is None:
        return {}
    runs, found = runs_of(records, world, f"steps-{MAIN_STEPS}"), dict[str, dict[str, Effect]]()
    cells = {method_name(cell) or BASELINE: cell for cell in factorial_cells(best)}
    edge = {name: (1 if "edge" in cell else -1) / 4 for name, cell in cells.items()}
    bpkd = method_name(best["bpkd"])
    pairs = {f"BPKD against {title}": method_name(best[name]) for title, name in RIVALS.items()}
    contrasts = {name: {bpkd: 1.0, other: -1.0} for name, other in pairs.items()}
    for measure in MEASURES:
        questions = _effects(runs, list(cells), {"the edge term": edge}, measure)
        questions |= _effects(runs, [BASELINE, bpkd, *pairs.values()], contrasts, measure)
        for question, effect in questions.items():
            found.setdefault(question, {})[measure] = effect
    return found


def _effects(
    runs: Runs, names: list[str], contrasts: Mapping[str, Mapping[str, float]], measure: str
) -> dict[str, Effect]:
    """Return the effects on a measure; none before all of the methods have runs."""
    if not all(name in runs for name in names):
        return {}
    values = {name: {seed: score(run, measure) for seed, run in runs[name].items()} for name in names}
    return effects(values, contrasts)


def _primary(records: Records) -> Iterator[str]:
    found = {world: primary_effects(records, world) for world in WORLDS}
    p = {
        f"{world}/{question}/{measure}": by_measure[measure].p
        for world, questions in found.items()
        for question, by_measure in questions.items()
        for measure in PRIMARY
    }
    if not p:
        return
    adjusted, rows = adjust_by_holm(p, FAMILY), []
    for key in p:
        world, question, measure = key.split("/")
        effect, miou = found[world][question][measure], found[world][question]["mIoU"]
        answer = verdict(effect, adjusted[key], miou)
        cells = (_points(effect), f"{effect.p:.4f}", f"{adjusted[key]:.4f}", _points(miou), str(effect.seeds), answer)
        rows.append([world, question, measure, *cells])
    yield "## Primary questions\n"
    headings = ("world", "question", "measure", "difference", "p", "p by Holm", "mIoU", "seeds", "answer")
    yield markdown_table(headings, rows, text_columns=(0, 1, 2, 8))


def _points(effect: Effect) -> str:
    return f"{100 * effect.difference:+.2f} ({100 * effect.low:+.2f} to {100 * effect.high:+.2f})"


def _tuned(tune: Mapping[str, Mapping[str, float]], rate: Mapping[str, Any]) -> str:
    rows = [["learning rate", f"{rate.get('learning_rate', 0):g}"]]
    rows += [[name, method_name(weights)] for name, weights in tune.items()]
    return markdown_table(("method", "weights"), rows, text_columns=(0, 1))


def _factorial(records: Records, world: str, best: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    runs = runs_of(records, world, f"steps-{MAIN_STEPS}")
    cells = {method_name(cell) or BASELINE: cell for cell in factorial_cells(best)}
    contrasts = {}
    for terms in (("kd",), ("body",), ("edge",), ("kd", "edge"), ("body", "edge"), ("kd", "body")):
        signs = dict.fromkeys(cells, 1)
        for term in terms:
            signs = {name: sign * (1 if term in cells[name] else -1) for name, sign in signs.items()}
        contrasts[" x ".join(terms)] = {name: sign / 4 for name, sign in signs.items()}
    by_measure = {measure: _effects(runs, list(cells), contrasts, measure) for measure in MEASURES}
    if by_measure["mIoU"]:
        rows = [[name, *(_points(by_measure[measure][name]) for measure in MEASURES)] for name in contrasts]
        yield f"## {world}: factorial\n"
        yield markdown_table(("effect", *MEASURES), rows)


def _curve(records: Records, world: str, best: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    names = [BASELINE, *(method_name(best[name]) for name in ("cwd", "bpkd", "kd+cwd"))]
    for measure in ("mIoU", "boundary IoU"):
        rows = []
        for name in names:
            by_steps = [runs_of(records, world, f"steps-{steps}").get(name, {}) for steps in CURVE_STEPS]
            rows.append([name, *(_spread([score(run, measure) for run in runs.values()]) for runs in by_steps)])
        if any(cell != EMPTY for row in rows for cell in row[1:]):
            yield f"## {world}: {measure} by the number of steps\n"
            yield markdown_table(("method", *(f"{steps} steps" for steps in CURVE_STEPS)), rows)


def _folders(records: Records, world: str) -> list[str]:
    runs = (key for key in records if key.startswith(f"{world}/") and key.count("/") == 3)
    return list(dict.fromkeys(key.split("/")[1] for key in runs))


def _scores(runs: Runs) -> str:
    rows = []
    for method, seeds in runs.items():
        of_all = list(seeds.values())
        moves = [move for run in of_all if (move := move_at_the_end(run)) is not None]
        times = [run["ms_per_step"] for run in of_all if run["ms_per_step"]]
        rows.append(
            [
                method,
                str(len(of_all)),
                *(_spread([score(run, measure) for run in of_all]) for measure in MEASURES),
                f"{mean(run['steps'] for run in of_all):.0f}",
                f"{mean(times):.0f}",
                f"{100 * mean(moves):.2f}" if moves else EMPTY,
                _count_converged(moves),
            ]
        )
    last = f"mIoU moved after {PLATEAU_FROM:.0%}"
    return markdown_table(("method", "seeds", *MEASURES, "steps", "ms/step", last, "converged"), rows)


def converged(records: Records, world: str) -> str:
    """Return how many runs are converged, by folder and method."""
    rows = []
    for folder in _folders(records, world):
        for method, seeds in runs_of(records, world, folder).items():
            moves = [move for run in seeds.values() if (move := move_at_the_end(run)) is not None]
            if moves:
                rows.append([folder, method, f"{100 * mean(moves):.2f}", _count_converged(moves)])
    return markdown_table(("folder", "method", "points of mIoU", "converged"), rows, text_columns=(0, 1))


def _count_converged(moves: list[float]) -> str:
    return f"{sum(move < PLATEAU for move in moves)} of {len(moves)}" if moves else EMPTY


def _spread(values: list[float]) -> str:
    result = statistic(values)
    if result is None:
        return EMPTY
    return f"{100 * result.mean:.1f}" + (f" ±{100 * result.deviation:.1f}" if result.deviation is not None else "")
