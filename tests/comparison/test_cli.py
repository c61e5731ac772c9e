"""The command `bpkd compare`."""

import json
import os
import signal

import pytest
from PIL import Image

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import METHODS, CWDLoss

NETWORK = "smp/FPN/tu-test_resnet"


@pytest.fixture
def folder(tmp_path):
    """Folder with a data set of four images per split, and with a teacher."""
    for split in ("train", "val"):
        data = ShapesDataset(split, length=4, size=(64, 64))
        for kind in ("images", "labels"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        for i, (image, label) in enumerate(data):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "data/images" / split / f"{i}.png")
            Image.fromarray(label.numpy()).save(tmp_path / "data/labels" / split / f"{i}.png")
    (tmp_path / "data" / "classes.json").write_text(json.dumps(data.class_names))
    bpkd_sdk.save_model(bpkd_sdk.create_model(NETWORK, data.num_classes), tmp_path / "teacher.safetensors")
    return tmp_path


def command(folder):
    return [
        "compare", "--data", folder / "data", "--teacher", folder / "teacher.safetensors", "--student", NETWORK,
        "--steps", 2, "--seeds", 1, "--batch-size", 2, "--crop-size", "64x64", "--evaluate-every", 2,
        "--device", "cpu", "--output", folder / "out", "--backbone-weights", "none",
    ]  # fmt: skip


def test_compare_prints_the_table_and_goes_on(bpkd, folder):
    compare = command(folder)
    code, out, err = bpkd(*compare, "--methods", "cwd")
    assert code == 0, err
    assert "Run 2 of 2: cwd, seed 0, 2 steps" in err
    for text in ("alone", "cwd", "mIoU", "ms/step", "1 seed"):
        assert text in out
    code, out, err = bpkd(*compare, "--methods", "cwd,bpkd+cwd")
    assert code == 0, err
    assert "Run 2 of 3" not in err
    assert "Run 3 of 3: bpkd+cwd" in err
    code, _, err = bpkd(*compare, "--methods", "cwd", "--optimizer", "adamw")
    assert code == 1
    assert "options.optimizer: was 'sgd', is 'adamw'" in err


def test_all_methods_stand_in_one_table(bpkd, folder):
    code, _, err = bpkd(*command(folder), "--methods", "all")
    assert code == 0, err
    rows = json.loads((folder / "out" / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["alone", *METHODS]
    for row in rows:
        assert (row["seeds"], row["failed"], row["steps"]) == (1, 0, 2)
        assert 0 <= row["scores"]["edge_accuracy"]["mean"] <= 1
        assert row["peak_memory"]["mean"] > 0


def test_ctrl_c_says_what_is_done(bpkd, monkeypatch, folder):
    class Stopping(CWDLoss):
        calls = 0

        def forward(self, *inputs):
            Stopping.calls += 1
            if Stopping.calls == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(*inputs)

    monkeypatch.setitem(METHODS, "stopping", Stopping)
    code, _, err = bpkd(*command(folder), "--methods", "stopping")
    assert code == 130
    assert f"Interrupted: 1 of 2 runs are finished in {folder / 'out'}; repeat the same call to resume" in " ".join(
        err.split()
    )
    code, out, err = bpkd(*command(folder), "--methods", "stopping")
    assert code == 0, err
    assert "stopping" in out
