"""A teacher of transformers with other classes, a student of segmentation-models-pytorch, and a verified ONNX file."""

import pytest
import segmentation_models_pytorch as smp
import torch

import bpkd_sdk
from bpkd_sdk.export import to_onnx
from tests.families import DATA, OPTIONS, SIZE
from tests.transformers_networks import build

TEACHERS = ("segformer", "mask2former")


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_of_other_classes_distils_a_student_to_onnx(name, tmp_path):
    teacher = build(name)
    teacher.config.id2label = dict(enumerate(["wall", "floor", "ball", "hoop", "crate", "sun", "tree", "post", "rope"]))
    groups = {name: [] for name in DATA.class_names} | {"ground": ["floor", "wall"], "disc": ["ball", "sun"]}
    torch.manual_seed(0)
    student = smp.Linknet("tu-test_resnet", encoder_weights=None, classes=9)
    options = OPTIONS | {"class_map": groups, "check_teacher": False, "output_dir": tmp_path / "run"}
    run = bpkd_sdk.distill(teacher, student, (DATA, None), **options)
    report = to_onnx(run.checkpoint, tmp_path / "student.onnx", input_size=SIZE)
    assert report.verified
    assert bpkd_sdk.Predictor(report.path)(DATA[0][0].permute(1, 2, 0).numpy()).mask.shape == SIZE
