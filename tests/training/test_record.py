"""Records of a run: run.json, and the values that trackers receive."""

import json
import subprocess

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset, open_dataset
from bpkd_sdk.losses import CWDLoss
from bpkd_sdk.training.records import fingerprint
from tests.networks import tiny

TRAIN, VAL = ShapesDataset("train", length=4, size=(32, 32)), ShapesDataset("val", length=2, size=(32, 32))
OPTIONS = {"batch_size": 2, "crop_size": (32, 32), "device": "cpu", "check_data": False, "log_every": 1, "steps": 2}


def test_run_json(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    for command in ("git init -q", "git -c user.name=n -c user.email=e commit -q --allow-empty -m x"):
        subprocess.run(command.split(), check=True)
    student, method = tiny(9), ["bpkd", CWDLoss(weight=2)]
    bpkd_sdk.distill(tiny(9, seed=1).eval(), student, (TRAIN, VAL), method=method, output_dir="run", seed=3, **OPTIONS)
    run = json.loads((repository / "run" / "run.json").read_text())
    assert (run["seed"], run["config"]["steps"], run["crop_size"]) == (3, 2, [32, 32])
    assert run["method"]["weights"]["cwd/logit"] == 2
    assert run["method"]["parts"][0]["class"] == "BPKDLoss"
    assert run["student"]["parameters"] == sum(weight.numel() for weight in student.parameters())
    assert run["student"]["sha256"] != run["teacher"]["sha256"]
    assert run["student"]["spec"]["class_names"] == list(TRAIN.class_names)
    assert run["data"]["val"] == {
        "name": "shapes/val", "images": 2, "class_names": list(VAL.class_names), "fingerprint": fingerprint(VAL)
    }  # fmt: skip
    (part,) = run["parts"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert part["git"] == {"commit": commit, "modified": False}
    assert part["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (part["first_step"], part["device"], part["processes"], part["precision"]) == (0, "cpu", 1, "fp32")


def test_run_json_of_a_resumed_run_outside_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for resume in (False, True):
        changes = {"accumulate": 2, "workers": 1, "trackers": ("tensorboard",)} if resume else {}
        bpkd_sdk.train(tiny(9), (TRAIN, None), output_dir=tmp_path / "run", resume=resume, **OPTIONS | changes)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [part["first_step"] for part in run["parts"]] == [0, 2]
    options = [[part["options"][name] for name in ("accumulate", "workers", "trackers")] for part in run["parts"]]
    assert options == [[1, None, []], [2, 1, ["tensorboard"]]]
    assert (run["parts"][0]["git"], run["teacher"], run["method"]) == (None, None, {})


def test_fingerprints_tell_data_sets_apart(tmp_path):
    seeds = {fingerprint(ShapesDataset("train", length=3, size=(32, 32), seed=seed)) for seed in (0, 0, 1)}
    assert len(seeds) == 2

    for name in "images", "labels":
        (tmp_path / "a" / name / "train").mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), 1).save(tmp_path / "a" / name / "train" / f"{i}.png")
    (tmp_path / "a" / "classes.json").write_text('["road", "car"]')
    first = fingerprint(open_dataset(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint(open_dataset(tmp_path / "b")) == first
    Image.new("L", (80, 80), 1).save(tmp_path / "b" / "labels" / "train" / "11.png")
    assert fingerprint(open_dataset(tmp_path / "b")) != first


def test_tensorboard(tmp_path):
    result = bpkd_sdk.distill(
        tiny(9, seed=1).eval(), tiny(9), (TRAIN, VAL), trackers=["tensorboard"], output_dir=tmp_path, **OPTIONS
    )
    events = EventAccumulator(str(tmp_path / "bpkd-sdk")).Reload()
    terms = [record["terms"]["edge"] for record in result.history if "terms" in record]
    assert [(event.step, event.value) for event in events.Scalars("terms/edge")] == [
        (step, pytest.approx(term)) for step, term in enumerate(terms, 1)
    ]
    assert events.Scalars("weights/edge")[0].value == 1
    assert events.Scalars("metrics/miou")[-1].value == pytest.approx(result.metrics.miou)
    assert "learning_rate" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        pytest.param("tensorbord", ValueError, "Did you mean 'tensorboard'", id="unknown"),
        pytest.param("wandb", ImportError, "The tracker 'wandb' needs .* pip install wandb", id="not-installed"),
        pytest.param("comet_ml", ImportError, "pip install comet-ml", id="another-name"),
    ],
)
def test_trackers_that_cannot_be_had(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        bpkd_sdk.train(tiny(9), (TRAIN, None), trackers=[name], output_dir=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()
