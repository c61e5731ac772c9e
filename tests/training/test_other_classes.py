"""Teachers with other classes than the data: class maps in distill and compare, their records, and the teacher check."""

import json
import warnings

import pytest
import torch
from torch import nn

import bpkd_sdk
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.models import get_spec, set_spec
from bpkd_sdk.spec import NetworkSpec
from bpkd_sdk.training.label_losses import LabelLosses
from bpkd_sdk.training.teacher_check import TeacherWarning
from tests.networks import tiny
from tests.scenes import Scenes
from tests.test_class_map import color_network
from tests.training.test_exported_teacher import assert_taught_alike, foreign

DATA, VAL = Scenes((0, 1, 2), length=4), Scenes((0, 1, 2), start=100, length=2)
OPTIONS = {"batch_size": 4, "crop_size": (32, 32), "device": "cpu", "check_data": False, "log_every": 1, "steps": 2}
CLASS_MAP = {"background": "*", "red": ["scarlet", 1], "green": "green"}
IDS = {"background": "*", "red": [1, 4], "green": 2}


def named_teacher():
    """Build a teacher of five classes, with features of its own."""
    teacher = tiny(5, seed=1).eval()
    set_spec(teacher, NetworkSpec(None, 5, class_names=("soil", "crimson", "Green", "sky", "scarlet")))
    return teacher


