"""Teachers that run at their own scale and on augmented images: `teacher_scale` and `teacher_augment`."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bpkd_sdk
from bpkd_sdk.models import set_spec
from bpkd_sdk.spec import NetworkSpec
from bpkd_sdk.training.teacher import add_views, teacher_logits
from bpkd_sdk.views import ViewedNetwork
from tests.networks import tiny
from tests.scenes import Scenes
from tests.training.test_exported_teacher import OneShape, assert_taught_alike, foreign
from tests.training.test_other_classes import Recorder

IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
RAW = (255 * IMAGES).byte()
DATA = Scenes((0, 1, 2), length=4)
OPTIONS = {"batch_size": 2, "crop_size": (32, 32), "device": "cpu", "check_data": False, "log_every": 1, "steps": 2}


def resized(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def distilled(teacher, folder, **options):
    return bpkd_sdk.distill(teacher, tiny(3), (DATA, None), output_dir=folder, **OPTIONS | options)


def test_a_scaled_teacher_sees_larger_images():
    teacher = tiny(5, seed=1).eval()
    logits = add_views(teacher, 1.5)(IMAGES).logits
    assert logits.shape == (2, 5, 12, 18)  # the losses resize it to the student's size
    torch.testing.assert_close(logits, teacher(resized(IMAGES, (48, 72))))
    assert add_views(teacher, 1.0) is teacher


def test_scaled_logits_are_those_of_the_same_places():
    pointwise = nn.Conv2d(3, 5, 1).eval()
    ramp = torch.linspace(0, 1, 48).expand(1, 3, 32, 48)
    logits = resized(add_views(pointwise, 2.0)(ramp).logits, (32, 48))
    torch.testing.assert_close(logits[..., 1:-1], pointwise(ramp)[..., 1:-1])  # nothing moves; the edge is clamped


def test_sizes_are_rounded_to_the_divisor_of_the_teacher():
    teacher, sizes = tiny(3).eval(), []
    set_spec(teacher, NetworkSpec(None, 3, size_divisor=32))
    teacher.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    add_views(teacher, 1.4, (0.5,))(torch.rand(1, 3, 64, 96))
    assert sizes == [(32, 64), (96, 128)]  # 44.8 x 67.2, then 89.6 x 134.4; the main view comes last


def test_views_are_averaged_as_probabilities():
    teacher = tiny(5, seed=1).double().eval()
    images = IMAGES.double()
    half = F.interpolate(images, (16, 24), mode="bilinear", align_corners=False, antialias=True)
    views = [
        teacher(images),
        teacher(images.flip(3)).flip(3),
        resized(teacher(half), (8, 12)),
        resized(teacher(half.flip(3)).flip(3), (8, 12)),
    ]
    expected = sum(view.softmax(1) for view in views) / 4
    logits = add_views(teacher, 1.0, ("flip", 0.5))(images).logits
    torch.testing.assert_close(logits.softmax(1), expected, rtol=1e-5, atol=1e-7)  # scaled views are float32
    level = sum(view.logsumexp(1) for view in views) / 4
    torch.testing.assert_close(logits.logsumexp(1), level, rtol=1e-5, atol=1e-6)


def test_an_equivariant_network_has_the_same_logits_with_flips():
    pointwise = nn.Conv2d(3, 5, 1).double().eval()
    images = IMAGES.double()
    viewed = add_views(pointwise, 1.0, ("flip",))(images).logits
    torch.testing.assert_close(viewed, pointwise(images), rtol=1e-12, atol=1e-14)
    one_logit = nn.Conv2d(3, 1, 1).double().eval()
    viewed = add_views(one_logit, 1.0, ("flip",))(images).logits
    torch.testing.assert_close(viewed, one_logit(images), rtol=1e-12, atol=1e-14)


class Scaled(nn.Module):
    """A teacher that resizes its images itself."""

    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, images):
        return self.network(F.interpolate(images, scale_factor=self.factor, mode="bilinear", align_corners=False))


@pytest.mark.parametrize("method", ["bpkd", "canonical"])  # without and with features
def test_a_scaled_teacher_teaches_as_one_that_resizes_by_itself(tmp_path, method):
    options = {"method": method, "check_teacher": False}
    ours = distilled(tiny(3, seed=1).eval(), tmp_path / "scale", teacher_scale=1.5, **options)
    by_itself = Scaled(tiny(3, seed=1), 1.5).eval()
    theirs = distilled(by_itself, tmp_path / "own", teacher_feature="network.6:input", **options)
    assert_taught_alike(ours, theirs)
    facts = json.loads((tmp_path / "scale" / "run.json").read_text())
    assert facts["teacher"]["class"] == "torch.nn.modules.container.Sequential"
    assert facts["config"]["teacher_scale"] == 1.5


def test_features_are_those_of_the_view_without_augmentation(tmp_path):
    method = bpkd_sdk.CanonicalKDLoss(logit_weight=0, feature_weight=1)
    terms = [
        distilled(
            tiny(3, seed=1).eval(), tmp_path / str(len(augment)), method=method, teacher_augment=augment, steps=1,
            check_teacher=False,
        ).history[0]["terms"]
        for augment in ((), ("flip", 0.5))
    ]  # fmt: skip
    assert terms[0] == pytest.approx(terms[1])


def test_labels_and_validation_use_the_views_of_the_teacher(tmp_path):
    teacher, method = tiny(3, seed=1).eval(), Recorder()
    val = Scenes((0, 1, 2), start=100, length=2)
    options = {"labels": "teacher", "teacher_scale": 2.0, "teacher_augment": ("flip",), "check_teacher": False}
    run = bpkd_sdk.distill(
        teacher, tiny(3), (DATA, val), method=method, output_dir=tmp_path, **OPTIONS | options | {"steps": 1}
    )
    _, logits, labels = method._seen[-1]
    assert torch.equal(labels[labels != 255], resized(logits, (32, 32)).argmax(1)[labels != 255])
    viewed = add_views(teacher, 2.0, ("flip",))
    assert isinstance(viewed, ViewedNetwork)
    assert run.metrics.miou == pytest.approx(bpkd_sdk.evaluate(run.model, val, reference=viewed).miou)


def test_exported_files_are_scaled_too(tmp_path):
    network = foreign(tmp_path / "teacher.onnx")
    from bpkd_sdk.training.teacher import open_onnx_teacher

    runtime = add_views(open_onnx_teacher(tmp_path / "teacher.onnx", torch.device("cpu")), 1.5, ("flip",))
    set_spec(network, NetworkSpec(None, 9))
    module = add_views(network, 1.5, ("flip",))
    expected = module(module.spec.normalize(RAW)).logits
    # A file gets whole numbers, as all images that are resized here.
    torch.testing.assert_close(teacher_logits(runtime, RAW), expected, rtol=1e-2, atol=1e-2)
    assert runtime.logits(RAW).shape == (2, 9, 32, 48)


def test_scales_that_a_file_cannot_run_at_are_refused(tmp_path):
    teacher = OneShape(tiny(3, seed=1).eval())
    options = {"check_teacher": False, "crop_size": None}
    with pytest.raises(ValueError, match=r"1.5 times the size of an image, but Sequential accepts sides of 32 pixels"):
        distilled(teacher, tmp_path / "run", teacher_scale=1.5, **options)
    with pytest.raises(ValueError, match=r"at 1.0, 0.5 times the size .* dynamic_size=True"):
        distilled(teacher, tmp_path / "run", teacher_augment=("flip", 0.5), **options)
    assert not (tmp_path / "run").exists()
    assert distilled(teacher, tmp_path / "flip", teacher_augment=("flip",), **options).history
    runtime = add_views(teacher, 2.0)
    assert runtime.accepts.fixed_size == (16, 16)  # the only size of images that fits


@pytest.mark.parametrize(
    "augment", ["flip", ("flop",), ("flip", "flip"), (0.0,), (1.0,), (float("nan"),), (True,), 0.75, ("0.75",)]
)
def test_other_augmentations_are_refused(augment):
    with pytest.raises(ValueError, match='Expected `teacher_augment` to be a tuple of "flip" and scales above 0'):
        bpkd_sdk.TrainingConfig(teacher_augment=augment)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), "1.5"])
def test_other_scales_are_refused(scale):
    with pytest.raises(ValueError, match="Expected `teacher_scale` to be (a number|above 0), but got"):
        bpkd_sdk.TrainingConfig(teacher_scale=scale)
    with pytest.raises(ValueError, match="teacher_scale=2.0 needs a teacher"):
        bpkd_sdk.train(tiny(3), DATA, teacher_scale=2.0)
