"""The study's statistics find effects that are there, and its tables answer its questions from records."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.study.methods import EDGE_FORMS, WEIGHTS, create, edge_forms, method_name
from benchmarks.study.networks import DenseNet
from benchmarks.study.scores import Effect, adjust_by_holm, effects, verdict
from benchmarks.study.setup import Study
from benchmarks.study.tables import tables
from benchmarks.study.training import MAIN_STEPS, Job, factorial_cells, try_run
from bpkd_sdk.losses.method import method_arguments

BEST = {
    "kd": {"kd": 3.0},
    "cwd": {"cwd": 1.0},
    "dist": {"dist": 1.0},
    "bpkd": {"body": 3.0, "edge": 0.3},
    "kd+cwd": {"kd": 3.0, "cwd": 0.3},
}


def test_two_methods_give_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 5), rng.normal(1, 1, 5)
    effect = effects({"a": dict(enumerate(a)), "b": dict(enumerate(b))}, {"a - b": {"a": 1, "b": -1}})["a - b"]
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert effect.p == pytest.approx(expected.pvalue)
    assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high))
    assert effect.seeds == 5


def test_a_main_effect_uses_all_runs_and_ignores_the_level_of_seeds():
    rng = np.random.default_rng(0)
    cells = list(product((0, 1), repeat=3))
    values = {
        str(cell): {seed: 5 * seed + 0.02 * cell[2] + 0.1 * cell[0] + rng.normal(0, 0.002) for seed in range(4)}
        for cell in cells
    }
    contrast = {str(cell): (2 * cell[2] - 1) / 4 for cell in cells}
    effect = effects(values, {"edge": contrast})["edge"]
    assert effect.low < 0.02 < effect.high
    assert effect.high - effect.low < 0.004
    assert effect.p < 1e-6


def test_a_seed_that_lacks_a_method_is_left_out():
    values = {"a": {0: 1.0, 1: 2.0, 2: 9.0}, "b": {0: 0.5, 1: 1.4}}
    assert effects(values, {"a - b": {"a": 1, "b": -1}})["a - b"].seeds == 2
    assert effects({"a": {0: 1.0}, "b": {0: 2.0}}, {"a - b": {"a": 1, "b": -1}}) == {}


def test_holm():
    assert adjust_by_holm({"a": 0.01, "b": 0.04, "c": 0.03}, 3) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


@pytest.mark.parametrize(
    ("interval", "adjusted", "miou", "answer"),
    [
        ((0.01, 0.03), 0.01, 0.0, "helps"),
        ((0.01, 0.03), 0.01, -0.004, "open"),
        ((0.01, 0.03), 0.06, 0.0, "open"),
        ((-0.03, -0.01), 0.01, 0.0, "hurts"),
        ((-0.01, 0.03), 0.5, 0.0, "open"),
    ],
)
def test_verdict(interval, adjusted, miou, answer):
    effect = Effect(sum(interval) / 2, *interval, p=0.01, seeds=4)
    assert verdict(effect, adjusted, Effect(miou, -1, 1, 0.5, 4)) == answer


def test_methods_have_the_weights_of_their_names():
    cells = factorial_cells(BEST)
    assert [method_name(cell) for cell in cells] == [
        *("", "edge 0.3", "body 3", "body 3 edge 0.3"),
        *("kd 3", "kd 3 edge 0.3", "kd 3 body 3", "kd 3 body 3 edge 0.3"),
    ]
    assert create(cells[3]).weights == {"edge": 0.3, "body": 3}
    assert create(cells[7]).weights == {
        "canonical/logit": 3,
        "canonical/feature": 0,
        "bpkd/edge": 0.3,
        "bpkd/body": 3,
    }
    forms = edge_forms({"body": 3.0, "edge": 1.0}, {"mean": 2.0, "pooled": 0.5, "no pre-mask": 1.0})
    assert {name: loss.weights["edge"] for name, loss in forms.items()} == {
        "body 3 edge 1": 1.0,
        "pooled as loud as 1": 4.0,
        "no pre-mask as loud as 1": 2.0,
        "mean as loud as 0.3": 0.3,
        "pooled as loud as 0.3": 1.2,
        "no pre-mask as loud as 0.3": 0.6,
    }
    assert set(EDGE_FORMS) == {"mean", "pooled", "no pre-mask"}
    assert WEIGHTS == (0.3, 1, 3, 10)


def test_the_student_starts_at_the_entropy_of_its_classes():
    torch.manual_seed(0)
    logits = DenseNet(11)(torch.randn(2, 3, 64, 96))
    assert logits.shape == (2, 11, 16, 24)
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(2, 16, 24, dtype=torch.long))
    assert loss.item() == pytest.approx(np.log(11), abs=0.01)


def test_tables_answer_the_primary_questions():
    rng = np.random.default_rng(0)
    names = ["alone", *(method_name(cell) for cell in factorial_cells(BEST) if cell), "cwd 1", "dist 1"]
    records = {"shapes/tune": BEST, "shapes/rate": {"learning_rate": 0.002}}
    for name, seed in product(names, range(8)):
        level = 0.5 + 0.03 * ("edge" in name) + 0.01 * seed + rng.normal(0, 0.001)
        scores = dict.fromkeys(("miou", "edge_accuracy", "boundary_iou", "body_accuracy"), level)
        records[f"shapes/steps-{MAIN_STEPS}/{name}/seed{seed}"] = {
            "method": name,
            "seed": seed,
            "error": None,
            "metrics": scores,
            "edge_widths": {"3": [level, 0.9]},
            "curve": [{"miou": level - (0.001 if seed else 0.005)}, {"miou": level}],
            "steps": MAIN_STEPS,
            "ms_per_step": 100.0,
        }
    lines = tables(records).splitlines()
    answers = [line for line in lines if line.startswith("| shapes | ")]
    assert len(answers) == 12
    assert all(line.endswith("| 8 | helps |") for line in answers)
    assert sum("BPKD against CWD" in line for line in answers) == 3
    assert any(line.startswith("| cwd 1 | 8 | ") and line.endswith("| 7 of 8 |") for line in lines)
    assert any(line.startswith("| body x edge | ") for line in lines)


def test_a_trial_for_the_estimate_leaves_the_method_as_it_was(tmp_path, monkeypatch):
    study = Study("shapes", None, None, tmp_path, tmp_path, fraction=0.001)
    study.save({"teacher": {}, "rate": {"learning_rate": 0.001}})
    monkeypatch.setattr(study, "load_teacher", lambda: DenseNet(9).eval())
    method = create({"skds": 1.0})
    before = method_arguments(method)
    job = Job("steps", {"skds 1": method}, seeds=1, steps=2, cached=False)
    history = try_run(study, job, method, steps=1, log_every=1)
    assert set(history[0]["terms"]) == {"ce", "pixel", "pair", "adversarial"}
    assert method_arguments(method) == before
    assert not list(method.parameters())
