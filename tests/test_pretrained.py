"""Tests of `save_pretrained`, and of networks on the Hugging Face Hub: a stand-in that its own client talks to."""

import contextlib
import getpass
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.hub import upload
from bpkd_sdk.models.checkpoint import read_header
from bpkd_sdk.pretrained import remove_paths
from bpkd_sdk.runtime import find_format, open_runtime
from tests.hub import TOKEN, serving
from tests.networks import tiny
from tests.without_torch import FINDER

SIZE = (64, 64)
VAL = ShapesDataset("val", length=2)
PHOTO = VAL[0][0].permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student that was distilled from a teacher's file, whose folder has the name of a person."""
    place = tmp_path_factory.mktemp("jane.doe")
    options = {"steps": 1, "batch_size": 2, "crop_size": SIZE, "device": "cpu", "check_data": False}
    options |= {"check_teacher": False, "backbone_weights": "none"}
    data = ShapesDataset("train", length=2), VAL
    teacher = bpkd_sdk.create_model("smp/Unet/tu-test_resnet", VAL.num_classes)
    bpkd_sdk.save_model(teacher, place / "teacher.safetensors")
    return bpkd_sdk.distill(
        place / "teacher.safetensors", "smp/Linknet/tu-test_resnet", data, output_dir=place / "run", **options
    )


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.fixture(scope="module")
def folder(run, hub, tmp_path_factory):
    """Model folder of the student, with scores and an example, which is uploaded too."""
    return bpkd_sdk.save_pretrained(
        run.model,
        tmp_path_factory.mktemp("shared") / "student",
        input_size=SIZE,
        license="cc-by-4.0",
        data=VAL,
        examples=[PHOTO],
        push_to_hub="jane/student",
    )


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x.cpu(), y.cpu()) for (a, x), (b, y) in pairs)


def test_the_hub_returns_what_was_uploaded(run, folder, hub):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files.keys() == {
        "README.md",
        "model.onnx",
        "model.safetensors",
        "pictures/1-image.png",
        "pictures/1-overlay.png",
    }
    repository = hub.repositories["jane/student"]
    commit = repository.branches["main"]
    assert not repository.private
    assert repository.commits[commit] == files | {".gitattributes": b""}
    before = len(hub.requests)
    network = bpkd_sdk.load_model("hf://jane/student")
    assert same_weights(network, run.model)
    assert network.spec == run.model.spec
    origin = {"source": "hf://jane/student", "revision": commit, "license": "cc-by-4.0"}
    assert network.provenance["weights"] == origin
    assert network.provenance["config"] == run.model.provenance["config"]
    fetched = {request.rpartition("/")[2] for request in hub.requests[before:] if request.startswith("GET")}
    assert fetched <= {"model.safetensors", "README.md"}
    prediction = bpkd_sdk.Predictor(Path("hf://jane/student"))(PHOTO)
    assert np.array_equal(prediction.mask, bpkd_sdk.Predictor(folder)(PHOTO).mask)
    assert open_runtime("hf://jane/student").name == "hf://jane/student"
    assert find_format("hf://jane/student") is find_format(str(folder))


