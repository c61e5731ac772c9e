"""Tests of the table: its rows, their settings against the released configurations, plans for all methods."""

import dataclasses
import itertools

import pytest

from bpkd_sdk.data import DATASETS
from bpkd_sdk.losses import METHODS, BPKDLoss, CIRKDLoss, CWDLoss, IFVDLoss, SKDSLoss
from bpkd_sdk.losses.method import method_arguments
from bpkd_sdk.models import ZOO
from bpkd_sdk.recipes import RECIPES, describe_plan, find_recipe, make_plan
from bpkd_sdk.training.config import TrainingConfig

PAIRS = {
    "pspnet_r18": "pspnet_r101",
    "hrnetv2p_w18s": "hrnetv2p_w48",
    "deeplabv3plus_mv2": "deeplabv3plus_r101",
    "isanet_r18": "isanet_r101",
}
CLASSES = {"cityscapes": 19, "ade20k": 150, "pascal_context_59": 59}


def test_each_pair_has_a_row_for_each_data_set():
    assert set(RECIPES) == {f"{dataset}/{student}" for dataset, student in itertools.product(CLASSES, PAIRS)}
    for recipe in RECIPES.values():
        dataset, student = recipe.name.split("/")
        assert (recipe.dataset, recipe.num_classes) == (dataset, CLASSES[dataset])
        assert dataset in DATASETS
        assert recipe.teacher == PAIRS[student]
        assert recipe.student in (student, *(name for name, entry in ZOO.items() if entry.variant_of == student))


def test_the_papers_order_holds_in_every_row():
    """The teacher is better than BPKD, BPKD than the other methods, and these than the student alone."""
    for recipe in RECIPES.values():
        others = [recipe.paper[method].miou for method in ("skds", "ifvd", "cirkd", "cwd")]
        assert recipe.paper["teacher"].miou > recipe.paper["bpkd"].miou > max(others), recipe.name
        assert min(others) > recipe.paper["none"].miou, recipe.name
        assert all(score.macc > score.miou for score in recipe.paper.values())


@pytest.mark.parametrize(
    ("dataset", "crop", "base", "batch", "rate", "decay"),
    [
        ("cityscapes", (512, 1024), (2048, 1024), 8, 0.01, 5e-4),
        ("ade20k", (512, 512), (2048, 512), 8, 0.01, 5e-4),
        ("pascal_context_59", (480, 480), (520, 520), 16, 0.004, 1e-4),
    ],
)
def test_training_settings_of_the_released_configurations(dataset, crop, base, batch, rate, decay):
    for student in PAIRS:
        config = make_plan(f"{dataset}/{student}").config
        assert (config.steps, config.optimizer, config.poly_power) == (80_000, "sgd", 0.9)
        assert (config.crop_size, config.base_size, config.batch_size) == (crop, base, batch)
        assert (config.learning_rate_at(0), config.weight_decay) == (rate, decay)
        assert (config.scale, config.max_class_share, config.aux_weight) == ((0.5, 2.0), 0.75, 0.4)
        # OpenMMLab: (rate - lowest) * (1 - step / steps) ** power + lowest
        assert config.learning_rate_at(60_000) == pytest.approx((rate - 1e-4) * 0.25**0.9 + 1e-4)


def test_only_two_rows_slide_a_window():
    windows = {row: recipe.protocol.crop_size for row, recipe in RECIPES.items() if recipe.protocol.crop_size}
    assert windows == {"pascal_context_59/pspnet_r18": (480, 480), "pascal_context_59/hrnetv2p_w18s": (512, 512)}
    for recipe in RECIPES.values():
        assert recipe.protocol.base_size == recipe.base_size
        assert recipe.protocol.stride == ((320, 320) if recipe.name in windows else None)


@pytest.mark.parametrize("row", RECIPES)
def test_every_row_resolves_with_every_method(row):
    for method in METHODS:
        plan = make_plan(row, method)
        recipe = plan.recipe
        assert plan.create_method().num_classes == recipe.num_classes
        assert (plan.paper is None) == (method in ("canonical", "dist"))
        assert all(word in " ".join(describe_plan(plan).values()) for word in (recipe.teacher, recipe.student, "80000"))
    assert make_plan(row, "none").paper == recipe.paper["none"]
    assert make_plan(row, "none").create_method() is None


