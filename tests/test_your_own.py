"""The programs of docs/your-own.md run as they stand there.

Only what takes time or a connection is replaced: every run has two steps of two images, encoders are small and start from
random weights, and the second process of a GPU is one of the CPU. The files have the names that the programs use.
"""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import bpkd_sdk
from bpkd_sdk.models import create_model, set_spec
from bpkd_sdk.training.config import TrainingConfig
from tests.conftest import ROOT
from tests.programs import read_programs
from tests.scenes import NAMES, save, scene, write_folder

PAGE = ROOT / "docs" / "your-own.md"
RECIPES = read_programs(PAGE)
RANDOM = {"backbone_weights": "none"}
FEW = {"steps": 2, "batch_size": 2, "device": "cpu", **RANDOM}
ENCODERS = re.compile(r"(?<=/)(mobilenet_v2|resnet18)\b")  # of segmentation-models-pytorch: test_smp.py has these
SMALL = "tu-test_resnet"

pytestmark = [
    pytest.mark.filterwarnings("ignore::bpkd_sdk.training.teacher_check.TeacherWarning"),
    pytest.mark.filterwarnings("ignore:At step"),
]


def save_network(path, names=(), count=3):
    torch.manual_seed(0)
    network = create_model(f"smp/FPN/{SMALL}", count).eval()
    set_spec(network, replace(network.spec, class_names=tuple(names)))
    bpkd_sdk.save_model(network, path)


def write_fields(folder):
    for split, start in (("train", 0), ("val", 100)):
        (folder / "fields" / split).mkdir(parents=True)
        for index in range(4):
            image, mask = scene(start + index)
            np.savez(folder / "fields" / split / f"{index}.npz", image=image, mask=mask)


def save_white(label, path, _index):
    save(np.where(label, 255, 0).astype(np.uint8), path)


def write_satellite(root):
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for index in range(4):
            image, label = scene(index, 64, 2)
            bands = np.concatenate([image, image[..., :1]], axis=2).astype(np.uint16) * 39
            tifffile.imwrite(root / "images" / split / f"{index}.tif", bands)
            save(label, root / "labels" / split / f"{index}.png")
    classes = re.search(r"`(\{.*?\})`", PAGE.read_text(), re.DOTALL)[1]
    (root / "classes.json").write_text(classes)


def write_coco(folder):
    (folder / "photos").mkdir()
    images, annotations = [], []
    for index in range(20):
        save(scene(index)[0], folder / "photos" / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": 48, "width": 48})
        square = [8, 8, 30, 8, 30, 30, 8, 30]
        annotations.append(
            {"id": index, "image_id": index, "category_id": 1 + index % 2, "iscrowd": 0, "area": 484}
            | {"segmentation": [square], "bbox": [8, 8, 22, 22]}
        )
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def save_segformer(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, mlp_ratios=[1] * 4
    )
    config.id2label = dict(enumerate(NAMES[:3]))
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder / "segformer")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_network(folder / "teacher.safetensors")
    save_network(folder / "student.safetensors", NAMES[:3])
    save_network(folder / "city_teacher.safetensors", ("road", "sidewalk", "car", "person", "sky", "building"), 6)
    write_fields(folder)
    write_folder(folder / "my_data", size=96)
    write_folder(folder / "cracks", ("whole", "crack"), classes=2, label=save_white)
    write_folder(folder / "streets", ("way", "object", "rest"))
    write_satellite(folder / "satellite")
    write_coco(folder)
    save_segformer(folder)
    (folder / "photos_only" / "images" / "train").mkdir(parents=True)
    for index in range(4):
        save(scene(index)[0], folder / "photos_only" / "images" / "train" / f"{index}.png")
    (folder / "photos_only" / "classes.json").write_text(json.dumps(NAMES[:3]))
    Image.fromarray(scene(7, 120)[0]).save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("title", RECIPES)
def test_program(title, files, bpkd, monkeypatch):
    if title == "Albumentations":
        pytest.importorskip("albumentations")
    original = TrainingConfig.from_options
    monkeypatch.setattr(TrainingConfig, "from_options", lambda options: original({**options, **FEW}))
    monkeypatch.setattr(
        bpkd_sdk, "create_model", lambda *arguments, **options: create_model(*arguments, **{**options, **RANDOM})
    )
    monkeypatch.chdir(files)
    for language, text in RECIPES[title]:
        code = ENCODERS.sub(SMALL, text)
        if language == "python":
            exec(compile(code, title, "exec"), {"__name__": "recipe"})  # noqa: S102
            continue
        for command in filter(None, code.replace("\\\n", "").splitlines()):
            name, *arguments = shlex.split(command)
            if name == "bpkd":
                status, _, errors = bpkd(*arguments)
                assert status == 0, errors
            else:
                run_processes(name, arguments)


def run_processes(name, arguments):
    """Run `accelerate launch` with processes on the CPU."""
    changed = {"--batch-size": "2", "--steps": "2"}
    launch, *values = [changed.get(before, value) for before, value in zip(["", *arguments], arguments, strict=False)]
    launcher = [sys.executable, "-m", f"{name}.commands.{launch}", "--multi_gpu", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launcher, *values, "--device", "cpu", "--backbone-weights", "none"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_page_has_ten_programs():
    assert len(RECIPES) == 10
