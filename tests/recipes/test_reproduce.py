"""Smoke runs of all rows of the table, with random teacher weights and miniature data sets.

The networks have fewer blocks than the paper's: the depth changes none of what these tests check.
"""

import json
import shutil
from functools import cache

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import bpkd_sdk
from bpkd_sdk.data import open_dataset
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.models.checkpoint import read_tensors
from bpkd_sdk.models.zoo import build_network
from bpkd_sdk.recipes import RECIPES, estimate, find_recipe, make_plan, reproduce, score_checkpoint
from tests import trees
from tests.networks import shallow_zoo

SMALL = {"batch_size": 2, "crop_size": (32, 32), "base_size": (48, 32), "device": "cpu"}
SLIDING = SMALL | {"base_size": (520, 520)}  # for the rows that slide a window: 260x520, two windows
TREES = {"cityscapes": trees.cityscapes, "ade20k": trees.ade20k, "pascal_context_59": trees.pascal_context}

pytestmark = pytest.mark.filterwarnings("ignore:The student's backbone has random weights")


@pytest.fixture(scope="module", autouse=True)
def _shallow():
    with shallow_zoo():
        yield


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: build_tree(folder / name, size=(32, 64)) for name, build_tree in TREES.items()}


def options_of(recipe):
    return SLIDING if recipe.protocol.crop_size else SMALL


@cache
def network(name):
    return build_network(name, 1).eval()


def teacher_of(recipe):
    """The same network for all data sets, with a new classifier for each."""
    teacher = network(recipe.teacher)
    teacher.decode_head.conv_seg = nn.Conv2d(teacher.decode_head.conv_seg.in_channels, recipe.num_classes, 1).eval()
    return teacher


# The other rows combine the same networks, data sets and protocols. Cityscapes has a narrower DeepLabV3+.
QUICK = {*(name for name in RECIPES if name.startswith("cityscapes/") or name.endswith("/hrnetv2p_w18s"))}
QUICK |= {"ade20k/deeplabv3plus_mv2"}
BY_COST = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]


@pytest.mark.parametrize("row", BY_COST)
def test_a_smoke_run_of_every_row(row, roots, tmp_path):
    recipe = find_recipe(row)
    result = reproduce(
        row, roots[recipe.dataset], teacher=teacher_of(recipe), limit_steps=1, output_dir=tmp_path, **options_of(recipe)
    )
    assert result.metrics.images == 2
    assert len(result.metrics.per_class_iou) == recipe.num_classes
    report = json.loads((tmp_path / "reproduction.json").read_text())
    assert (report["row"], report["smoke_run_of_steps"]) == (row, 1)
    assert report["ours"]["miou"] == 100 * result.metrics.miou
    assert report["paper"] == {"miou": recipe.paper["bpkd"].miou, "macc": recipe.paper["bpkd"].macc}
    assert result.seconds_per_step > 0
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert history[-1]["metrics"] == report["metrics"]
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()


@pytest.fixture(scope="module")
def student(roots, tmp_path_factory):
    """The smallest student, trained without a teacher."""
    folder = tmp_path_factory.mktemp("run")
    return reproduce(
        "pascal_context_59/hrnetv2p_w18s",
        roots["pascal_context_59"],
        method="none",
        limit_steps=1,
        output_dir=folder,
        **SLIDING,
    )


def test_a_checkpoint_is_scored_by_the_rows_protocol(student, roots):
    assert student.plan.paper.miou == 40.62
    data = open_dataset("pascal_context_59", root=roots["pascal_context_59"], split="val")
    settings = {"crop_size": (512, 512), "stride": (320, 320)}
    expected = bpkd_sdk.evaluate(
        student.checkpoint, data, protocol=EvaluationProtocol(base_size=(520, 520), **settings), device="cpu"
    ).to_dict()
    assert student.metrics.to_dict() == expected
    assert (
        bpkd_sdk.evaluate(
            student.checkpoint, data, protocol=EvaluationProtocol(base_size=(520, 520)), device="cpu"
        ).to_dict()
        != expected
    )
    row, root = "pascal_context_59/hrnetv2p_w18s", roots["pascal_context_59"]
    with pytest.warns(
        UserWarning, match="2 images, but a complete copy has 5104. This is the score on part of the data"
    ):
        assert score_checkpoint(row, root, student.checkpoint, device="cpu").to_dict() == expected


def test_the_best_checkpoint_is_chosen_by_the_rows_protocol(student, roots):
    best = student.output_dir / "best.safetensors"
    assert student.metrics.to_dict() == read_tensors(best)[0]["training"]["metrics"]


