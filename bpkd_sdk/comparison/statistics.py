"""Statistics of a comparison: means over seeds, gains over the baseline, t-test over seeds, bootstrap over images."""

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

from bpkd_sdk.comparison.run import SCORES, Run
from bpkd_sdk.comparison.setup import BASELINE

SIGNIFICANCE = 0.05  # level of the two-sided paired t-test
BOOTSTRAP_DRAWS = 10_000
CONFIDENCE = 0.95  # level of the bootstrap intervals

SeedValues = dict[int, float]  # one value per seed


@dataclass(frozen=True)
class Statistic:
    """Mean over seeds.

    Attributes:
        mean: Mean of the values.
        deviation: Sample standard deviation; None for a single value.
    """

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Row:
    """One method in the table.

    Attributes:
        method: Name of the method.
        seeds: Number of successful runs.
        failed: Number of runs whose loss was not finite; they are left out of all other values.
        steps: Number of steps of each run.
        scores: Statistics by name in `SCORES`; fractions in 0..1.
        gains: Difference of each score to the student trained alone, seed by seed.
        best: Scores in which the method is significantly better than every other one, see `is_significant`.
        seconds: Seconds of training.
        ms_per_step: Milliseconds per step.
        peak_memory: Peak memory in bytes.
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
    """Return one row per method, in the order of the runs."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    values = {name: {method: _seed_values(runs, name) for method, runs in by_method.items()} for name in SCORES}
    return [
        Row(
            method=method,
            seeds=sum(run.error is None for run in runs),
            failed=sum(run.error is not None for run in runs),
            steps=runs[0].steps,
            scores=_without_none({name: statistic(values[name][method].values()) for name in SCORES}),
            gains=_without_none(
                {
                    name: statistic(paired_differences(values[name][method], values[name].get(BASELINE, {})).values())
                    for name in SCORES
                    if method != BASELINE
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
    """Return mean and sample standard deviation of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return Statistic(fmean(known), stdev(known) if len(known) > 1 else None) if known else None


def paired_differences(values: Mapping[int, float], others: Mapping[int, float]) -> SeedValues:
    """Return the differences of runs of the same seed, which share initial weights and training images."""
    return {seed: value - others[seed] for seed, value in values.items() if seed in others}


def is_significant(differences: Mapping[int, float]) -> bool:
    """Return whether the mean difference is above 0 by a two-sided paired t-test; always False with one seed."""
    from scipy.stats import t

    lead = statistic(differences.values())
    if lead is None or lead.deviation is None:
        return False
    count = len(differences)
    return bool(lead.mean > t.ppf(1 - SIGNIFICANCE / 2, count - 1) * lead.deviation / sqrt(count))


def _is_best(method: str, values: Mapping[str, SeedValues]) -> bool:
    others = [other for other in values if other != method and values[other]]
    return bool(others) and all(is_significant(paired_differences(values[method], values[name])) for name in others)


def _seed_values(runs: list[Run], score: str) -> SeedValues:
    return {run.seed: run.metrics[score] for run in runs if run.error is None and run.metrics[score] is not None}


def _without_none(statistics: Mapping[str, Statistic | None]) -> dict[str, Statistic]:
    return {name: value for name, value in statistics.items() if value is not None}


@dataclass(frozen=True)
class Interval:
    """Difference of two scores, as fractions in -1..1.

    Attributes:
        difference: Difference on all images.
        low: Lower end of the 95 % confidence interval.
        high: Upper end of the 95 % confidence interval.
    """

    difference: float
    low: float
    high: float


def paired_bootstrap(
    runs: Mapping[str, Sequence[Path]], pairs: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, Interval]]:
    """Compute differences in score between methods, with confidence intervals by a paired bootstrap over images.

    Images are drawn with replacement, the same ones for all methods and seeds. Their counts are summed, and scores are
    computed from the sums as `bpkd_sdk.evaluate` computes them. The interval covers image sampling only; the table
    shows the variance over seeds.

    Args:
        runs: Files that `write_image_counts` wrote, by method, one per seed, for the same images.
        pairs: Pairs of methods; the score of the second is subtracted from the score of the first.

    Returns:
        Intervals of the mean over seeds, by pair and by score: "miou", "boundary_iou", "edge_accuracy" and
        "body_accuracy".

    Raises:
        ValueError: If the runs were scored on different numbers of images.
    """
    counts = {method: [load_file(path) for path in paths] for method, paths in runs.items()}
    image_numbers = {len(seed["region"]) for seeds in counts.values() for seed in seeds}
    if len(image_numbers) != 1:
        raise ValueError(
            f"Expected all runs to be scored on the same images, but got runs on {sorted(image_numbers)} of them."
        )
    (number,) = image_numbers
    draws = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=BOOTSTRAP_DRAWS)
    image_weights = torch.from_numpy(np.concatenate([np.ones((1, number)), draws]))  # the first row: all images, once
    scores = {method: _mean_scores(seeds, image_weights) for method, seeds in counts.items()}
    return {
        (first, second): {name: _interval(scores[first][name] - scores[second][name]) for name in scores[first]}
        for first, second in pairs
    }


def _mean_scores(seeds: Sequence[dict[str, Tensor]], image_weights: Tensor) -> dict[str, Tensor]:
    """Return each score for each draw, (draws,), as the mean over seeds."""
    seed_scores = [
        _scores({name: torch.tensordot(image_weights, count.double(), 1) for name, count in seed.items()})
        for seed in seeds
    ]
    return {name: torch.stack([scores[name] for scores in seed_scores]).mean(0) for name in seed_scores[0]}


def _scores(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute scores (draws,) from summed counts (draws, ...)."""
    edge, body = (sums["band"][:, row, 0] / sums["band"][:, row, 1] for row in (0, 1))
    return {
        "miou": _mean_iou(sums["region"]),
        "boundary_iou": _mean_iou(sums["boundary"]),
        "edge_accuracy": edge,
        "body_accuracy": body,
    }


def _mean_iou(areas: Tensor) -> Tensor:
    """Compute the mean IoU (draws,) of the classes that occur, from areas (draws, 3, C): both, label, prediction."""
    both, label, prediction = areas.unbind(1)
    return (both / (label + prediction - both)).nanmean(1)


def _interval(differences: Tensor) -> Interval:
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=differences.dtype)
    low, high = differences[1:].quantile(tails).tolist()
    return Interval(differences[0].item(), low, high)
