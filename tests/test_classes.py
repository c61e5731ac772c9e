"""Tests of the comparison and reordering of a network's classes and those of the data."""

import copy

import pytest
import torch
from torch import nn

import bpkd_sdk
from bpkd_sdk.classes import class_order, reorder_labels, reorder_masks
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.models import get_spec
from bpkd_sdk.models.classifier import reorder_classifier
from bpkd_sdk.output import as_output
from tests.networks import tiny
from tests.scenes import Scenes

ORDER = (2, 0, 1)


def order(network, data, palettes=((), ()), **options):
    specs = [
        bpkd_sdk.NetworkSpec(None, len(names) or len(palette), class_names=names, palette=palette)
        for names, palette in zip((network, data), palettes, strict=True)
    ]
    return class_order(*specs, network_name="the network", data_name="the data", **options)


@pytest.mark.parametrize(
    ("network", "data", "expected"),
    [
        (("sky", "car", "road"), ("sky", "car", "road"), None),
        (("sky", "car", "road"), ("road", "sky", "car"), (2, 0, 1)),
        (("Traffic-Light", "bed ", "sky"), ("traffic_light", "Bed", "SKY"), None),
        (("Traffic-Light", "bed ", "sky"), ("bed", "traffic light", "sky"), (1, 0, 2)),
        (("a b", "ab", "c"), ("ab", "a b", "c"), (1, 0, 2)),  # names that differ in spaces only
        (("LABEL_0", "LABEL_1"), ("sky", "car"), None),
        (("sky", "car"), ("class 0", "class 1"), None),
        (("0", "1", "2"), ("2", "1", "0"), (2, 1, 0)),
        (("object", "background"), ("background", "object"), (1, 0)),  # of one logit or two
        (("0", "1"), ("sky", "car"), None),
        ((), ("sky", "car"), None),
        (("object",), ("background", "object"), None),  # of one logit
        (("object",), ("Object", "background"), (1, 0)),
        (("LABEL_0",), ("background", "object"), None),
    ],
)
def test_the_order_is_found_by_name(network, data, expected):
    assert order(network, data) == expected


def test_the_order_is_found_by_colour_if_the_network_has_no_class_names():
    red, green = (255, 0, 0), (0, 255, 0)
    assert order(("class 0", "class 1"), ("a", "b"), ((red, green), (green, red))) == (1, 0)
    assert order((), ("a", "b"), ((red, green), (green, (0, 0, 1)))) is None


@pytest.mark.parametrize(
    ("network", "data"),
    [
        (("sky", "car"), ("sky", "bus")),
        (("sky", "sky"), ("sky", "car")),
        (("object",), ("background", "thing")),
    ],
)
def test_other_names_are_refused_unless_match_classes_is_false(network, data):
    with pytest.raises(ValueError, match="do not have the same classes") as caught:
        order(network, data)
    assert f"the network has {len(network)}: {', '.join(network)}" in str(caught.value)
    assert f"the data has {len(data)}: {', '.join(data)}" in str(caught.value)
    assert "match_classes=False" in str(caught.value)
    assert order(network, data, match_classes=False) is None


@pytest.mark.parametrize("options", [{}, {"match_classes": False}])
def test_another_number_of_classes_is_always_refused(options):
    network = tiny(2).eval()  # has no spec with the number of classes
    with pytest.raises(ValueError, match="Sequential predicts 2 classes, but scenes has 3"):
        bpkd_sdk.evaluate(network, SAME, **options)
    network.spec = bpkd_sdk.NetworkSpec(None, 3)  # contradicts the classifier
    with pytest.raises(ValueError, match="Sequential predicts 2 classes, but scenes has 3"):
        bpkd_sdk.evaluate(network, SAME, **options)
    spec = bpkd_sdk.NetworkSpec(None, 9)
    network = tiny(3).eval()
    network.spec = spec  # the classifier was replaced afterwards
    assert bpkd_sdk.evaluate(network, SAME, **options).images == 4


def test_class_names_of_hugging_face_configurations():
    module = nn.Conv2d(3, 2, 1)
    module.config = type("Config", (), {"id2label": {1: "car", 0: "sky"}})()
    assert (get_spec(module).class_names, get_spec(module).num_classes) == (("sky", "car"), 2)
    module.config.id2label = {0: "sky", 5: "car"}
    assert get_spec(module).class_names == ()


