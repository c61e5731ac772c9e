"""What a run prints: its summary at the start, lines of progress without a terminal, and its result."""

import re
import threading

import pytest

import bpkd_sdk
from bpkd_sdk import progress
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.evaluation import EvaluationProtocol
from tests.networks import tiny

TRAIN, VAL = ShapesDataset("train", length=10, size=(48, 48)), ShapesDataset("val", length=3, size=(48, 40))
OPTIONS = {"batch_size": 2, "crop_size": (32, 32), "device": "cpu", "log_every": 2, "steps": 4}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A trained teacher, whose provenance contains its scores."""
    return bpkd_sdk.train(tiny(9, seed=1), (TRAIN, VAL), output_dir=tmp_path_factory.mktemp("teacher"), **OPTIONS)


def rows(printed, *names):
    """Returns the texts of lines by their names, each of which occurs once."""
    found = {name: re.findall(f"^{name}: +(.*)$", printed, re.M) for name in names}
    assert all(len(texts) == 1 for texts in found.values()), found
    return {name: texts[0] for name, texts in found.items()}


def test_a_run_is_described_at_its_start_and_its_end(teacher, tmp_path, capsys):
    options = OPTIONS | {"output_dir": tmp_path / "run", "method": bpkd_sdk.BPKDLoss(9, edge_weight=2, body_weight=2)}
    bpkd_sdk.distill(teacher.model, tiny(9, seed=2), (TRAIN, VAL), losses=("ce", "dice:0.5"), **options)
    printed = capsys.readouterr().err
    start, end = printed.split("Step ")[0], printed[printed.index("Finished: ") :]
    found = rows(
        start, "Data", "Validation", "Classes", "Student", "Method", "Loss", "Steps", "Crops", "Device", "Output"
    )
    assert found["Data"] == "shapes/train, 10 images"
    assert found["Validation"] == "shapes/val, 3 images"
    assert found["Classes"].startswith("9: ground, ")
    assert re.fullmatch(r"Sequential as given; [0-9.]+ k? *parameters, [0-9.]+ k MACs per crop", found["Student"])
    assert rows(start, "Teacher")["Teacher"].startswith(
        "Sequential with the weights of the run 'train Sequential', step 4"
    )
    assert found["Method"] == "bpkd"
    assert found["Loss"] == "ce + 0.5 dice + 2 edge + 2 body"
    assert found["Steps"] == "4 of 2 images (0.8 passes over the data), evaluated every 1"
    assert found["Crops"] == "32x32 pixels (height x width)"
    assert (found["Device"], found["Output"]) == ("cpu, fp32", str(tmp_path / "run"))
    result = rows(end, "Finished", "Scores", "Teacher", "Weights")
    assert result["Finished"].startswith("4 steps in ")
    assert result["Teacher"].startswith(f"mIoU {teacher.metrics.miou:.3f}, boundary IoU ")
    assert result["Weights"].startswith(str(tmp_path / "run" / "last.safetensors"))
    assert "bpkd export" not in printed


def test_scores_of_the_teacher_that_were_measured_in_another_way_are_not_shown(teacher, tmp_path, capsys):
    for name, other in {
        "width": {"boundary_width": 5},
        "protocol": {"protocol": EvaluationProtocol(flip=True)},
    }.items():
        bpkd_sdk.distill(teacher.model, tiny(9, seed=2), (TRAIN, VAL), output_dir=tmp_path / name, **OPTIONS | other)
        end = capsys.readouterr().err.partition("Finished: ")[2]
        assert "Scores: " in end
        assert "Teacher: " not in end


def test_lines_without_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    options = OPTIONS | {"steps": 6, "evaluate_every": 6, "checkpoint_every": 4, "log_every": 3}
    result = bpkd_sdk.train(tiny(9), (TRAIN, VAL), output_dir=tmp_path, **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Step ")]
    records = {record["step"]: record for record in result.history if "terms" in record}
    for step in range(1, 7):
        kinds = [line for line in lines if line.startswith(f"Step {step} of 6: ")]
        values = [line for line in kinds if "ce " in line]
        assert len(values) == (step in records), kinds  # the values of a record are printed once
        assert all(f"ce {records[step]['terms']['ce']:.3f}, learning rate" in line for line in values)
        assert re.fullmatch(rf"Step {step} of 6: \d+ s left", kinds[-1])
    assert list(records) == [3, 4, 6]
    assert [line for line in lines if "checkpoint" in line] == ["Step 4 of 6: checkpoint written"]
    (scores,) = [line for line in lines if "mIoU" in line]
    assert scores == f"Step 6 of 6: mIoU {result.metrics.miou:.3f}, boundary IoU {result.metrics.boundary_iou:.3f}"


def test_work_without_a_count_prints_lines_too(monkeypatch):
    printed, is_printed = [], threading.Event()
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.01)
    monkeypatch.setattr(progress, "print_line", lambda text: (printed.append(text), is_printed.set()))
    with progress.working("Compiling [/x]"):
        assert is_printed.wait(60)
    assert printed[0] == "Compiling [/x]: 0 s"
