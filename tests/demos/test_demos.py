"""The demos with few training steps and small images."""

import importlib.util

import av
import numpy as np
import pytest
from PIL import Image

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from tests.conftest import ROOT

STUDENT = "smp/Linknet/tu-test_resnet"


def run(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, ROOT / "demos" / f"{name}.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    data = ShapesDataset("val")
    paths = [folder / f"{name}.safetensors" for name in ("teacher", "student")]
    for path in paths:
        model = bpkd_sdk.create_model(STUDENT, data.num_classes)
        bpkd_sdk.save_model(model, path)
    return paths


def test_distill_your_folder(tmp_path, capsys):
    output = tmp_path / "run"
    file = run(
        "distill_your_folder", "--teacher-steps", 2, "--student-steps", 2, "--batch-size", 2, "--crop", 64, 64,
        "--output", output,
    )  # fmt: skip
    assert file.is_file()
    output_text = capsys.readouterr().out
    assert "mIoU" in output_text
    assert f"bpkd serve {file} --teacher {output / 'teacher' / 'last.safetensors'}" in output_text
    assert len(bpkd_sdk.open_dataset("folder", root=output / "data", split="val")) == 8


def test_compare_students(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    teacher, student = checkpoints
    data = tmp_path / "data"
    for kind, suffix in (("images", ".jpg"), ("labels", ".png")):
        (data / kind / "val").mkdir(parents=True)
        for index in range(2):
            pixels = np.full((64, 96, 3) if kind == "images" else (64, 96), 40 * index, np.uint8) % 9
            Image.fromarray(pixels).save(data / kind / "val" / f"{index}{suffix}")
    (data / "classes.json").write_text(str(list("abcdefghi")).replace("'", '"'))
    picture = run(
        "compare_students", "--teacher", teacher, "--students", student, tmp_path / "none.onnx", "--data", data,
        "--device", "cpu", "--output", tmp_path / "students.png",
    )  # fmt: skip
    assert Image.open(picture).size == (4 * 96, 2 * 64)
    output_text = capsys.readouterr().out
    assert "0.45 M" in output_text
    assert "none.onnx was skipped: There is no ONNX file" in output_text


def test_segment_video(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("segment_video", "--model", checkpoints[1], "--device", "cpu")
    assert "50 frames" in capsys.readouterr().out
    with av.open(str(result)) as video:
        assert video.streams.video[0].frames == 50
        assert (video.streams.video[0].width, video.streams.video[0].height) == (128, 128)
