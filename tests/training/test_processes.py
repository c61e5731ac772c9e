"""Two processes give the weights and scores of one, write one set of files, and resume as any number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import bpkd_sdk
from tests.training import two_processes
from tests.training.two_processes import LABEL_LOSSES, VAL, Encoded, Interrupted, Network, distilled, interrupted

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with all runs of two processes, and with the runs that they resume."""
    folder = tmp_path_factory.mktemp("runs")
    interrupted(folder / "one_then_two", rank=0)
    command = (
        f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        f"--mixed_precision no --dynamo_backend no --main_process_port 0 {two_processes.__file__} {folder}"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command.split(), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def assert_alike(folder, other):
    ours, theirs = (load_file(path / "last.safetensors") for path in (folder, other))
    for key, value in ours.items():
        assert (value - theirs[key]).double().norm() <= 1e-6 * value.double().norm(), key


def test_the_same_global_batch_gives_the_same_weights(runs, tmp_path):
    one = distilled(tmp_path / "one")
    assert_alike(tmp_path / "one", runs / "two")
    history = [json.loads(line) for line in (runs / "two" / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in history] == [record["step"] for record in one.history]
    for ours, theirs in zip(one.history, history, strict=True):
        assert ours.get("terms", {}) == pytest.approx(theirs.get("terms", {}), rel=1e-5)


def test_losses_on_labels_and_the_freezing_of_the_encoder(runs, tmp_path):
    """Two processes and two micro-batches see the same images together, so Dice and Lovasz are equal too."""
    one = distilled(tmp_path, Encoded(), accumulate=2, **LABEL_LOSSES)
    assert_alike(tmp_path, runs / "label_losses")
    history = [json.loads(line) for line in (runs / "label_losses" / "history.jsonl").read_text().splitlines()]
    assert {"ce", "focal", "dice", "lovasz", "canonical/logit"} < history[0]["terms"].keys()
    for ours, theirs in zip(one.history, history, strict=True):
        assert ours.get("terms", {}) == pytest.approx(theirs.get("terms", {}), rel=1e-5)
        assert ours.get("encoder") == theirs.get("encoder")


@pytest.mark.parametrize("name", ["two", "one_then_two"])
def test_each_image_is_scored_once(runs, name):
    model = bpkd_sdk.load_model(runs / name / "last.safetensors", model=Network(width=8, seed=3))
    last = json.loads((runs / name / "history.jsonl").read_text().splitlines()[-1])
    assert last["metrics"] == bpkd_sdk.evaluate(model, VAL).to_dict()
    assert last["metrics"]["images"] == 5


def test_resumed_in_another_number_of_processes(runs, tmp_path):
    distilled(tmp_path / "one", method="canonical")
    distilled(runs / "two_then_one", method=Interrupted(9), resume=True)
    for name in ("one_then_two", "two_then_one"):
        assert_alike(tmp_path / "one", runs / name)


def test_only_the_main_process_writes_and_all_agree(runs):
    main, other = (json.loads((runs / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert any(path.endswith("history.jsonl") for path in main["written"])
    assert other["written"] == []
    assert main["results"] == other["results"]
    assert main["results"].keys() == {"two", "one_then_two", "trained_norm", "label_losses", "cirkd", "skds", "ifvd"}
    for name in ("skds", "ifvd"):
        assert any("critic" in key and key.endswith("running_mean") for key in main["results"][name]["method"])


def test_statistics_of_trained_batch_norm_are_shared(runs):
    """The averaged statistics are saved and scored, although each process uses other images."""
    saved = load_file(runs / "trained_norm" / "last.safetensors")
    for rank in (0, 1):
        student = json.loads((runs / f"rank{rank}.json").read_text())["results"]["trained_norm"]["student"]
        for name in ("body.1.running_mean", "body.1.running_var"):
            assert saved[name].double().sum().item() == student[name]
    assert saved["body.1.running_mean"].abs().min() > 0
