"""Scores and statistics of the study: accuracy by the width of the edge band, contrasts over seeds, Holm."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from scipy import stats
from torch import nn

from bpkd_sdk.boundary import edge_band
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.files import read_json, write_json
from bpkd_sdk.runtime import TorchRuntime

LEVEL = 0.05
WORST_MIOU = -0.003  # a method that loses more mIoU than this does not help


def measure_edge_widths(
    folder: Path, network: nn.Module, data: SegmentationDataset, widths: Sequence[int]
) -> dict[str, list[float]]:
    """Return the pixel accuracy inside and outside the edge band by its width; the folder keeps the result."""
    path = folder / "edge_widths.json"
    if path.is_file():
        return read_json(path)
    runtime = TorchRuntime(network)
    counts = {width: torch.zeros(2, 2, dtype=torch.int64) for width in widths}
    for image, label in data:
        correct, known = runtime.segment(image[None])[0].cpu() == label, label != data.ignore_index
        for width in widths:
            edge = edge_band(label[None], width, data.ignore_index)[0]
            for row, region in enumerate((edge & known, ~edge & known)):
                counts[width][row] += torch.stack([correct[region].sum(), region.sum()])
    accuracies = {str(width): (count[:, 0] / count[:, 1]).tolist() for width, count in counts.items()}
    write_json(path, accuracies)
    return accuracies


@dataclass(frozen=True)
class Effect:
    """A difference with its 95 % interval.

    Attributes:
        difference: Estimate, as a fraction.
        low: Lower end of the interval.
        high: Upper end of the interval.
        p: Two-sided p value.
        seeds: Number of seeds.
    """

    difference: float
    low: float
    high: float
    p: float
    seeds: int


def effects(
    values: Mapping[str, Mapping[int, float]], contrasts: Mapping[str, Mapping[str, float]]
) -> dict[str, Effect]:
    """Estimate contrasts between methods that were run with the same seeds.

    The seeds are blocks: y = method + seed + error. All runs estimate the variance of the error, with (methods - 1)
    (seeds - 1) degrees of freedom. With two methods this is the paired t-test. Seeds that lack a method are left out.

    Args:
        values: A score by method and seed.
        contrasts: Coefficients by method, by the name of the contrast; those that are left out are 0.

    Returns:
        Effects by name; none with fewer than two methods or seeds.
    """
    names = list(values)
    seeds = sorted(set.intersection(*(set(runs) for runs in values.values()))) if names else []
    if len(names) < 2 or len(seeds) < 2:
        return {}
    table = np.array([[values[name][seed] for seed in seeds] for name in names])
    errors = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    degrees = (len(names) - 1) * (len(seeds) - 1)
    variance = (errors**2).sum() / degrees
    found = {}
    for contrast, coefficients in contrasts.items():
        factors = np.array([coefficients.get(name, 0.0) for name in names])
        difference, error = factors @ table.mean(1), np.sqrt(variance * (factors**2).sum() / len(seeds))
        margin = stats.t.ppf(1 - LEVEL / 2, degrees) * error
        p = 2 * stats.t.sf(abs(difference) / error, degrees) if error else float(difference == 0)
        found[contrast] = Effect(*map(float, (difference, difference - margin, difference + margin, p)), len(seeds))
    return found


def adjust_by_holm(p: Mapping[str, float], tests: int) -> dict[str, float]:
    """Return p values adjusted by Holm's method.

    Args:
        p: p values of the tests that are known so far.
        tests: Number of tests of the whole family.
    """
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (tests - rank) * p[name]))
        adjusted[name] = largest
    return adjusted


def verdict(effect: Effect, adjusted_p: float, miou: Effect) -> str:
    """Return "helps", "hurts" or "open", by the rule of docs/study-plan.md."""
    if adjusted_p < LEVEL and effect.low > 0 and miou.difference >= WORST_MIOU:
        return "helps"
    return "hurts" if adjusted_p < LEVEL and effect.high < 0 else "open"


def mean(values: Iterable[float]) -> float:
    """Return the mean; 0 without values."""
    found = list(values)
    return fmean(found) if found else 0.0
