"""Loss terms of a run: weights and warm-up in the records and the live table, and warnings about terms."""

import warnings

import pytest
import torch
from rich.console import Console

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import BPKDLoss, CWDLoss
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.monitor import STEPS_AT_ZERO, LiveView, LossTermMonitor, ZeroTermWarning
from tests.networks import tiny

TRAIN = ShapesDataset("train", length=8, size=(48, 48))
OPTIONS = {"batch_size": 2, "crop_size": (32, 32), "device": "cpu", "check_data": False, "log_every": 1}


def distilled(folder, **options):
    return bpkd_sdk.distill(
        tiny(9, seed=1).eval(), tiny(9), (TRAIN, None), output_dir=folder, **OPTIONS | options
    ).history


def test_warm_up_of_the_methods_terms(tmp_path):
    """The terms of the first step are those of a run without warm-up, times the share."""
    plain = distilled(tmp_path / "plain", steps=1)
    ramped = distilled(tmp_path / "ramped", steps=5, method_warmup=4)
    assert [record["weights"]["edge"] for record in ramped] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(record["weights"]["ce"] == 1 for record in ramped)
    for name in ("edge", "body"):
        assert ramped[0]["terms"][name] == pytest.approx(plain[0]["terms"][name] / 4)
    assert ramped[0]["terms"]["ce"] == plain[0]["terms"]["ce"]
    assert ramped[0]["loss"] == pytest.approx(sum(ramped[0]["terms"].values()))


def test_warm_up_of_composed_methods(tmp_path):
    history = distilled(tmp_path, steps=2, method=["bpkd", CWDLoss(weight=3)], method_warmup=2)
    assert history[0]["weights"] == {"ce": 1.0, "bpkd/edge": 0.5, "bpkd/body": 1.0, "cwd/logit": 1.5}
    assert history[0]["terms"].keys() == history[0]["weights"].keys()


def test_warm_up_of_the_learning_rate(tmp_path):
    rates = [record["learning_rate"] for record in distilled(tmp_path, steps=4, learning_rate_warmup=2)]
    assert rates == pytest.approx([0.01 * share * (1 - i / 4) ** 0.9 for i, share in enumerate((0.5, 1, 1, 1))])
    with pytest.raises(ValueError, match="`learning_rate_warmup` to be at least 0, but got -1"):
        TrainingConfig(learning_rate_warmup=-1)


def test_the_live_table_shows_terms_and_weights():
    view = LiveView("distill", 10, 0)
    record = {"step": 1, "terms": {"ce": 1.25, "bpkd/edge": 0.5}, "weights": {"ce": 1.0, "bpkd/edge": 2.5}}
    view.log(record | {"learning_rate": 0.01, "images_per_second": 3.0})
    console = Console(width=100)
    with console.capture() as capture:
        console.print(view._render())
    for text in ("bpkd/edge", "0.5000", "weight", "2.5", "learning rate 1.00e-02"):
        assert text in capture.get()


class OneClass(ShapesDataset):
    """Scenes whose labels contain no edge."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, torch.ones_like(label)


def test_a_term_that_stays_0_is_reported_once(tmp_path):
    options = {"method": BPKDLoss(9), "crop_size": (8, 8), "log_every": 10, "steps": STEPS_AT_ZERO, "batch_size": 1}
    data = OneClass("train", length=4, size=(32, 32))
    with pytest.warns(ZeroTermWarning) as caught:
        bpkd_sdk.distill(tiny(9, seed=1).eval(), tiny(9), (data, None), output_dir=tmp_path, **OPTIONS | options)
    silent = [str(warning.message) for warning in caught if warning.category is ZeroTermWarning]
    assert len(silent) == 1
    assert f"'edge' has been exactly 0 for {STEPS_AT_ZERO} steps" in silent[0]
    assert "whether the crops contain edges at the logits' size" in silent[0]


def test_what_to_check_names_the_feature_maps():
    watch = LossTermMonitor(("neck", "head:input"))
    silence = {"step": STEPS_AT_ZERO, "terms": {"ce": 1.0, "feature": 0.0}}
    with pytest.warns(ZeroTermWarning, match="'neck' of the student and 'head:input' of the teacher"):
        watch.observe(silence, first_step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.observe(silence | {"step": 2 * STEPS_AT_ZERO}, first_step=STEPS_AT_ZERO)


def test_a_term_that_speaks_now_and_then_is_not_reported():
    watch = LossTermMonitor((None, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(10, 5 * STEPS_AT_ZERO, 10):
            watch.observe({"step": step, "terms": {"ce": 1.0, "edge": float(step % 40 == 0)}}, first_step=step - 10)
