"""The command `bpkd`."""

import io
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from rich.table import Table

import bpkd_sdk
from bpkd_sdk import cli
from bpkd_sdk.cli.command import OTHER_NAMES
from bpkd_sdk.cli.wording import name_options
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.evaluation.profile import profile_zoo
from bpkd_sdk.models import set_spec
from bpkd_sdk.models.zoo import build_network
from bpkd_sdk.progress import PlainConsole
from bpkd_sdk.training.monitor import DominantTermWarning
from tests.scenes import write_folder

NETWORK = "smp/FPN/tu-test_resnet"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    model = bpkd_sdk.create_model(NETWORK, ShapesDataset().num_classes)
    bpkd_sdk.save_model(model, path)
    return path


def commands():
    """Return every command with the words that call it."""
    top = typer.main.get_command(cli.app).commands
    nested = {f"data {name}": command for name, command in top["data"].commands.items()}
    return {name: command for name, command in top.items() if name != "data"} | nested


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_help_of_every_command_fits_a_terminal_and_shows_a_call(bpkd, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = bpkd(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert not re.search(r"\bNone\b|\bFalse\b|`bpkd_sdk|\u2026|Ellipsis|list\[| [;,]|<\w+,", out), out
    assert "--pattern" not in out or "such as 'photos/{}.jpg:masks/{}.png'" in " ".join(out.split())
    (call,) = re.findall(r"^    (bpkd .*)", out, re.MULTILINE)[:1]
    assert call.startswith(f"bpkd {name}")
    known = {text for parameter in commands()[name].params for text in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in call.split() if word.startswith("--")} <= known


def test_version(bpkd):
    assert bpkd("--version")[:2] == (0, f"bpkd-sdk {bpkd_sdk.__version__}\n")


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        ("train x --lr 0.1", "--lr. Use --learning-rate."),
        ("train x -lr 0.1", "-lr. Use --learning-rate."),
        ("train x --bs=4", "--bs. Use --batch-size."),
        ("train x --Batch_Size 4", "--Batch_Size. Use --batch-size."),
        ("train x --epochs 4", "--epochs. Training is counted in steps: --steps = epochs x images / --batch-size."),
        ("train x --imgsz 512", "--imgsz. Use --crop-size."),
        ("train x --weights a.pth", "--weights. Use --backbone-weights."),
        ("evaluate x --weights a.pth", "--weights. The network is an argument without an option."),
        ("distill x y --name z", "--name. Use --output."),
        ("predict x y -o z", "-o. Use --output."),
        ("train x --learning-rat 1", "--learning-rat (Possible options: --final-learning-rate, --learning-rate"),
        ("export x y --size 8x8", "--size. Use --input-size."),
        ("export x y --sizes 8x8", "--sizes. Use --input-sizes."),
        ("models --epochs 4", "--epochs"),
    ],
)
def test_unknown_options_name_the_right_one(bpkd, call, advice):
    code, _, err = bpkd(*call.split())
    assert (code, f"No such option: {advice}" in err) == (2, True), err


def test_options_of_other_tools_lead_to_options_of_a_command():
    own = {text for command in commands().values() for parameter in command.params for text in parameter.opts}
    replaced = {option.split()[0] for options in OTHER_NAMES.values() for option in options if option.startswith("--")}
    assert replaced <= own


@pytest.fixture
def few_scenes(monkeypatch):
    """Reduces the generated scenes to 12 images per split."""
    monkeypatch.setattr(ShapesDataset, "__len__", lambda dataset: min(dataset.length, 12))