def test_a_revision_is_a_branch_or_a_commit_and_the_cache_works_offline(run, folder, hub, tmp_path, monkeypatch):
    other = tiny(3).eval()
    bpkd_sdk.save_pretrained(other, tmp_path / "new", input_size=SIZE, license="mit", push_to_hub="jane/student@new")
    first = hub.repositories["jane/student"].branches["main"]
    assert same_weights(bpkd_sdk.load_model("hf://jane/student@new", model=tiny(3, seed=1)), other)
    assert same_weights(bpkd_sdk.load_model(f"hf://jane/student@{first}"), run.model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same_weights(bpkd_sdk.load_model("hf://jane/student"), run.model)
    with pytest.raises(RuntimeError, match="not in the cache .* Connect to the internet once"):
        bpkd_sdk.load_model("hf://jane/other")
    with pytest.raises(RuntimeError, match="the Hub cannot be reached"):
        bpkd_sdk.save_pretrained(other, tmp_path / "b", input_size=SIZE, license="mit", push_to_hub="jane/b")
    assert not (tmp_path / "b").exists()


def test_predictors_of_the_hub_need_no_torch(folder, hub, tmp_path):
    code = f"""{FINDER}
import numpy, sys, bpkd_sdk
mask = bpkd_sdk.Predictor("hf://jane/student", fit="resize")(numpy.zeros((48, 48, 3), numpy.uint8)).mask
print(mask.shape, "torch" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.stdout.strip() == "(48, 48) False", process.stderr


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_repositories_without_a_file_of_this_package_are_refused(folder, hub):
    hub.repositories["jane/pickle"] = type(hub.repositories["jane/student"])()
    hub.repositories["jane/pickle"].commit("main", {"pytorch_model.bin": pickle.dumps(Payload())})
    with pytest.raises(FileNotFoundError, match="hf://jane/pickle has no model.safetensors. .* pickles are not loaded"):
        bpkd_sdk.load_model("hf://jane/pickle")
    with pytest.raises(FileNotFoundError, match="has no model.onnx"):
        open_runtime("hf://jane/pickle")
    foreign = {"model.safetensors": save({"a": torch.zeros(1)}), "config.json": b'{"auto_map": {"AutoModel": "x.X"}}'}
    hub.repositories["jane/pickle"].commit("foreign", foreign)
    with pytest.raises(ValueError, match="^hf://jane/pickle@foreign: .* no bpkd-sdk header"):
        bpkd_sdk.load_model("hf://jane/pickle@foreign")
    claims = {"model.safetensors": (folder / "model.safetensors").read_bytes()}
    claims["README.md"] = b"---\nlicense: !!python/object/apply:pytest.fail [executed]\n---\n{{ cycler.__init__ }}"
    hub.repositories["jane/pickle"].commit("claims", claims)
    assert "license" not in bpkd_sdk.load_model("hf://jane/pickle@claims").provenance["weights"]
    for address, message in {
        "hf://jane/nothing": "there is no such repository, or it is private",
        "hf://jane/student@nowhere": "has no such revision",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            bpkd_sdk.load_model(address)
    with pytest.raises(ValueError, match="address of a repository like 'hf://user/name'"):
        bpkd_sdk.load_model("hf://student")


def test_a_distilled_network_starts_from_the_hub(folder, hub, tmp_path):
    options = {"steps": 1, "batch_size": 2, "crop_size": SIZE, "device": "cpu", "check_data": False}
    data = ShapesDataset("train", length=2)
    again = bpkd_sdk.distill(
        "hf://jane/student", "hf://jane/student", data, check_teacher=False, output_dir=tmp_path / "run", **options
    )
    for role in ("student", "teacher"):
        assert again.model.provenance["origin"][role]["weights"]["source"] == "hf://jane/student"
    other = tiny(3).eval()
    other.provenance = again.model.provenance
    shared = bpkd_sdk.save_pretrained(other, tmp_path / "shared", input_size=SIZE, license="mit")
    card = ModelCard.load(shared / "README.md")
    assert card.data.base_model == ["jane/student"]
    assert "| this network | `hf://jane/student` |" in card.text
    assert "`cc-by-4.0`" in card.text
    assert "no scores were measured" in card.text
    assert card.data.eval_results is None


def test_the_card_states_scores_origin_and_limits(run, folder):
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "cc-by-4.0",
        "image-segmentation",
        "bpkd-sdk",
    )
    assert {"knowledge-distillation", "bpkd"} <= set(card.data.tags)
    metrics = bpkd_sdk.evaluate(run.model, VAL)
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["mean_iou"].metric_value == pytest.approx(metrics.miou)
    assert results["boundary_iou"].metric_value == pytest.approx(metrics.boundary_iou)
    assert results["mean_iou"].dataset_name == VAL.name
    assert f"| mean boundary IoU | {metrics.boundary_iou:.4f} |" in card.text
    assert "by bpkd_sdk.evaluate with model.safetensors on 2 images of `shapes/val`, whole images." in card.text
    assert "distilled by `BPKD` from the teacher `smp/Unet/tu-test_resnet`" in card.text
    assert "| steps | `1 of 1` |" in card.text
    assert "| crop | `64x64` |" in card.text
    for name in VAL.class_names:
        assert f"| `{name}` |" in card.text
    pictures = re.findall(r"!\[\w+\]\(([^)]+)\)", card.text)
    assert len(pictures) == 2
    for picture in (*pictures, *(entry["src"] for entry in card.data.widget)):
        assert Image.open(folder / picture).size[0] == PHOTO.shape[1]
    assert np.array_equal(np.asarray(Image.open(folder / pictures[0])), PHOTO)


def test_the_code_in_the_card_runs(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PHOTO).save("photo.jpg", quality=100)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    scope = {}
    for block in blocks:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(block, scope)  # noqa: S102
    assert scope["masks"].shape == (1, *SIZE)
    assert len(blocks[0].splitlines()) <= 12
    assert scope["prediction"].mask.shape == PHOTO.shape[:2]


def test_no_file_contains_a_local_path(run, folder):
    place = run.output_dir.parent
    assert str(place) in json.dumps(run.model.provenance)  # the path of the teacher's file
    header = read_header(folder / "model.safetensors")
    assert header["training"]["origin"]["teacher"]["file"] == "teacher.safetensors"
    secrets = [place.name, str(place.parent), str(Path.cwd()), str(Path(torch.__file__).parent), TOKEN]
    secrets += [str(Path.home())] if len(Path.home().parts) > 2 else []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content, (path, secret)
    assert getpass.getuser() not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/jane doe/runs/teacher.pth", "teacher.pth"),
        (r"C:\Users\jane\teacher.pth", "teacher.pth"),
        (r"\\server\share\teacher.pth", "teacher.pth"),
        ("~/runs/segformer/", "segformer"),
        ("../jane/teacher", "teacher"),
        ("runs/jane/teacher.safetensors", "teacher.safetensors"),
        ("triton://10.0.0.7:8000/city", "city"),
        ("https://jane:secret@host/a/b.pth?token=secret", "https://host/a/b.pth"),
        ("bpkd from /home/jane/a.pth, step 3", "bpkd from a.pth, step 3"),
        ("smp/Unet/tu-resnet18", "smp/Unet/tu-resnet18"),
        ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("hf://jane/student", "hf://jane/student"),
        ("shapes/train", "shapes/train"),
        ("torchvision, ImageNet", "torchvision, ImageNet"),
    ],
)
def test_paths_become_names(text, expected):
    assert remove_paths({"a": [{"b": text}]}) == {"a": [{"b": expected}]}
    assert remove_paths({"class_names": ["/m/01g317"]}) == {"class_names": ["/m/01g317"]}


def test_networks_of_the_users_class_are_shared_too(tmp_path):
    own = tiny(3).eval()
    own.spec = bpkd_sdk.NetworkSpec(None, 3, class_names=("a|b", "<script>", "c`d"))
    own.provenance = {"notes": f"trained in {tmp_path}/jane", "lr": 0.1}
    shared = bpkd_sdk.save_pretrained(own, tmp_path / "a", input_size=SIZE, license="other", dynamic_size=True)
    text = (shared / "README.md").read_text()
    assert "an instance of torch.nn.modules.container.Sequential" in text
    assert "does not state how the network was trained" in text
    assert "| `a\\|b` |" in text
    assert "`c'd`" in text
    assert "uint8 (N, height, width, 3)" in text
    assert bpkd_sdk.Predictor(shared)(PHOTO[:48]).mask.shape == (48, 128)
    assert own.provenance["notes"] == f"trained in {tmp_path}/jane"
    assert bpkd_sdk.load_model(shared, model=tiny(3, seed=1)).provenance["notes"] == "trained in jane"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"license": "Apache-2.0"}, ValueError, "identifier of the Hub in lower case"),
        ({"license": None}, ValueError, "identifier of the Hub"),
        ({"examples": "a.jpg"}, TypeError, "list of images"),
        ({"private": True}, ValueError, "applies to a repository on the Hub"),
        ({"push_to_hub": "student"}, ValueError, "address of a repository like"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        bpkd_sdk.save_pretrained(tmp_path / "none", tmp_path / "a", input_size=SIZE, **{"license": "mit", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_as_a_whole_and_other_files_are_never_lost(tmp_path, monkeypatch):
    path, own = tmp_path / "a", tiny(3).eval()
    save = lambda network=own, **options: bpkd_sdk.save_pretrained(  # noqa: E731
        network, path, input_size=SIZE, license="mit", **options
    )
    path.mkdir()
    (path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="contains files that save_pretrained did not write"):
        save()
    (path / "README.md").unlink()
    save(examples=[PHOTO])
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    monkeypatch.setattr("bpkd_sdk.pretrained.to_onnx", lambda *_arguments, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tiny(3, seed=1).eval())
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    save(tiny(3, seed=1).eval())
    assert not (path / "pictures").exists()
    assert (path / "model.safetensors").read_bytes() != before[path / "model.safetensors"]
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="contains notes.txt, which save_pretrained did not write"):
        save()


def test_uploads_that_the_hub_refuses_state_the_cure_and_keep_the_folder(hub, folder, tmp_path, monkeypatch):
    def push(repository):
        network = tiny(2).eval()
        bpkd_sdk.save_pretrained(network, tmp_path / "a", input_size=SIZE, license="mit", push_to_hub=repository)

    with pytest.raises(RuntimeError, match=r"denies access \(403\).*hf auth login.*\n.*complete: `hf upload other/a"):
        push("other/a")
    assert (tmp_path / "a" / "README.md").is_file()
    with pytest.raises(ValueError, match="exists and is public, but got private=True"):
        upload(folder, "jane/student", private=True)
    upload(folder, "jane/secret", private=True)
    assert hub.repositories["jane/secret"].private
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    before = len(hub.repositories)
    with pytest.raises(RuntimeError, match=r"denies access \(401\)"):
        push("jane/b")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(RuntimeError, match="no token for the Hub"):
        push("jane/b")
    assert len(hub.repositories) == before


def test_the_command_writes_the_scores_of_training_and_other_commands_read_the_hub(run, hub, bpkd, tmp_path):
    arguments = ("share", run.checkpoint, tmp_path / "a", "--input-size", "64x64", "--license")
    code, out, _ = bpkd(*arguments, "mit", "--push", "jane/command")
    assert code == 0
    assert "hf://jane/command" in out
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert f"| mean IoU | {run.metrics.miou:.4f} |" in card.text
    assert "Measured by the training run on 2 images of `shapes/val`, whole images." in card.text
    assert "validation in training, which may have been used to choose settings" in card.text
    assert same_weights(bpkd_sdk.load_model(tmp_path / "a"), run.model)
    code, out, _ = bpkd("profile", "hf://jane/command", "--input-size", "64x64")
    assert code == 0
    code, _, error = bpkd("export", "hf://jane/command", tmp_path / "m.onnx")
    assert f"For example: bpkd export hf://jane/command {tmp_path / 'm.onnx'} --input-size 512x512" in error
    code, _, error = bpkd("export", "hf://jane/command", tmp_path / "m.onnx", "--input-size", "64x64")
    assert (code, (tmp_path / "m.onnx").is_file()) == (0, True), error
    code, _, error = bpkd(*arguments, "MIT")
    assert code != 0
    assert "in lower case" in " ".join(error.split())