def test_masks_and_labels_follow_the_order():
    columns = torch.tensor([[[2, 0, 1]]], dtype=torch.uint8)  # columns of the classes 0, 1, 2 of the data
    assert reorder_masks(columns, ORDER).tolist() == [[[0, 1, 2]]]
    labels = torch.tensor([[[0, 1, 2, 255]]], dtype=torch.uint8)
    back = reorder_labels(labels, ORDER, 255)
    assert (back.tolist(), back.dtype) == ([[[2, 0, 1, 255]]], torch.uint8)


@pytest.mark.parametrize("name", ["pspnet_r18", "smp/FPN/mobilenet_v2", "own"])
def test_a_classifier_is_reordered_in_place(name):
    torch.manual_seed(0)
    # The first layers also have three channels; they must not be reordered.
    network = tiny(3, width=3) if name == "own" else bpkd_sdk.create_model(name, 3, aux_head=name == "pspnet_r18")
    images = torch.rand(1, 3, 64, 64)
    network.eval()
    with torch.no_grad():
        before = as_output(network(images)).logits
        auxiliary = network.auxiliary_head.conv_seg.weight.clone() if name == "pspnet_r18" else None
        reorder_classifier(network, ORDER, images)
        torch.testing.assert_close(as_output(network(images)).logits, before[:, list(ORDER)])
    if auxiliary is not None:
        assert torch.equal(network.auxiliary_head.conv_seg.weight, auxiliary[list(ORDER)])


def test_only_the_last_auxiliary_layer_is_reordered():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny(3)
            self.auxiliary = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))

        def forward(self, images):
            return {"out": self.body(images), "aux": self.auxiliary(images)}

    network = Auxiliary().eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = as_output(network(images))
        reorder_classifier(network, ORDER, images)
        after = as_output(network(images))
    torch.testing.assert_close(after.logits, before.logits[:, list(ORDER)])
    torch.testing.assert_close(after.aux_logits, before.aux_logits[:, list(ORDER)])


def test_a_classifier_with_equal_logits_cannot_be_found():
    network = tiny(3).eval()
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="the logits of its classes are equal"):
        reorder_classifier(network, ORDER, torch.rand(1, 3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_one_logit_with_two_names():
    data = Scenes((0, 1), length=2)
    network = tiny(1).eval()
    scores = []
    for names in (("background", "red"), ("red", "background")):
        network.spec = bpkd_sdk.NetworkSpec(None, 1, class_names=names)
        scores.append(bpkd_sdk.evaluate(network, data).pixel_accuracy)
    assert sum(scores) == pytest.approx(1)


def test_a_network_whose_classifier_is_not_found_is_unchanged():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny(3)
            self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))

        def forward(self, images):
            return self.body(images) * self.scale

    network = Scaled().eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="none of its layers with 3 channels"):
        reorder_classifier(network, ORDER, torch.rand(1, 3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a network that segments scenes, with a spec that contains their class names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 3, 1))
    options = {"batch_size": 4, "crop_size": (48, 48), "device": "cpu", "scale": (1.0, 1.0), "learning_rate": 0.1}
    return bpkd_sdk.train(
        model, (Scenes(), None), steps=80, output_dir=tmp_path_factory.mktemp("trained"), **options
    ).model


OTHER = Scenes(ORDER, start=100, length=4)
SAME = Scenes(start=100, length=4)


def test_evaluate_uses_the_order_of_the_data(trained):
    expected = bpkd_sdk.evaluate(trained, SAME)
    assert expected.miou > 0.95
    reordered = bpkd_sdk.evaluate(trained, OTHER)
    assert reordered.class_names == OTHER.class_names
    assert reordered.miou == pytest.approx(expected.miou)
    assert reordered.per_class_iou == pytest.approx([expected.per_class_iou[index] for index in ORDER])
    assert bpkd_sdk.evaluate(trained, OTHER, match_classes=False).miou < 0.5
    assert bpkd_sdk.evaluate(trained, OTHER, protocol=EvaluationProtocol(scales=(1.0, 1.5), flip=True)).miou > 0.95
    assert bpkd_sdk.evaluate(trained, OTHER, reference=trained).miou == 1