def test_distill_evaluate_export_and_evaluate_again(bpkd, teacher, few_scenes, tmp_path):
    run = tmp_path / "run"
    code, out, err = bpkd(
        "distill", teacher, NETWORK, "--backbone-weights", "none", "--steps", 2, "--batch-size", 2, "--crop-size", "64x64",
        "--output", run, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert re.search("^Scores: +mIoU 0.*boundary IoU", err, re.M)
    assert out == f"Next: bpkd export {run}/last.safetensors student.onnx --input-size 64x64\n"
    code, out, err = bpkd("export", run, run / "s.onnx")
    assert err.endswith(f"with the size of its training crops: bpkd export {run} {run / 's.onnx'} --input-size 64x64\n")
    code, out, _ = bpkd("evaluate", run / "last.safetensors", "--json")
    scores = json.loads(out)
    assert scores["images"] == 12
    assert code == 0
    code, out, _ = bpkd("export", run / "last.safetensors", run / "s.onnx", "--input-size", "128x128")
    assert code == 0
    assert "of the pixels as in torch" in out
    code, out, _ = bpkd("evaluate", run / "s.onnx", "--json")
    assert json.loads(out)["miou"] == pytest.approx(scores["miou"], abs=1e-3)


def test_evaluate_has_no_data_set_but_the_one_that_the_checkpoint_names(bpkd, tmp_path):
    root = write_folder(tmp_path / "my_data", train=2, val=1)
    options = ("--steps", 1, "--batch-size", 2, "--crop-size", "32x32", "--device", "cpu", "--backbone-weights", "none")
    code, _, err = bpkd("train", NETWORK, "--data", root, "--output", tmp_path / "run", *options)
    assert code == 0, err
    checkpoint = tmp_path / "run" / "last.safetensors"
    code, _, err = bpkd("evaluate", checkpoint)
    assert code == 1
    assert "was trained on 'my_data/train', whose folder is not known. Pass --data" in err
    code, out, _ = bpkd("evaluate", checkpoint, "--data", root, "--json")
    assert json.loads(out)["images"] == 1
    (root / "classes.json").write_text('["one", "two", "three"]')
    code, _, err = bpkd("evaluate", checkpoint, "--data", root)
    assert code == 1
    assert "my_data/val has 3: one, two, three" in err
    assert "`evaluate` scores a network of other classes with --class-map: the network's classes for each" in err
    code, _, _ = bpkd("evaluate", checkpoint, "--data", root, "--no-match-classes")
    assert code == 0


def test_a_class_map_is_read_from_a_file(bpkd, tmp_path):
    root = write_folder(tmp_path / "my_data", train=2, val=1)
    teacher = bpkd_sdk.create_model(NETWORK, 4).eval()
    set_spec(teacher, replace(teacher.spec, class_names=("soil", "rose", "brick", "leaf")))
    bpkd_sdk.save_model(teacher, tmp_path / "teacher.safetensors")
    file = tmp_path / "map.json"
    file.write_text('{"background": "soil", "red": ["rose", "brick"], "green": "*"}')
    call = ("distill", tmp_path / "teacher.safetensors", NETWORK, "--data", root, "--class-map", file)
    options = ("--steps", 1, "--batch-size", 2, "--crop-size", "32x32", "--device", "cpu", "--no-check-teacher")
    options += ("--backbone-weights", "none")
    views = ("--teacher-scale", 2, "--teacher-augment", "flip", "--teacher-augment", 0.5)
    code, _, err = bpkd(*call, "--output", tmp_path / "run", *options, *views)
    assert code == 0, err
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["class_map"] == {"background": ["soil"], "red": ["rose", "brick"], "green": ["*"]}
    assert (facts["config"]["teacher_scale"], facts["config"]["teacher_augment"]) == (2, ["flip", 0.5])
    code, out, err = bpkd("evaluate", tmp_path / "teacher.safetensors", "--data", root, "--class-map", file, "--json")
    assert (code, json.loads(out)["class_names"]) == (0, ["background", "red", "green"]), err
    file.write_text('{"red": "rose", "red": "brick"}')
    code, _, err = bpkd(*call)
    assert code == 1
    assert "map.json contains the key 'red' twice in one object" in err
    file.write_text('["rose"]')
    code, _, err = bpkd(*call)
    assert code == 1
    assert "to contain a JSON object such as" in err


def test_errors_are_one_message_and_a_code(bpkd, tmp_path):
    code, _, err = bpkd("evaluate", tmp_path / "none.safetensors")
    assert code == 1
    assert "There is no file or folder" in err
    assert "Traceback" not in err
    for name in ("none.onnx.log", "nona.onnx", "none.safetensor"):
        (tmp_path / name).touch()
    assert "There is no ONNX file at" in (err := bpkd("evaluate", tmp_path / "non.onnx")[2])
    assert err.endswith("Did you mean 'nona.onnx'?\n")
    code, _, err = bpkd("train", NETWORK, "--crop-size", "64")
    assert code == 1
    assert "Expected --crop-size to be HEIGHTxWIDTH, such as 512x1024" in err


def test_models_prints_the_papers_sixteen_figures(bpkd, monkeypatch):
    counted = list(profile_zoo())
    monkeypatch.setattr("bpkd_sdk.evaluation.profile.profile_zoo", lambda: counted)
    code, out, _ = bpkd("models", "--json")
    assert code == 0
    rows = [row for row in json.loads(out) if row["paper_params"] is not None]
    assert len(rows) == 8
    for row in rows:
        assert round(row["params"] / 1e6, 2) == row["paper_params"]
        assert round(row["paper_macs"] / 1e9, 2) == row["paper_gflops"]
    code, out, _ = bpkd("models")
    assert all(f"{row['paper_gflops']:.2f}" in out and row["name"] in out for row in rows)


def test_import_of_a_distilled_student(bpkd, tmp_path):
    network = build_network("pspnet_r18", 7, aux_head=True).eval()
    state = {f"architecture.model.{key}": value for key, value in network.state_dict().items()}
    state["teacher.backbone.conv1.weight"] = torch.zeros(1)
    torch.save({"meta": {"CLASSES": list("abcdefg")}, "state_dict": state}, tmp_path / "official.pth")
    code, out, err = bpkd("import", tmp_path / "official.pth", tmp_path / "student.safetensors")
    assert code == 0, err
    assert "pspnet_r18, 7 classes" in out
    assert "teacher.backbone.conv1.weight" in out
    imported = bpkd_sdk.load_model(tmp_path / "student.safetensors")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(imported(images), network(images))
    assert imported.spec.class_names == tuple("abcdefg")
    assert imported.spec.aux_head
    code, out, _ = bpkd("profile", tmp_path / "official.pth", "--input-size", "64x64", "--json")
    assert json.loads(out)["params"] == sum(p.numel() for p in network.parameters()) - sum(
        p.numel() for p in network.auxiliary_head.parameters()
    )


def test_names_with_brackets_are_printed_as_they_are(bpkd, tmp_path):
    root = write_folder(tmp_path / "my_data", ["[red]road", "lane [/solid]", "sky:car:"], train=2, val=1)
    options = ("--steps", 1, "--batch-size", 2, "--crop-size", "32x32", "--device", "cpu", "--backbone-weights", "none")
    code, _, err = bpkd("train", NETWORK, "--data", root, "--output", tmp_path / "run", *options)
    assert code == 0, err
    code, out, err = bpkd("evaluate", tmp_path / "run" / "last.safetensors", "--data", root)
    assert code == 0, err
    assert all(name in out for name in ("[red]road", "lane [/solid]", "sky:car:"))


def test_doctor_names_what_is_there(bpkd):
    code, out, _ = bpkd("doctor")
    assert code == 0
    parts = ("torch", "CUDA", "ONNX Runtime", "TensorRT", "CPU", "av", "tritonclient", "huggingface_hub")
    for part in (*parts, "'bpkd-sdk[tensorrt]'"):
        assert part in out


def test_errors_name_the_options_of_the_command(bpkd, tmp_path):
    bpkd_sdk.save_model(bpkd_sdk.create_model(NETWORK, 9, backbone_weights="none"), tmp_path / "m.safetensors")
    code, _, err = bpkd("export", tmp_path / "m.safetensors", tmp_path / "m.onnx")
    call = f"bpkd export {tmp_path / 'm.safetensors'} {tmp_path / 'm.onnx'} --input-size 512x512"
    assert (code, f"Pass --input-size, the size of the images to export for. For example: {call}" in err) == (
        1,
        True,
    ), err
    code, _, err = bpkd("export", tmp_path / "m.safetensors", tmp_path / "m.onnx", "--input-size", "16x64")
    assert (code, "Expected --input-size to be HEIGHTxWIDTH of at least" in err) == (1, True), err
    for option in ("--crop-size", "--base-size"):
        code, _, err = bpkd("train", NETWORK, option, "64")
        assert (code, f"Expected {option} to be HEIGHTxWIDTH, such as 512x1024, but got '64'" in err) == (1, True), err
    code, _, err = bpkd("evaluate", tmp_path / "m.safetensors", "--data", "shapes", "--stride", "8x8")
    assert (code, "pass --fit slide with --crop-size, the HEIGHTxWIDTH" in err) == (1, True), err


def test_names_are_printed_with_their_brackets_and_without_control_characters(capsys):
    for console in (PlainConsole(), PlainConsole(stderr=True)):
        table = Table("a [bold]heading", title="title [/]")
        table.add_row("lane [/solid] :car: \x1b[31m")
        console.print("runs [old] \x07 \udcff")
        console.print(table)
    for text in capsys.readouterr():
        for part in ("runs [old] \\x07 \\udcff", "title [/]", "a [bold]heading", "lane [/solid] :car: \\x1b[31m"):
            assert part in text


def test_warnings_are_one_line_in_the_words_of_the_command(monkeypatch):
    output = io.StringIO()

    def warn(**_):
        output.write(warnings.formatwarning(text, DominantTermWarning, "a.py", 1, "code"))

    monkeypatch.setattr(cli, "app", warn)
    monkeypatch.setattr("sys.argv", ["bpkd", "train"])
    text = "freeze_encoder_steps=1 freezes \x1b random weights. Pass backbone_weights='imagenet'."
    cli.main()
    expected = "Warning: --freeze-encoder-steps 1 freezes \\x1b random weights. Pass --backbone-weights imagenet.\n"
    assert output.getvalue() == expected


def test_folders_with_brackets_are_named_in_results_and_errors(bpkd, tmp_path):
    root = write_folder(tmp_path / "my [data]", train=4, val=1)
    options = ("--steps", 1, "--batch-size", 2, "--crop-size", "32x32", "--device", "cpu", "--backbone-weights", "none")
    call = ("train", NETWORK, "--data", root, "--output", tmp_path / "run [/1]", *options)
    code, out, err = bpkd(*call)
    assert code == 0, err
    assert "run [/1]/last.safetensors" in out
    code, _, err = bpkd(*call)
    assert (code, "run [/1] contains a run already. Pass --resume to resume it, or another --output." in err) == (
        1,
        True,
    )


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("evaluate", "export with argmax=False", "export with --no-argmax"),
        ("export", "export with input_size=(64, 96) or dynamic_size=True", "export with --input-size 64x96 or --dynamic-size"),
        ("export", "input_sizes=((32, 64), (64, 128), (64, 256)).", "--input-sizes 32x64,64x128,64x256."),
        ("benchmark", "fit='resize' runs it once", "--fit resize runs it once"),
        ("train", "Resume with resume=True, or another output_dir.", "Resume with --resume, or another --output."),
        ("train", "no images; pass data=(train, None) to train without.", "no images; pass --val-share 0.1 to validate on a part of the training images."),
        ("train", "pass batch_size=2", "pass --batch-size 2"),
        ("train", "pass protocol=EvaluationProtocol(crop_size=(height, width)) with that size; to train without validation, pass data=(train, None).", "train it in Python, with an EvaluationProtocol of that size."),
        ("train", "with output_dir='runs/a-b' and resume=True", "with --output runs/a-b and --resume"),
        ("train", "Expected `precision` to be", "Expected --precision to be"),
        ("train", "Expected `losses` to be a tuple such as ('ce', 'dice:0.5')", "Expected --losses to be values such as 'ce', 'dice:0.5'"),
        ("train", "trackers=('wandb',) needs wandb", "--trackers wandb needs wandb"),
        ("train", "Use distill(..., labels='teacher') to learn", "Use `bpkd distill --labels teacher` to learn"),
        ("train", "Call train() instead", "Call `bpkd train` instead"),
        ("train", "See bpkd_sdk.list_models().", "See `bpkd models`."),
        ("train", "set gradient_clip, or use the folder runs/batch_size", "set --gradient-clip, or use the folder runs/batch_size"),
        ("train", "pass crop_size (--crop-size).", "pass --crop-size."),
        ("compare", "steps=None and seconds=None", "no --steps and no --seconds"),
        ("evaluate", "pass match_classes=False (--no-match-classes).", "pass --no-match-classes."),
        ("serve", "build it with bpkd_sdk.export.to_tensorrt.", "build it with `bpkd export`."),
        ("export", "to_tensorrt(..., backend='tensorrt_rtx', hardware=['sm86', 'sm89'])", "`bpkd export --backend tensorrt_rtx --hardware sm86 --hardware sm89`"),
        ("export", "the image of (480, 640)", "the image of 480x640"),
        ("data check", "Leave out val_share (--val-share), or skip_unlabelled.", "Leave out --val-share, or --skip-unlabelled."),
        ("evaluate", "pass it: load_model(path, model=...).", "pass it: load_model(path, model=...). load_model is a part of the Python package bpkd_sdk."),
        ("models", "the module `other` and x=3", "the module `other` and x=3"),
    ],
)  # fmt: skip
def test_arguments_of_python_become_options(command, text, expected):
    assert name_options(text, [*command.split(), "m.onnx"]) == expected