@pytest.mark.parametrize("kind", [BPKDLoss, CWDLoss, SKDSLoss, IFVDLoss, CIRKDLoss])
def test_published_weights_have_a_separate_name(kind):
    name = next(name for name, method in METHODS.items() if method is kind)
    ours, published = (make_plan("ade20k/pspnet_r18", method) for method in (name, f"{name}_paper"))
    assert published.paper == ours.paper == published.recipe.paper[name]
    assert method_arguments(published.create_method())["weights"] == method_arguments(kind.paper(150))["weights"]
    assert method_arguments(ours.create_method())["weights"] == method_arguments(kind(150))["weights"]
    assert describe_plan(ours)["method"].startswith(f"{name}, this package's weights: class {kind.__name__}")
    assert describe_plan(published)["method"].startswith(f"{name}_paper, published weights: class {kind.__name__}")


def test_addresses_of_teachers_match_their_rows():
    """Names of OpenMMLab's files contain the data set and the network."""
    words = {"cityscapes": "cityscapes", "ade20k": "ade20k", "pascal_context_59": "pascal_context_59"}
    networks = {"pspnet_r101": "pspnet_r101", "hrnetv2p_w48": "fcn_hr48", "deeplabv3plus_r101": "deeplabv3plus_r101", "isanet_r101": "isanet"}  # fmt: skip
    for recipe in RECIPES.values():
        file = recipe.teacher_source.rsplit("/")[-1]
        assert words[recipe.dataset] in file
        assert networks[recipe.teacher] in file
        assert file.endswith(".pth")


def test_options_replace_those_of_the_row():
    plan = make_plan("ade20k/isanet_r18", "cwd", limit_steps=3, batch_size=2, base_size=(96, 64), precision="bf16")
    assert (plan.config.steps, plan.config.batch_size, plan.config.precision) == (3, 2, "bf16")
    assert plan.protocol.base_size == (96, 64)
    assert "3 steps (a smoke run)" in describe_plan(plan)["schedule"]


def test_the_description_contains_every_option():
    """Options without a sentence are listed by name, so that a new option cannot be forgotten."""
    plain = describe_plan(make_plan("ade20k/isanet_r18"))
    changes = {
        "steps": 7, "batch_size": 2, "accumulate": 2, "crop_size": (64, 32), "learning_rate": 0.5, "optimizer": "adamw",
        "weight_decay": 0.125, "poly_power": 2.0, "final_learning_rate": 1e-3, "learning_rate_warmup": 11,
        "method_warmup": 12, "gradient_clip": 13.0, "scale": (0.25, 4.0), "base_size": (96, 64),
        "max_class_share": 0.5, "student_feature": "neck", "teacher_feature": "head", "aux_weight": 0.75,
        "backbone_weights": "none", "losses": ("ce", "dice"), "class_weights": "balanced", "freeze_encoder_steps": 14,
        "teacher_scale": 1.5, "teacher_augment": ("flip",),
        "precision": "bf16", "teacher_precision": "fp16", "teacher_mean": (0.1,) * 3, "teacher_std": (0.2,) * 3,
        "channels_last": True, "compile": True, "device": "cpu", "workers": 3, "evaluate_every": 123,
        "checkpoint_every": 45, "log_every": 6, "trackers": ("wandb",), "boundary_width": 9, "check_data": False,
        "check_teacher": False, "match_classes": False, "seed": 99, "teacher_cache": "kept",
    }  # fmt: skip
    cached = {"views": 3, "teacher_top_k": 10}  # options that need a cache
    assert {*changes, *cached, "labels"} == {field.name for field in dataclasses.fields(TrainingConfig)}
    for name, value in changes.items():
        assert describe_plan(make_plan("ade20k/isanet_r18", **{name: value})) != plain, name
    plain = describe_plan(make_plan("ade20k/isanet_r18", teacher_cache="kept"))
    for name, value in cached.items():
        assert describe_plan(make_plan("ade20k/isanet_r18", teacher_cache="kept", **{name: value})) != plain, name


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'cityscapes/pspnet_r18'"):
        find_recipe("cityscape/pspnet_r18")
    with pytest.raises(ValueError, match="Did you mean 'bpkd'"):
        make_plan("cityscapes/pspnet_r18", "bpdk")
    with pytest.raises(TypeError, match="Did you mean 'batch_size'"):
        make_plan("cityscapes/pspnet_r18", batchsize=2)
    with pytest.raises(ValueError, match="need the labels of the data set; do not pass labels='teacher'"):
        make_plan("cityscapes/pspnet_r18", labels="teacher")
