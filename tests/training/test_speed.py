"""Options that save time or memory change neither the learned weights nor the saved files."""

import functools

import pytest
import torch

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import CanonicalKDLoss
from tests.networks import tiny

TRAIN = ShapesDataset("train", length=8, size=(48, 48))
OPTIONS = {"batch_size": 4, "crop_size": (32, 32), "device": "cpu", "check_data": False, "log_every": 1, "steps": 3}


def distilled(folder, method="canonical", **options):
    torch.manual_seed(0)
    student = tiny(9)
    student[1] = torch.nn.Identity()  # batch norm would depend on how the batch is split
    teacher = tiny(9, width=12, seed=1).eval()
    return bpkd_sdk.distill(teacher, student, (TRAIN, None), method=method, output_dir=folder, **OPTIONS | options)


def assert_alike(run, other, tolerance):
    ours, theirs = run.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert (value - theirs[key]).norm() <= tolerance * value.norm(), key


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param({"accumulate": 2}, 1e-6, id="accumulate-2"),
        pytest.param({"accumulate": 4, "gradient_clip": 1.0}, 1e-6, id="accumulate-4-clipped"),
        pytest.param({"channels_last": True}, 1e-6, id="channels-last"),
        pytest.param({"compile": True}, 1e-6, id="compile"),
        pytest.param({"teacher_precision": "bf16"}, 1e-3, id="teacher-bf16"),
    ],
)
def test_same_weights(tmp_path, monkeypatch, options, tolerance):
    # This backend traces, and runs hooks and autograd, without the C++ code whose compilation takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    clip = {key: value for key, value in options.items() if key == "gradient_clip"}
    plain, other = distilled(tmp_path / "plain", **clip), distilled(tmp_path / "other", **options)
    assert_alike(plain, other, tolerance)
    for ours, theirs in zip(plain.history, other.history, strict=True):
        assert ours["terms"] == pytest.approx(theirs["terms"], rel=1e-5 if tolerance < 1e-5 else 2e-2)
    if "teacher_precision" in options:
        assert plain.history[0]["terms"] != other.history[0]["terms"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_all_of_them_on_a_gpu(tmp_path):
    options = {"channels_last": True, "compile": True, "accumulate": 2, "teacher_precision": "fp16"}
    run = distilled(tmp_path, device="cuda", precision="bf16", workers=2, **options)
    plain = distilled(tmp_path / "plain", device="cuda", precision="fp32")
    for record, expected in zip(run.history, plain.history, strict=True):
        assert record["terms"] == pytest.approx(expected["terms"], rel=0.05)


class Crash(CanonicalKDLoss):
    _calls = 0

    def forward(self, *inputs):
        self._calls += 1
        if self._calls == 3:
            raise MemoryError
        return super().forward(*inputs)


def test_a_compiled_run_is_resumed_uncompiled(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    options = {"checkpoint_every": 2, "steps": 4}
    whole = distilled(tmp_path / "whole", **options)
    with pytest.raises(MemoryError):
        distilled(tmp_path / "parts", Crash(9), compile=True, **options)
    assert_alike(whole, distilled(tmp_path / "parts", Crash(9), resume=True, **options), 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"accumulate": 3}, r"`batch_size`.*multiple of 3 \(1 processes, accumulate=3\), but got 4", id="parts"
        ),
        pytest.param({"batch_size": 12}, "shapes/train has 8 images, too few for a batch of 12", id="images"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        distilled(tmp_path, **options)
    assert not any(tmp_path.iterdir())
