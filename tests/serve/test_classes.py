"""The demo with networks and labels whose classes are in different orders."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import bpkd_sdk
from bpkd_sdk.serve.demo.examples import convert_labels, find_examples
from bpkd_sdk.serve.demo.scene import Scene
from bpkd_sdk.serve.networks import open_models, reorder_models
from bpkd_sdk.serve.service.limits import Limits
from tests.networks import tiny
from tests.scenes import NAMES, scene, write_folder

ORDER = [2, 0, 1]


def two_networks():
    """Create a teacher, and the same network with its classes in another order."""
    teacher, student = (tiny(3, stride=2).eval() for _ in range(2))
    with torch.no_grad():
        student[-1].weight.copy_(teacher[-1].weight[ORDER])
        student[-1].bias.copy_(teacher[-1].bias[ORDER])
    palette = ((0, 0, 0), (255, 0, 0), (0, 255, 0))
    for network, order in ((teacher, [0, 1, 2]), (student, ORDER)):
        names, colors = ([values[index] for index in order] for values in (NAMES, palette))
        network.spec = bpkd_sdk.NetworkSpec(None, 3, class_names=tuple(names), palette=tuple(colors))
    return teacher, student


def test_the_classes_of_a_student_are_reordered_like_the_teachers():
    teacher, student = two_networks()
    teacher, student = reorder_models(open_models([student], teacher=teacher, device="cpu")).available
    image = scene(0)[0]
    student_prediction, teacher_prediction = (model.predictor(image, confidence=True) for model in (student, teacher))
    assert (student_prediction.class_names, student_prediction.palette) == (
        teacher_prediction.class_names,
        teacher_prediction.palette,
    )
    assert len(np.unique(student_prediction.mask)) > 1
    np.testing.assert_array_equal(student_prediction.mask, teacher_prediction.mask)
    np.testing.assert_allclose(student_prediction.confidence, teacher_prediction.confidence, rtol=1e-5)
    assert student.cost((48, 48)) == teacher.cost((48, 48))


def test_without_a_teacher_classes_are_reordered_like_the_first_students():
    models = reorder_models(open_models(two_networks(), device="cpu"))
    first, second = (student.predictor(scene(0)[0]) for student in models.students)
    assert first.class_names == second.class_names
    np.testing.assert_array_equal(first.mask, second.mask)


def test_a_label_with_0_and_255_is_read_as_two_classes(tmp_path):
    image, label = scene(0, classes=2)
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(label * np.uint8(255)).save(tmp_path / "label.png")
    opened = Scene.open(tmp_path / "image.png", Limits())
    np.testing.assert_array_equal(opened.with_label(tmp_path / "label.png", 2).label, label)
    np.testing.assert_array_equal(opened.with_label(tmp_path / "label.png", 3).label, label * np.uint8(255))


@pytest.mark.parametrize("ids", [False, True])
def test_labels_of_examples_are_converted_with_classes_json(tmp_path, ids):
    """The file contains class names in another order, or a mapping of ids to classes."""
    root = write_folder(tmp_path / "data", [NAMES[index] for index in ORDER], train=2, val=1)
    if ids:
        (root / "classes.json").write_text(
            json.dumps({"ids": {"0": "void", "1": "background", "2": "red", "3": "green"}})
        )
        for path in (root / "labels").rglob("*.png"):
            Image.fromarray(np.asarray(Image.open(path)) + np.uint8(1)).save(path)
        for path in list((root / "labels").rglob("*.png"))[:1]:
            Image.fromarray(np.zeros((48, 48), np.uint8)).save(path)
    spec = two_networks()[0].spec
    pairs = find_examples(root)
    converted = convert_labels(pairs, root, spec, tmp_path)
    for pair, result in zip(pairs, converted, strict=True):
        stored, label = (np.asarray(Image.open(part.label)) for part in (pair, result))
        expected = np.array([255, 0, 1, 2])[stored] if ids else np.array(ORDER)[stored]
        np.testing.assert_array_equal(label, expected)


def test_labels_with_other_classes_are_rejected(tmp_path):
    root = write_folder(tmp_path / "data", ["one", "two", "three"], train=1, val=1)
    with pytest.raises(ValueError, match="do not have the same classes"):
        convert_labels(find_examples(root), root, two_networks()[0].spec, tmp_path)