class MergedByHand(nn.Module):
    """A teacher whose forward pass contains the merging, in float64."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        p = self.network(images).double().exp()
        return torch.stack([p[:, 0] + p[:, 3], p[:, 1] + p[:, 4], p[:, 2]], 1).log().float()


def distilled(teacher, folder, *, data=(DATA, VAL), classes=3, **options):
    return bpkd_sdk.distill(teacher, tiny(classes), data, output_dir=folder, **OPTIONS | options)


@pytest.mark.parametrize("method", ["bpkd", "canonical", "cirkd", "skds"])
def test_a_class_map_teaches_as_a_teacher_that_merges_by_hand(tmp_path, method):
    options = {"method": method, "crop_size": (48, 48), "check_teacher": False, "match_classes": False}
    hand = MergedByHand(named_teacher()).eval()
    ours = distilled(named_teacher(), tmp_path / "map", class_map=CLASS_MAP, **options)
    assert_taught_alike(ours, distilled(hand, tmp_path / "hand", teacher_feature="network.6:input", **options))
    assert get_spec(ours.model).class_names == DATA.class_names


def test_files_teach_other_classes_too(tmp_path):
    network = foreign(tmp_path / "teacher.onnx")  # nine classes without names
    class_map = {"background": "*", "red": [8, 1], "green": [3]}
    options = {"class_map": class_map, "check_teacher": False}
    ours = distilled(tmp_path / "teacher.onnx", tmp_path / "file", labels="teacher", **options)
    assert_taught_alike(ours, distilled(network, tmp_path / "module", labels="teacher", **options))


class Recorder(DistillationLoss):
    """A method that keeps what it was given."""

    name = "recorder"

    def __init__(self):
        super().__init__()
        self._seen = []

    def forward(self, student, teacher, labels):
        self._seen.append((student.logits.detach(), teacher.logits, labels))
        return {"zero": 0 * student.logits.sum()}


def test_a_method_sees_only_the_classes_that_the_teacher_has(tmp_path):
    method = Recorder()
    class_map = {"background": ["soil"], "red": [], "green": ["Green", "sky"]}  # "crimson" and "scarlet" are left out
    teacher = named_teacher()
    run = distilled(teacher, tmp_path, method=method, class_map=class_map, steps=1, scale=(1, 1), check_teacher=False)
    student, logits, labels = method._seen[-1]
    assert student.shape[1] == logits.shape[1] == 2
    assert set(labels.unique().tolist()) == {0, 1, 255}  # red is void, green is the second class
    assert get_spec(run.model).num_classes == 3
    kl = bpkd_sdk.CanonicalKDLoss(logit_weight=1, feature_weight=0)(student.double(), logits.double(), labels)["logit"]
    p = logits.double().softmax(1)
    assert kl.item() == pytest.approx((p * (p.log() - student.double().log_softmax(1))).sum(1).mean().item())


def test_labels_of_a_teacher_are_void_where_it_finds_a_class_that_is_left_out(tmp_path):
    teacher = color_network(("background", "red", "crimson", "green", "lime", "lemon"), (0, 1, 1, 2, 2, 3))
    method = Recorder()
    options = {
        "data": (DATA, None),
        "method": method,
        "labels": "teacher",
        "steps": 1,
        "scale": (1, 1),
        "crop_size": (48, 48),
    }
    seen = {}
    for name, green in (("void", ["lemon"]), ("merged", ["green", "lime"])):
        class_map = {"background": ["background"], "red": ["red", "crimson"], "green": green}
        distilled(teacher, tmp_path / name, class_map=class_map, **options)
        seen[name] = method._seen[-1][2]
    assert set(seen["void"].unique().tolist()) == {0, 1, 255}
    truth = torch.where(seen["merged"] == 2, 255, seen["merged"])
    assert torch.equal(seen["void"], truth)
    assert (truth == 255).sum() > (seen["merged"] == 255).sum()


def test_labels_of_a_teacher_need_a_class_of_the_teacher_for_every_class(tmp_path):
    with pytest.raises(ValueError, match="nothing trains the classes .* of the teacher for: red. Leave them out"):
        distilled(named_teacher(), tmp_path / "run", class_map=CLASS_MAP | {"red": []}, labels="teacher")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pixels_that_the_teacher_makes_void_do_not_count_in_the_cross_entropy(tmp_path, monkeypatch, accumulate):
    seen, forward = [], LabelLosses.forward

    def recorded(losses, logits, labels, labelled_pixels):
        seen.append(((labels != DATA.ignore_index).sum().item(), labels.numel(), labelled_pixels.item()))
        return forward(losses, logits, labels, labelled_pixels)

    monkeypatch.setattr(LabelLosses, "forward", recorded)
    class_map = {"background": ["soil", "sky"], "red": "scarlet", "green": "green"}  # "crimson" is left out
    options = {"labels": "teacher", "class_map": class_map, "transform": "none", "check_teacher": False, "steps": 1}
    distilled(named_teacher(), tmp_path, data=(DATA, None), accumulate=accumulate, **options)
    counts, sizes, divisors = zip(*seen, strict=True)
    assert len(counts) == accumulate
    assert 0 < sum(counts) < sum(sizes)
    assert divisors == pytest.approx([sum(counts) / accumulate] * accumulate)


def test_a_run_with_labels_of_a_teacher_is_validated_against_its_mapped_masks(tmp_path):
    teacher = color_network(("background", "red", "crimson", "green"), (0, 1, 1, 2))
    class_map = {"background": ["background"], "red": ["red", "crimson"], "green": "green"}
    options = {"labels": "teacher", "class_map": class_map, "data": (DATA, VAL)}
    run = distilled(teacher, tmp_path, **options)
    expected = bpkd_sdk.evaluate(run.model, VAL)  # the teacher's masks are the labels
    assert run.metrics.per_class_iou == pytest.approx(expected.per_class_iou, nan_ok=True)


def test_a_teacher_of_more_classes_is_matched_by_name(tmp_path, capsys):
    teacher = tiny(5, seed=1).eval()
    set_spec(teacher, NetworkSpec(None, 5, class_names=("sky", "Green", "car", "red", "soil")))
    data = Scenes((1, 2), length=4), None
    options = {"data": data, "classes": 2, "check_teacher": False, "steps": 1}
    run = distilled(teacher, tmp_path / "names", **options)
    assert "The teacher's 2 classes of scenes are found by name; its 3 others are left out" in capsys.readouterr().err
    class_map = {"red": [3], "green": [1]}
    assert_taught_alike(run, distilled(teacher, tmp_path / "map", class_map=class_map, **options))
    facts = json.loads((tmp_path / "names" / "run.json").read_text())
    assert facts["class_map"] == {"red": ["red"], "green": ["Green"]}
    with pytest.raises(ValueError, match=r"do not have the same classes.*(?s:.)*pass class_map \(--class-map\)"):
        distilled(teacher, tmp_path / "no", classes=3)
    with pytest.raises(ValueError, match=r"The teacher predicts 5 classes, but scenes has 2.* pass class_map"):
        distilled(teacher, tmp_path / "no", match_classes=False, **options)


def test_a_resumed_run_has_the_same_class_map(tmp_path):
    teacher, options = named_teacher(), {"check_teacher": False, "data": (DATA, None), "steps": 3}
    run = distilled(teacher, tmp_path, class_map=CLASS_MAP, **options)
    (tmp_path / "last.safetensors").unlink()
    assert json.loads((tmp_path / "run.json").read_text())["class_map"] == {
        "background": ["*"], "red": ["scarlet", 1], "green": ["green"]
    }  # fmt: skip
    other = CLASS_MAP | {"red": ["scarlet"]}
    with pytest.raises(ValueError, match=r"class_map: was .*scarlet.*, 1\].*, is "):
        distilled(teacher, tmp_path, class_map=other, resume=True, **options)
    resumed = distilled(teacher, tmp_path, class_map=CLASS_MAP, resume=True, **options)
    assert resumed.history == run.history


def test_a_class_map_that_does_not_fit_stops_before_anything_is_written(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"class_map leaves out 1 classes of scenes:\n  'green'"):
        distilled(named_teacher(), folder, class_map={"background": "soil", "red": "scarlet"})
    assert not folder.exists()
    with pytest.raises(ValueError, match="Expected logits of 3 classes, but got 2"):
        distilled(
            named_teacher(), folder, class_map=CLASS_MAP | {"red": []}, method=bpkd_sdk.CWDLoss(3), check_teacher=False
        )
    with pytest.raises(TypeError, match="class_map"):
        bpkd_sdk.train(tiny(3), DATA, class_map=CLASS_MAP)


def test_the_teacher_check_reads_the_teachers_own_outputs(tmp_path):
    names = ("background", "crimson", "scarlet", "green")
    network = color_network(names, (0, 1, 1, 2))
    class_map = {"background": "background", "red": ["crimson", "scarlet"], "green": "green"}
    options = {"class_map": class_map, "steps": 1, "data": (DATA, None)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", TeacherWarning)
        distilled(network, tmp_path / "right", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TeacherWarning)
        distilled(network, tmp_path / "empty", **options | {"class_map": class_map | {"green": []}})
    names_left = {"background": ["crimson"], "red": ["scarlet"], "green": ["green"]}
    with pytest.warns(
        TeacherWarning, match=r"finds classes that class_map leaves out.*of the pixels \(background \d\d%"
    ):
        distilled(network, tmp_path / "left", **options | {"class_map": names_left})
    softmax = nn.Sequential(network, nn.Softmax(1), nn.Threshold(0.0, 0.0)).eval()  # not found in the graph
    set_spec(softmax, get_spec(network))
    with pytest.warns(TeacherWarning, match="has a softmax inside"):
        distilled(softmax, tmp_path / "softmax", **options)
    wrong = NetworkSpec(None, 4, class_names=names, mean=(0,) * 3, std=(1 / 255,) * 3)  # values in 0..255
    set_spec(network, wrong)
    with pytest.warns(TeacherWarning, match="fits the labels better with ImageNet's mean"):
        distilled(network, tmp_path / "wrong", **options)


def test_compare_takes_a_class_map(tmp_path):
    teacher = color_network(("background", "crimson", "scarlet", "green"), (0, 1, 1, 2))
    class_map = {"background": "background", "red": ["crimson", "scarlet"], "green": []}
    call = dict(methods="cwd", seeds=1, output_dir=tmp_path, **OPTIONS | {"steps": 1, "check_teacher": True})
    comparison = bpkd_sdk.compare(teacher, tiny(3), (DATA, VAL), class_map=class_map, **call)
    assert {run.method for run in comparison.runs} == {"alone", "cwd"}
    assert comparison.teacher["miou"] == pytest.approx(bpkd_sdk.evaluate(teacher, VAL, class_map=class_map).miou)
    with pytest.raises(ValueError, match=r"class_map.green: was \[\], is \['green'\]"):
        bpkd_sdk.compare(teacher, tiny(3), (DATA, VAL), class_map=class_map | {"green": "green"}, **call)