def test_the_folder_of_a_run_stands_for_its_last_checkpoint(bpkd, few_scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--steps", 2, "--batch-size", 2, "--crop-size", "64x64", "--device", "cpu", "--backbone-weights", "none")
    code, _, err = bpkd("train", NETWORK, "--output", "run", *options)
    assert code == 0, err
    code, out, err = bpkd("evaluate", "run", "--json")
    assert (code, "is at step" in err) == (0, False)
    assert json.loads(out)["miou"] == pytest.approx(bpkd_sdk.evaluate("run", ShapesDataset("val")).miou)
    code, out, err = bpkd("export", "run", "s.onnx", "--input-size", "64x64", "--data", "shapes", "--precision", "fp16")
    assert (code, "Option --data is not used" in err) == (1, True), err
    code, out, _ = bpkd("inspect", "run", "--json")
    assert json.loads(out)["classes"] == 9
    predictor = bpkd_sdk.Predictor("run")
    assert predictor.runtime.name == str(Path("run/last.safetensors"))
    again = ("--steps", 1, "--batch-size", 2, "--crop-size", "64x64", "--device", "cpu", "--no-check-teacher")
    code, _, err = bpkd("distill", "run", "./run", "--output", "next", *again)
    assert code == 0, err
    assert re.search("^Student: .* from ./run;", err, re.MULTILINE), err


def test_a_run_that_is_not_finished_is_called_that(bpkd, tmp_path):
    training = {"step": 3, "config": {"steps": 10}}
    model = bpkd_sdk.create_model("smp/Linknet/tu-test_resnet", 9)
    bpkd_sdk.save_model(model, tmp_path / "run" / "last.safetensors", training=training)
    with pytest.warns(UserWarning, match="is at step 3 of 10. The network is its last checkpoint"):
        bpkd_sdk.load_model(tmp_path / "run")
    (tmp_path / "new").mkdir()
    for file, problem in ((None, "contains no network"), ("run.json", "has not written a checkpoint")):
        if file:
            (tmp_path / "new" / file).write_text("{}")
        with pytest.raises(FileNotFoundError, match=problem):
            bpkd_sdk.load_model(tmp_path / "new")
        code, _, err = bpkd("evaluate", tmp_path / "new")
        assert (code, problem in err) == (1, True), err


def test_the_folder_of_the_data_is_no_folder_for_a_run(bpkd, tmp_path):
    root = write_folder(tmp_path / "my_data", train=2, val=1)
    code, _, err = bpkd("train", NETWORK, "--data", root, "--output", f"{root}/../my_data")
    assert (code, "is the folder of the data. Write the run to another folder" in err) == (1, True), err
    code, _, err = bpkd("quickstart", root, "--data", root)
    assert (code, "is the folder of the data. Write the run to another folder" in err) == (1, True), err


def test_the_quickstart_finds_wrong_paths_at_once(bpkd, tmp_path):
    for option, value in {"--data": "cityscapes", "--teacher": "no_teacher"}.items():
        code, out, err = bpkd("quickstart", tmp_path / "out", option, value)
        assert (code, out) == (1, ""), err
        assert re.search(f"There is no .*folder {value}", err)


def test_a_folder_with_the_name_of_the_generated_scenes_is_stated(bpkd, tmp_path, monkeypatch):
    write_folder(tmp_path / "shapes", train=2, val=1)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="the generated scenes 'shapes'. For the folder of that name, pass ./shapes"):
        bpkd("evaluate", "none.onnx", "--data", "shapes")
    code, out, _ = bpkd("data", "check", "./shapes")
    assert (code, "train" in out) == (0, True)
