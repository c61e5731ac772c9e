"""Tests of the commands `bpkd reproduce` and `bpkd data`."""

import json

import pytest
from accelerate.state import PartialState

import bpkd_sdk
from bpkd_sdk.evaluation import EvaluationProtocol
from tests import trees

SMALL = ["--set", "batch_size=2", "--set", "crop_size=32x32", "--set", "base_size=48x32", "--set", "device=cpu"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The student's backbone has random weights"),
    pytest.mark.filterwarnings("ignore:.*the score on part of the data"),
]


def test_a_dry_run_prints_all_settings_and_writes_nothing(bpkd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = bpkd(
        "reproduce", "pascal_context_59/hrnetv2p_w18s", "--dry-run", "--set", "device=cpu",
        "--set", "crop_size=64x64",
    )  # fmt: skip
    assert code == 0, err
    unbroken = "".join(out.replace("│", "").split())
    for text in (
        "fcn_hr48_480x480_80k_pascal_context_59_20210411_003240-3ae7081e.pth", "hrnetv2_w18_small-b5a04e21.pth",
        "bpkd_paper, published weights", "class_reduction pooled",
        "80000 steps", "learning rate from 0.004 to 0.0001", "weight decay 0.0001", "16 crops of 64x64",
        "windows of 512x512, stride (320, 320)", "bpkd 43.96 / 54.51", "multiply-accumulates per step", "GiB activations",
        "h in total",
    ):  # fmt: skip
        assert text.replace(" ", "") in unbroken, text
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_prints(bpkd, monkeypatch, tmp_path):
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda _: False))
    code, out, err = bpkd(
        "reproduce", "ade20k/hrnetv2p_w18s", "--dry-run", "--method", "none", "--set", "device=cpu",
        "--set", "crop_size=64x64",
    )  # fmt: skip
    assert (code, out) == (0, ""), err
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "a.onnx").touch()
    code, _, err = bpkd("reproduce", "ade20k/hrnetv2p_w18s", "--root", tmp_path, "--evaluate", tmp_path / "a.onnx")
    assert (code, "start it without `accelerate launch`" in err) == (1, True)


def test_smoke_run_and_evaluation(bpkd, tmp_path):
    root = trees.cityscapes(tmp_path / "data", size=(32, 64))
    row = ["reproduce", "cityscapes/hrnetv2p_w18s", "--root", root, "--method", "none", *SMALL]
    code, out, err = bpkd(*row, "--limit-steps", 1, "--output", tmp_path / "run")
    assert code == 0, err
    assert "ours, none (smoke run, not a result)" in out
    assert "75.31" in out
    assert all(word in out for word in ("motorcycle", "edge accuracy", "body accuracy"))
    assert "80000 steps take" in out
    ours = json.loads((tmp_path / "run/reproduction.json").read_text())["ours"]
    assert f"{ours['miou']:.2f}" in out
    code, out, err = bpkd(*row, "--evaluate", tmp_path / "run/last.safetensors")
    assert code == 0, err
    assert "this network" in out
    code, out, err = bpkd(
        "evaluate", tmp_path / "run/last.safetensors", "--data", "cityscapes", "--root", root, "--json",
        "--crop-size", "32x32", "--stride", "16x32", "--base-size", "48x32", "--scales", 0.5, "--scales", 1, "--flip", "--batch-size", 4, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    expected = bpkd_sdk.evaluate(
        tmp_path / "run/last.safetensors", bpkd_sdk.open_dataset("cityscapes", root=root, split="val"),
        protocol=EvaluationProtocol("slide", (32, 32), (16, 32), (48, 32), scales=(0.5, 1), flip=True), device="cpu",
    )  # fmt: skip
    assert json.loads(out)["miou"] == pytest.approx(expected.miou, abs=1e-6)


def test_missing_arguments_are_reported(bpkd, tmp_path):
    code, _, err = bpkd("reproduce", "cityscapes/pspnet_r18")
    assert (code, "needs --root" in err) == (1, True)
    code, _, err = bpkd("reproduce", "cityscapes/pspnet_r18", "--set", "batch")
    assert (code, "NAME=VALUE" in err) == (1, True)
    code, _, err = bpkd("reproduce", "cityscapes/pspnet_r18", "--root", tmp_path)
    assert (code, "cityscapes-dataset.com" in err) == (1, True)


def test_data_commands(bpkd, tmp_path):
    trees.pascal_release(tmp_path)
    code, out, err = bpkd("data", "convert", tmp_path)
    assert (code, "VOC2010" in out) == (0, True), err
    code, out, _ = bpkd("data", "check", "pascal_context_59", "--root", tmp_path)
    assert code == 1
    assert "2 images, but a complete copy has 4996" in out
    assert "64x96" in out


def test_data_check_of_a_complete_copy(bpkd, camvid):
    code, out, _ = bpkd("data", "check", "camvid", "--root", camvid)
    assert code == 0
    assert "367" in out
