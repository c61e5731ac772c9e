"""How sure a difference between two methods is: paired bootstrap over the validation images.

Images are drawn with replacement, the same for all methods and seeds; their counts are added up, and scores made of the
sums as `bpkd_sdk.evaluate` makes them. What varies is which images were looked at; how much seeds vary, the table says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

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
