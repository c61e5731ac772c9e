"""From runs to rows: means, sample standard deviations, differences to the student alone, and what is beyond noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bpkd_sdk.comparison.run import ALONE, SCORES, Run

# Student's t, two-sided 5 %, for 1 to 10 degrees of freedom; for more the last is on the safe side.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Values = dict[int, float]  # by seed


@dataclass(frozen=True)
class Statistic:
    """A mean over seeds.

    Attributes:
        mean: Of the values.
        deviation: Sample standard deviation; None with one value.
    """

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Row:
    """One method in the table.

    Attributes:
        method: Its name.
        seeds: Number of runs that the scores are over.
        failed: Number of runs whose loss stopped being finite, left out of everything else.
        steps: Of each run.
        scores: By name in `SCORES`; fractions in 0..1.
        gains: Difference of each score to the student alone, seed by seed.
        best: Scores in which the method is better than every other by more than noise, see `beyond_noise`.
        seconds: Of training.
        ms_per_step: Milliseconds.
        peak_memory: Bytes.
    """

    method: str
    seeds: int
    failed: int
    steps: int
    scores: dict[str, Statistic]
    gains: dict[str, Statistic]
    best: tuple[str, ...]
    seconds: Statistic | None
    ms_per_step: Statistic | None
    peak_memory: Statistic | None


def summarize(runs: Iterable[Run]) -> list[Row]:
    """One row for each method, in the order in which they come."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    values = {name: {method: _values(runs, name) for method, runs in by_method.items()} for name in SCORES}
    return [
        Row(
            method=method,
            seeds=sum(run.error is None for run in runs),
            failed=sum(run.error is not None for run in runs),
            steps=runs[0].steps,
            scores=_present({name: statistic(values[name][method].values()) for name in SCORES}),
            gains=_present(
                {
                    name: statistic(differences(values[name][method], values[name].get(ALONE, {})).values())
                    for name in SCORES
                    if method != ALONE
                }
            ),
            best=tuple(name for name in SCORES if _is_best(method, values[name])),
            seconds=statistic(run.seconds for run in runs if run.error is None),
            ms_per_step=statistic(run.ms_per_step for run in runs if run.error is None),
            peak_memory=statistic(run.peak_memory for run in runs if run.error is None),
        )
        for method, runs in by_method.items()
    ]


def statistic(values: Iterable[float | None]) -> Statistic | None:
    """Mean and sample standard deviation of the values that are there; None if none is."""
    known = [value for value in values if value is not None]
    return Statistic(fmean(known), stdev(known) if len(known) > 1 else None) if known else None


def differences(values: Mapping[int, float], others: Mapping[int, float]) -> Values:
    """Seed by seed, which start from the same weights and see the same images."""
    return {seed: value - others[seed] for seed, value in values.items() if seed in others}


def beyond_noise(differences: Mapping[int, float]) -> bool:
    """Whether the mean is above 0 by a paired t-test at 5 %, two-sided; never with a single seed."""
    lead = statistic(differences.values())
    if lead is None or lead.deviation is None:
        return False
    count = len(differences)
    return lead.mean > T_95[min(count - 1, len(T_95)) - 1] * lead.deviation / sqrt(count)


def _is_best(method: str, values: Mapping[str, Values]) -> bool:
    others = [other for other in values if other != method and values[other]]
    return bool(others) and all(beyond_noise(differences(values[method], values[other])) for other in others)


def _values(runs: list[Run], score: str) -> Values:
    return {run.seed: run.metrics[score] for run in runs if run.error is None and run.metrics[score] is not None}


def _present(statistics: Mapping[str, Statistic | None]) -> dict[str, Statistic]:
    return {name: value for name, value in statistics.items() if value is not None}


DRAWS = 10_000
LEVEL = 0.95

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Interval:
    """A difference of two scores, fractions in -1..1.

    Attributes:
        difference: On all images.
        low: The lower end of its 95 % interval.
        high: The upper end.
    """

    difference: float
    low: float
    high: float


def paired_bootstrap(
    runs: Mapping[str, Sequence[Path]], pairs: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, Interval]]:
    """Differences in mIoU, boundary IoU, and accuracy in edges and bodies, with their intervals.

    Args:
        runs: The files that `write_image_counts` wrote, by method, one for each seed; of the same images.
        pairs: Which methods to hold against each other; the first is subtracted from.

    Returns:
        By pair and score: "miou", "boundary_iou", "edge_accuracy", "body_accuracy"; of the means over the seeds.

    Raises:
        ValueError: If runs were scored on different numbers of images.
    """
    counts = {method: [load_file(path) for path in paths] for method, paths in runs.items()}
    images = {len(seed["region"]) for seeds in counts.values() for seed in seeds}
    if len(images) != 1:
        raise ValueError(
            f"Expected all runs to be scored on the same images, but got runs on {sorted(images)} of them."
        )
    (number,) = images
    draws = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=DRAWS)
    drawn = torch.from_numpy(np.concatenate([np.ones((1, number)), draws]))  # first all images, once
    scores = {method: _mean_scores(seeds, drawn) for method, seeds in counts.items()}
    return {
        (one, other): {name: _interval(scores[one][name] - scores[other][name]) for name in scores[one]}
        for one, other in pairs
    }


def _mean_scores(seeds: Sequence[dict[str, Tensor]], drawn: Tensor) -> Scores:
    each = [
        _scores({name: torch.tensordot(drawn, count.double(), 1) for name, count in seed.items()}) for seed in seeds
    ]
    return {name: torch.stack([scores[name] for scores in each]).mean(0) for name in each[0]}


def _scores(sums: Mapping[str, Tensor]) -> Scores:
    """(draws, ...) counts -> (draws,) scores."""
    edge, body = (sums["band"][:, row, 0] / sums["band"][:, row, 1] for row in (0, 1))
    return {
        "miou": _mean_iou(sums["region"]),
        "boundary_iou": _mean_iou(sums["boundary"]),
        "edge_accuracy": edge,
        "body_accuracy": body,
    }


def _mean_iou(areas: Tensor) -> Tensor:
    """(draws, 3, C): both, label, prediction -> (draws,), of the classes that are there."""
    both, label, prediction = areas.unbind(1)
    return (both / (label + prediction - both)).nanmean(1)


def _interval(differences: Tensor) -> Interval:
    tail = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=differences.dtype)
    low, high = differences[1:].quantile(tail).tolist()
    return Interval(differences[0].item(), low, high)