@pytest.mark.filterwarnings("ignore:At step 1 the term 'feature'")
def test_a_teacher_in_a_file(roots, tmp_path):
    row = "cityscapes/hrnetv2p_w18s"
    teacher, folder = build_network("hrnetv2p_w48", 19).eval(), tmp_path / "run"
    bpkd_sdk.save_model(teacher, tmp_path / "teacher.safetensors")
    terms = []
    for given in (tmp_path / "teacher.safetensors", teacher):
        reproduce(
            row, roots["cityscapes"], teacher=given, method="cwd_paper", limit_steps=1, output_dir=folder, **SMALL
        )
        terms.append(json.loads((folder / "history.jsonl").read_text().splitlines()[0])["terms"])
        shutil.rmtree(folder)
    assert terms[0] == pytest.approx(terms[1], rel=1e-4)
    assert terms[0].keys() == {"ce", "logit", "feature"}
    (tmp_path / "teacher.safetensors").unlink()


def test_a_finished_run_is_not_trained_again(student, roots):
    options = SLIDING | {"method": "none", "limit_steps": 1, "output_dir": student.output_dir}
    root = roots["pascal_context_59"]
    with pytest.raises(FileExistsError, match="resume=True"):
        reproduce("pascal_context_59/hrnetv2p_w18s", root, **options)
    before = student.checkpoint.read_bytes()
    again = reproduce("pascal_context_59/hrnetv2p_w18s", root, resume=True, **options)
    assert student.checkpoint.read_bytes() == before
    assert again.metrics.to_dict() == student.metrics.to_dict()


def test_equal_seeds_give_equal_weights(student, roots, tmp_path):
    options = SLIDING | {"method": "none", "limit_steps": 1, "output_dir": tmp_path}
    again = reproduce("pascal_context_59/hrnetv2p_w18s", roots["pascal_context_59"], **options)
    first, second = (read_tensors(run.checkpoint)[1] for run in (student, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_missing_data_and_files_are_reported_before_training(roots, tmp_path):
    with pytest.raises(FileNotFoundError, match="cityscapes-dataset.com"):
        reproduce("cityscapes/pspnet_r18", tmp_path, output_dir=tmp_path / "run", **SMALL)
    with pytest.raises(ValueError, match=r"ade20k/train in .*: 2 images, but a complete copy has 20210.*limit_steps"):
        reproduce("ade20k/hrnetv2p_w18s", roots["ade20k"], output_dir=tmp_path / "run", **SMALL)
    options = {"limit_steps": 1, "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match="2 images, too few for a batch of 8"):
        reproduce("ade20k/hrnetv2p_w18s", roots["ade20k"], method="none", device="cpu", **options)
    with pytest.raises(ValueError, match="needs its teacher"):
        reproduce("ade20k/hrnetv2p_w18s", roots["ade20k"], **options, **SMALL)
    assert not (tmp_path / "run").exists()


def test_the_estimate_counts_networks_and_scales_the_timed_step():
    small = {"crop_size": (128, 128), "device": "cpu"}
    one = estimate(make_plan("cityscapes/hrnetv2p_w18s", "none", batch_size=1, **small))
    two = estimate(make_plan("cityscapes/hrnetv2p_w18s", "none", batch_size=2, **small))
    with torch.device("meta"):
        cost = bpkd_sdk.profile(build_network("hrnetv2p_w18s", 19), (128, 128))
    assert (one.step_macs, two.step_macs) == (3 * cost.macs, 6 * cost.macs)
    assert one.weight_bytes == two.weight_bytes == 12 * cost.params
    assert two.activation_bytes == 2 * one.activation_bytes > 2 * cost.activation_bytes
    assert one.processes == 1
    assert one.seconds_per_step > 0
    assert "2 images of 32x32 on cpu" in one.timed


def test_processes_share_the_images_of_a_step(monkeypatch):
    plan = make_plan("cityscapes/hrnetv2p_w18s", "none", batch_size=4, crop_size=(64, 64), device="cpu")
    one = estimate(plan)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    monkeypatch.setitem(estimate.__globals__, "_time_step", lambda *_: (3.0, "not timed"))
    two = estimate(plan)
    assert (two.processes, two.seconds_per_step) == (2, 6.0)
    assert (two.step_macs, two.weight_bytes) == (one.step_macs, one.weight_bytes)
    assert 2 * two.activation_bytes == one.activation_bytes