def test_evaluate_reports_logits_and_labels_that_cannot_be_scored():
    network = tiny(3).eval()
    nn.init.constant_(network[0].weight, torch.nan)
    with pytest.warns(UserWarning, match="logits of Sequential are not finite"):
        bpkd_sdk.evaluate(network, SAME)
    with pytest.warns(UserWarning, match="one channel of Sequential lies in 0..1"):
        bpkd_sdk.evaluate(nn.Sequential(tiny(1), nn.Sigmoid()).eval(), Scenes((0, 1), length=2))

    class Wrong(Scenes):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, label + index

    with pytest.raises(ValueError, match=r"scenes\[1\]: Expected labels in \[0, 3\)"):
        bpkd_sdk.evaluate(tiny(3).eval(), Wrong(length=3))


def test_evaluate_refuses_other_classes(trained):
    with pytest.raises(ValueError, match=r"scenes has 3: one, two, three"):
        bpkd_sdk.evaluate(trained, Scenes(names=("one", "two", "three")))
    with pytest.raises(ValueError, match=r"has 3: background, red, green\n.*has 4: background, red, green, blue"):
        bpkd_sdk.evaluate(trained, Scenes((0, 1, 2, 3)))


@pytest.mark.parametrize("method", ["bpkd", "canonical"])  # methods on logits, and on logits and features
def test_the_order_of_the_teachers_classes_does_not_change_the_student(trained, tmp_path, method):
    data = Scenes(ORDER)
    students = []
    ordered = nn.Sequential(*trained[:2], nn.Conv2d(16, 3, 1)).eval()
    ordered.load_state_dict(trained.state_dict())
    with torch.no_grad():
        reorder_classifier(ordered, ORDER, torch.rand(1, 3, 16, 16))
    ordered.spec = bpkd_sdk.NetworkSpec(None, 3, class_names=data.class_names)
    for index, teacher in enumerate((trained, ordered)):
        before = {key: value.clone() for key, value in teacher.state_dict().items()}
        result = bpkd_sdk.distill(
            teacher, tiny(3, seed=5), (data, OTHER), method=method, steps=6, batch_size=2, crop_size=(32, 32),
            device="cpu", output_dir=tmp_path / str(index),
        )  # fmt: skip
        assert teacher.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
        students.append(result.model)
    assert get_spec(students[0]).class_names == data.class_names
    for ours, theirs in zip(students[0].state_dict().values(), students[1].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_labels_from_a_teacher_with_another_order_of_classes(trained, tmp_path):
    result = bpkd_sdk.distill(
        trained, tiny(3, seed=5, stride=2), (Scenes(ORDER), OTHER), labels="teacher", steps=60, batch_size=4,
        crop_size=(48, 48), device="cpu", learning_rate=0.1, scale=(1.0, 1.0), output_dir=tmp_path,
    )  # fmt: skip
    assert bpkd_sdk.evaluate(result.model, OTHER).pixel_accuracy > 0.8


def test_fine_tuning_starts_in_the_order_of_the_data(trained, tmp_path):
    """One step at a very small learning rate does not change the predictions."""
    model = copy.deepcopy(trained)
    options = {"steps": 1, "batch_size": 2, "crop_size": (32, 32), "device": "cpu", "learning_rate": 1e-8}
    result = bpkd_sdk.train(model, (Scenes(ORDER), OTHER), output_dir=tmp_path / "a", **options)
    assert result.metrics.miou > 0.95
    assert get_spec(model).class_names == OTHER.class_names
    again = bpkd_sdk.train(model, (Scenes(ORDER), OTHER), output_dir=tmp_path / "b", **options)
    assert again.metrics.miou > 0.95  # the classifier is not reordered twice
    kept = bpkd_sdk.load_model(tmp_path / "a" / "last.safetensors", model=copy.deepcopy(trained))
    assert bpkd_sdk.evaluate(kept, SAME).miou > 0.95


def test_other_class_names_are_refused_before_anything_is_written(trained, tmp_path):
    other = Scenes(names=("one", "two", "three"))
    options = {"steps": 1, "batch_size": 2, "crop_size": (32, 32), "device": "cpu", "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"The student and scenes do not have the same classes"):
        bpkd_sdk.train(copy.deepcopy(trained), (other, other), **options)
    with pytest.raises(ValueError, match=r"The teacher and scenes do not have the same classes"):
        bpkd_sdk.distill(trained, tiny(3), (other, None), **options)
    assert not (tmp_path / "run").exists()
    bpkd_sdk.distill(trained, tiny(3), (other, None), match_classes=False, **options)
