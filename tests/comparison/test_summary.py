"""The statistics of the table, compared with numpy in float64."""

import math

import numpy as np
import pytest

from bpkd_sdk.comparison.run import SCORES, Run
from bpkd_sdk.comparison.statistics import is_significant, summarize


def run(method, seed, miou, *, error=None, memory=1000, ms=10.0):
    return Run(
        method=method, seed=seed, steps=5, seconds=2.0 + seed, ms_per_step=ms, peak_memory=memory,
        metrics={} if error else {name: miou + i / 100 for i, name in enumerate(SCORES)},
        error=error, curve=[], first_terms={}, last_terms={}, first_weights="", settings={}, versions={},
    )  # fmt: skip


def rows(**scores):
    runs = [run(method, seed, miou) for method, values in scores.items() for seed, miou in enumerate(values)]
    return {row.method: row for row in summarize(runs)}


def test_means_deviations_and_gains():
    alone, bpkd = [0.41, 0.44, 0.40], [0.46, 0.45, 0.47]
    table = rows(alone=alone, bpkd=bpkd)
    for number, name in enumerate(SCORES):
        score, gain = table["bpkd"].scores[name], table["bpkd"].gains[name]
        assert score.mean == pytest.approx(np.mean(bpkd) + number / 100, abs=1e-15)
        assert score.deviation == pytest.approx(np.std(bpkd, ddof=1), abs=1e-15)
        assert gain.mean == pytest.approx(np.mean(np.subtract(bpkd, alone)), abs=1e-15)
        assert gain.deviation == pytest.approx(np.std(np.subtract(bpkd, alone), ddof=1), abs=1e-15)
    assert table["alone"].gains == {}
    assert table["bpkd"].seconds.mean == pytest.approx(3)
    assert table["bpkd"].seconds.deviation == pytest.approx(1)
    assert (table["bpkd"].ms_per_step.mean, table["bpkd"].peak_memory.mean) == (10, 1000)


def test_one_seed_has_no_deviation_and_no_best():
    table = rows(alone=[0.4], bpkd=[0.9])
    assert table["bpkd"].scores["miou"].deviation is None
    assert table["bpkd"].gains["miou"].mean == pytest.approx(0.5)
    assert table["bpkd"].best == ()


def test_gains_are_of_the_seeds_that_both_have():
    table = rows(alone=[0.4, 0.5], bpkd=[0.5, 0.7, 0.9])
    assert table["bpkd"].gains["miou"].mean == pytest.approx(0.15)
    assert table["bpkd"].scores["miou"].mean == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("leader", "others", "best"),
    [
        pytest.param([0.50, 0.51, 0.52], {"alone": [0.40, 0.42, 0.41], "b": [0.45, 0.46, 0.47]}, True, id="clear"),
        pytest.param([0.50, 0.40, 0.60], {"alone": [0.40, 0.42, 0.41], "b": [0.45, 0.46, 0.47]}, False, id="noisy"),
        pytest.param([0.50, 0.51, 0.52], {"alone": [0.1, 0.1, 0.1], "b": [0.49, 0.52, 0.51]}, False, id="one-is-close"),
        pytest.param([0.50, 0.51, 0.52], {"alone": [0.50, 0.51, 0.52]}, False, id="equal"),
    ],
)
def test_best_is_beyond_noise_against_every_other(leader, others, best):
    table = rows(**others, leader=leader)
    assert ("miou" in table["leader"].best) is best
    assert all(row.best == () for name, row in table.items() if name != "leader")


def test_the_test_is_students_paired_t_test():
    """The density of Student's t with 2 degrees of freedom, integrated in float64, has 95 % below this quantile."""
    quantile, freedom = 4.302653, 2
    t = np.linspace(0, quantile, 200_001)
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    assert 2 * np.trapezoid(scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2), t) == pytest.approx(0.95, abs=1e-6)
    differences = np.array([-1.0, 0, 1])
    for factor, expected in ((1.0001, True), (0.9999, False)):
        assert is_significant(dict(enumerate(differences + factor * quantile / math.sqrt(3)))) is expected


def test_failed_runs_are_counted_and_left_out():
    runs = [
        run("alone", 0, 0.4),
        run("alone", 1, 0.5),
        run("a", 0, 0.6),
        run("a", 1, 0, error="nan"),
        run("b", 0, 0, error="nan"),
    ]
    table = {row.method: row for row in summarize(runs)}
    assert (table["a"].seeds, table["a"].failed) == (1, 1)
    assert table["a"].scores["miou"].mean == 0.6
    assert (table["b"].seeds, table["b"].failed, table["b"].scores, table["b"].seconds) == (0, 1, {}, None)
