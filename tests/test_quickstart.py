"""The quickstart in a few steps: on the generated scenes, and on a folder of images."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.quickstart import STUDENT, quickstart
from tests.bands import write_bands
from tests.conftest import ROOT
from tests.scenes import write_folder


def read_rows(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results["agreement"] >= 0.9999
    return {row["name"]: row for row in results["rows"]}


def served_files(out):
    """Return the teacher and the students that the last line's command shows."""
    words = shlex.split(out.splitlines()[-1])
    assert words[:2] == ["bpkd", "serve"]
    assert words[5] == "--teacher"
    return words[6], words[2:5]


def test_the_generated_scenes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ShapesDataset, "__len__", lambda dataset: min(dataset.length, 12))
    report = quickstart(tmp_path, steps=2)
    out = capsys.readouterr().out
    teacher, students = served_files(out)
    assert teacher == "shapes-teacher"
    assert all(Path(path).is_file() for path in students)
    assert (tmp_path / "site" / "index.html").is_file() or "No web site was written. " in out
    assert re.search(r"^Total time: \d+ s$", out, re.M)
    rows = read_rows(tmp_path)
    assert list(rows) == [
        "teacher", "student alone", "student, BPKD", "student, BPKD, ONNX", "student, BPKD, INT8",
    ]  # fmt: skip
    assert rows["teacher"]["miou"] > 0.7
    assert rows["student, BPKD"]["miou"] == pytest.approx(rows["student, BPKD, ONNX"]["miou"], abs=0.01)
    page = report.read_text()
    assert page.count("<img") == 2 + 4 * 5
    assert 'src="http' not in page
    student = bpkd_sdk.load_model(tmp_path / "student_bpkd" / "last.safetensors")
    assert student.spec.class_names == ShapesDataset().class_names


def test_the_first_program_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert "steps=160" in program
    monkeypatch.setattr(ShapesDataset, "__len__", lambda dataset: min(dataset.length, 12))
    monkeypatch.chdir(tmp_path)
    exec(compile(program.replace("steps=160", "steps=2"), "README.md", "exec"), {})  # noqa: S102
    assert str(ShapesDataset().class_names) in capsys.readouterr().out


def test_the_included_teacher_has_a_name_for_the_command_line(bpkd, tmp_path, monkeypatch):
    monkeypatch.setattr(ShapesDataset, "__len__", lambda dataset: min(dataset.length, 4))
    options = (
        "--steps",
        1,
        "--batch-size",
        2,
        "--crop-size",
        "128x128",
        "--backbone-weights",
        "none",
        "--device",
        "cpu",
    )
    code, _, err = bpkd("distill", "shapes-teacher", STUDENT, "--output", tmp_path / "run", *options)
    assert (code, "shapes-teacher" in err) == (0, True), err


def test_ctrl_c_says_that_the_same_command_continues(bpkd, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt("stopped after step 3, pass resume=True")

    monkeypatch.setattr("bpkd_sdk.quickstart.train", interrupted)
    code, _, err = bpkd("quickstart", tmp_path / "out")
    assert code != 0
    assert err.endswith("Interrupted: the same command continues the quickstart.\n")


def test_a_folder_of_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bpkd_sdk.quickstart.PIXELS", 64 * 64)  # below the smallest size
    # As if each of the three runs had been interrupted after 1000 seconds.
    monkeypatch.setattr("bpkd_sdk.quickstart.read_history", lambda _: [{"seconds": 1000.0}, {"metrics": {}}])
    root = write_folder(tmp_path / "my data", ["road", "car", "[sky/]"], train=9, val=1)
    for part in ("images", "labels"):
        shutil.rmtree(root / part / "val")
    quickstart(tmp_path / "out", data=root, steps=2, val_share=0.34)
    out, err = capsys.readouterr()
    counts = re.search(r"the first (\d) of \1 training images and (\d) of \2 validation images", err)
    assert sum(map(int, counts.groups())) == 9
    batch_sizes = {
        json.loads((tmp_path / "out" / run / "run.json").read_text())["config"]["batch_size"]
        for run in ("teacher", "student_alone", "student_bpkd")
    }
    assert batch_sizes == {4}
    teacher, _ = served_files(out)
    assert out.rstrip().endswith("--fit resize")
    network = bpkd_sdk.load_model(teacher)
    assert network.spec.class_names == ("road", "car", "[sky/]")
    assert "Total time: 50 min " in out
    assert ", 50 min 0 s of it in earlier calls\n" in out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seconds"] > 3000
    rows = read_rows(tmp_path / "out")
    assert rows["teacher"]["params"] > rows["student, BPKD"]["params"]


def test_a_folder_of_other_images_is_refused(tmp_path):
    root = write_bands(tmp_path / "data", train=2, val=1)
    with pytest.raises(ValueError, match="4 channels of 0 to 4095, but .* are for 8-bit RGB images"):
        quickstart(tmp_path / "out", data=root, steps=2)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_labels_is_refused(tmp_path):
    root = write_folder(tmp_path / "data", train=2, val=1)
    shutil.rmtree(root / "labels")
    with pytest.raises(ValueError, match="has no labels, from which the quickstart trains"):
        quickstart(tmp_path / "out", data=root, steps=2)
    assert not (tmp_path / "out").exists()
