"""`bpkd_sdk.compare`: equal terms, exact resumption, and refused arguments."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import BPKDLoss
from tests.networks import tiny

ROOT = Path(__file__).parents[2]
TRAIN, VAL = ShapesDataset("train", length=10, size=(48, 48)), ShapesDataset("val", length=3, size=(48, 40))
OPTIONS = {"batch_size": 2, "crop_size": (32, 32), "device": "cpu", "log_every": 2, "evaluate_every": 4}
METHODS = {"bpkd": "bpkd", "no edges": BPKDLoss(edge_weight=0)}


def teacher():
    return tiny(9, width=12, seed=1).eval()


def student(num_classes):
    return tiny(num_classes, seed=torch.initial_seed(), dropout=0.2)


def compare(folder, **changes):
    arguments = {"methods": METHODS, "steps": 4, "seeds": 2, "output_dir": folder} | OPTIONS | changes
    return bpkd_sdk.compare(
        arguments.pop("teacher", teacher()),
        arguments.pop("student", student),
        arguments.pop("data", (TRAIN, VAL)),
        **arguments,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return compare(tmp_path_factory.mktemp("comparison"))


def scores(comparison):
    return {(run.method, run.seed): run.metrics for run in comparison.runs}


def test_each_method_and_seed_is_a_run_of_its_own(whole):
    assert [(run.seed, run.method) for run in whole.runs] == [
        (seed, name) for seed in (0, 1) for name in ("alone", "bpkd", "no edges")
    ]
    for run in whole.runs:
        folder = whole.output_dir / run.method / f"seed{run.seed}"
        assert json.loads((folder / "result.json").read_text()) == vars(run)
        trained = bpkd_sdk.load_model(folder / "last.safetensors", model=tiny(9))
        assert bpkd_sdk.evaluate(trained, VAL).to_dict() == run.metrics
        assert (run.steps, run.curve[-1]["step"]) == (4, 4)
        assert run.curve[-1]["seconds"] == pytest.approx(run.seconds)
        assert run.curve[-1]["miou"] == run.metrics["miou"]
        assert run.settings["options"]["crop_size"] == [32, 32]
    assert len({run.metrics["miou"] for run in whole.runs}) == 6
    terms = {run.method: list(run.first_terms) for run in whole.runs}
    assert terms == {"alone": ["ce"], "bpkd": ["ce", "edge", "body"], "no edges": ["ce", "body"]}
    assert whole.runs[2].settings["method"]["weights"] == {"edge": 0, "body": 2}


def test_table_and_picture(whole):
    table = json.loads((whole.output_dir / "table.json").read_text())
    means = {row["method"]: row["scores"]["miou"]["mean"] for row in table["rows"]}
    for method, mean in means.items():
        values = [run.metrics["miou"] for run in whole.runs if run.method == method]
        assert mean == pytest.approx(math.fsum(values) / 2, abs=1e-15)
    page = (whole.output_dir / "table.md").read_text()
    assert f"| {100 * means['no edges']:.1f} ±" in page
    assert "Sequential, images of shapes/train (10) and shapes/val (3): 4 steps, 2 seeds" in page
    assert f"| teacher | {100 * bpkd_sdk.evaluate(teacher(), VAL).miou:.1f} |" in page
    with Image.open(whole.output_dir / "miou_over_time.png") as picture:
        assert min(picture.size) > 700


def test_counts_of_each_image_add_up_to_the_scores(whole):
    run = whole.runs[-1]
    with safe_open(whole.output_dir / run.method / f"seed{run.seed}" / "per_image.safetensors", framework="np") as file:
        counts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(len(values) == len(VAL) for values in counts.values())
    right, label, prediction = counts["region"].sum(0).astype(float)
    union = label + prediction - right
    assert (right / union)[union > 0].mean() == pytest.approx(run.metrics["miou"], abs=1e-12)
    both, of_label, of_prediction = counts["boundary"].sum(0).astype(float)
    union = of_label + of_prediction - both
    assert (both / union)[union > 0].mean() == pytest.approx(run.metrics["boundary_iou"], abs=1e-12)
    edge, body = counts["band"].sum(0)
    assert edge[0] / edge[1] == pytest.approx(run.metrics["edge_accuracy"], abs=1e-12)
    assert body[0] / body[1] == pytest.approx(run.metrics["body_accuracy"], abs=1e-12)


def test_with_one_seed_all_methods_start_alike_and_see_the_same(tmp_path):
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.network = student(num_classes)
            self.crops = []
            seen.append(self.crops)

        def forward(self, images):
            if self.training:
                self.crops.append(images.clone())
            return self.network(images)

    comparison = compare(tmp_path, student=Watched, steps=7)
    runs = [crops for crops in seen if len(crops) > 1]
    assert len(runs) == 6
    for first, *others in (runs[:3], runs[3:]):
        assert len(first) == 7
        assert all(torch.equal(torch.stack(first), torch.stack(other)) for other in others)
    assert not torch.equal(torch.stack(runs[0]), torch.stack(runs[3]))
    starts = [run.first_weights for run in comparison.runs]
    assert starts[0] == starts[1] == starts[2] != starts[3] == starts[4] == starts[5]


def test_what_is_passed_in_stays_as_it_is(tmp_path):
    guide, start, method = teacher(), tiny(9, seed=3), BPKDLoss()
    before = [network.state_dict()[name].clone() for network in (guide, start) for name in network.state_dict()]
    comparison = compare(tmp_path, teacher=guide, student=start, methods={"bpkd": method}, seeds=2)
    after = [network.state_dict()[name] for network in (guide, start) for name in network.state_dict()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert method.num_classes is None
    assert len({run.first_weights for run in comparison.runs}) == 1


class Stopping(BPKDLoss):
    """Sends SIGINT, or raises, in the third step of the second run; the trial before takes one step."""

    calls = 0
    stop = staticmethod(lambda: None)

    def forward(self, *inputs):
        Stopping.calls += 1
        if Stopping.calls == 1 + 4 + 3:
            Stopping.stop()
        return super().forward(*inputs)


def crash():
    raise MemoryError


@pytest.mark.parametrize(
    ("stop", "error", "message"),
    [
        pytest.param(lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt, "3 of 4 runs are finished", id="ctrl-c"),
        pytest.param(crash, MemoryError, None, id="crash"),
    ],
)  # fmt: skip
def test_an_interrupted_comparison_goes_on_where_it_was(whole, tmp_path, monkeypatch, stop, error, message):
    monkeypatch.setattr(Stopping, "calls", 0)
    monkeypatch.setattr(Stopping, "stop", staticmethod(stop))
    options = {"methods": {"bpkd": Stopping()}, "checkpoint_every": 2}
    with pytest.raises(error, match=message):
        compare(tmp_path, **options)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(finished) == 3
    assert (tmp_path / "table.md").is_file()
    calls = Stopping.calls
    parts = compare(tmp_path, **options)
    assert Stopping.calls - calls in (1, 2)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert scores(parts) == {key: value for key, value in scores(whole).items() if key[0] != "no edges"}


def test_a_finished_comparison_is_read_and_can_be_added_to(whole):
    results = {path: path.stat().st_mtime_ns for path in whole.output_dir.rglob("result.json")}
    again = compare(whole.output_dir)
    assert again.runs == whole.runs
    more = compare(whole.output_dir, methods=METHODS | {"both": ["cwd", "bpkd"]}, seeds=3)
    assert len(more.runs) == 3 * 4
    assert list(more.runs[3].first_terms) == ["ce", "cwd/logit", "bpkd/edge", "bpkd/body"]
    assert {path: path.stat().st_mtime_ns for path in results} == results


def test_folders_of_earlier_versions_are_read_or_refused(whole, tmp_path):
    def edit(name, change):
        content = json.loads((tmp_path / name).read_text())
        change(content)
        (tmp_path / name).write_text(json.dumps(content))

    shutil.copytree(whole.output_dir, tmp_path, dirs_exist_ok=True)
    edit("settings.json", lambda settings: settings["options"].pop("teacher_scale"))  # an option that did not exist
    assert len(compare(tmp_path).runs) == 6
    edit("bpkd/seed1/result.json", lambda result: result.pop("curve"))
    with pytest.raises(ValueError, match=r"result.json is not of this version .*: they differ in curve\..*output_dir"):
        compare(tmp_path)
    edit("settings.json", lambda settings: settings.pop("transform"))
    with pytest.raises(ValueError, match=r"settings.json is not of this version .*: they differ in transform\."):
        compare(tmp_path)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        pytest.param({"steps": 5}, "budget: was 'steps=4', is 'steps=5'", id="budget"),
        pytest.param({"learning_rate": 0.1}, "options.learning_rate: was None, is 0.1", id="option"),
        pytest.param({"crop_size": (16, 32)}, r"options.crop_size: was \[32, 32\], is \[16, 32\]", id="crop"),
        pytest.param({"teacher": tiny(9, seed=2).eval()}, "teacher: was ", id="teacher"),
        pytest.param({"student": lambda c: tiny(c, seed=5)}, "student.weights_of_seed_0: was ", id="student"),
        pytest.param({"data": (VAL, VAL)}, "train.name: was 'shapes/train', is 'shapes/val'", id="data"),
        pytest.param({"methods": {"bpkd": "cwd"}}, "class: was 'BPKDLoss', is 'CWDLoss'", id="method"),
        pytest.param({"methods": {"bpkd": BPKDLoss(temperature=4)}}, "temperature: was 1.0, is 4", id="argument"),
    ],
)
def test_runs_of_other_settings_are_not_mixed(whole, change, difference):
    with pytest.raises(ValueError, match=f"(?s)contains runs with other settings.*{difference}.*another output_dir"):
        compare(whole.output_dir, **change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"methods": "bpkd,cwdd"}, ValueError, "Did you mean 'cwd'", id="method"),
        pytest.param({"methods": ["bpkd+"]}, ValueError, "`method` to be one of", id="half-a-composition"),
        pytest.param({"methods": {"../x": "bpkd"}}, ValueError, r"letters, digits.*'../x'", id="name"),
        pytest.param({"seeds": 0}, ValueError, "`seeds` to be at least 1, but got 0", id="seeds"),
        pytest.param({"steps": 0}, ValueError, "`steps` to be a whole number of at least 1, but got 0", id="steps"),
        pytest.param({"seed": 3}, TypeError, "pass `seeds` instead of `seed`", id="seed"),
        pytest.param({"learning_rat": 3}, TypeError, "Did you mean 'learning_rate'", id="option"),
        pytest.param({"labels": "teacher"}, ValueError, "ground-truth labels for its baseline", id="labels"),
        pytest.param(
            {"teacher": "pspnet_r101"},
            FileNotFoundError,
            "There is no file or folder pspnet_r101",
            id="untrained-teacher",
        ),
        pytest.param({"data": (TRAIN, None)}, ValueError, "needs validation data", id="no-validation"),
        pytest.param({"teacher": tiny(5).eval()}, ValueError, "teacher predicts 5 classes", id="classes"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        compare(tmp_path, **change)
    assert not list(tmp_path.rglob("result.json"))


def test_a_method_whose_loss_is_not_finite_does_not_stop_the_others(tmp_path):
    class Diverging(BPKDLoss):
        calls = 0

        def forward(self, *inputs):
            Diverging.calls += 1
            factor = math.nan if Diverging.calls == 1 + 3 else 1
            return {name: factor * term for name, term in super().forward(*inputs).items()}

    comparison = compare(tmp_path, methods={"diverging": Diverging(), "cwd": "cwd"}, seeds=1)
    failed = comparison.runs[1]
    assert "not finite" in failed.error
    assert failed.metrics == {}
    assert [(row.method, row.seeds, row.failed) for row in comparison.rows] == [
        ("alone", 1, 0), ("diverging", 0, 1), ("cwd", 1, 0),
    ]  # fmt: skip
    assert "diverging<br>1 failed" in comparison.to_markdown()
    assert compare(tmp_path, methods={"diverging": Diverging(), "cwd": "cwd"}, seeds=1).runs == comparison.runs


def test_equal_seconds_give_a_slower_method_fewer_steps(tmp_path):
    class Slow(BPKDLoss):
        def forward(self, *inputs):
            time.sleep(0.06)
            return super().forward(*inputs)

    comparison = compare(tmp_path, methods={"slow": Slow()}, steps=None, seconds=1, seeds=1, evaluate_every=None)
    alone, slow = comparison.runs
    assert alone.steps > slow.steps
    for run in comparison.runs:
        plan = json.loads((tmp_path / run.method / "plan.json").read_text())
        assert run.settings["plan"] == plan
        assert run.steps == plan["steps"] == int(1000 / plan["ms_per_step"])
        assert 0.2 < run.seconds < 5  # wide limits, because other programs may use the machine
        assert run.curve[-1]["step"] == run.steps
        assert len(run.curve) <= 5
    shares = [run.seconds for run in comparison.runs]
    assert f"took {min(shares):.2f} to {max(shares):.2f} times the seconds" in comparison.to_markdown()
    assert (
        compare(tmp_path, methods={"slow": Slow()}, steps=None, seconds=1, seeds=1, evaluate_every=None).runs
        == comparison.runs
    )


def test_the_crops_are_of_one_size_though_the_teacher_is_choosier(tmp_path):
    class Choosy(torch.nn.Module):
        spec = bpkd_sdk.NetworkSpec(name=None, num_classes=9, size_divisor=32)

        def __init__(self):
            super().__init__()
            self.body = tiny(9, seed=1)

        def forward(self, images):
            return self.body(images)

    comparison = compare(tmp_path, teacher=Choosy().eval(), crop_size=None, seeds=1, methods="cwd")
    assert comparison.settings["options"]["crop_size"] == [32, 32]
    assert TRAIN.size == (48, 48)


def test_processes_share_the_runs(whole, tmp_path, capfd):
    code = f"from tests.comparison.test_compare import compare; compare({str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines = [next((line for line in process.stderr if "Run " in line), "it started no run")]
    shared = compare(tmp_path)  # while the other process does its first run
    text = "".join([*lines, process.communicate()[1], capfd.readouterr().err])
    assert process.returncode == 0, text
    # One of the two processes did each run, and both return the table of all runs.
    assert text.count("Run ") == len(whole.runs)
    assert scores(shared) == scores(whole)
