"""Tests of logit and feature distillation against the reference, and with a teacher of another stride."""

import pytest
import torch
import torch.nn.functional as F

from bpkd_sdk.losses import CanonicalKDLoss
from bpkd_sdk.losses.canonical import feature_mse
from bpkd_sdk.losses.divergence import pixel_kl
from tests.losses.cases import assert_gradient, load, output, random_output

LABELS = torch.zeros(2, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("temperature", [1, 4])
def test_logits_of_the_reference(reference, temperature):
    case = load(reference, "pixel_kl")
    for compute in (
        lambda s, t: pixel_kl(s, t, temperature=temperature),
        lambda s, t: CanonicalKDLoss(19, logit_weight=1, feature_weight=0, temperature=temperature)(s, t, LABELS)[
            "logit"
        ],
    ):
        student = case["student"].clone().requires_grad_()
        loss = compute(student, case["teacher"])
        loss.backward()
        assert loss.item() == pytest.approx(case[f"loss_pixelmean_tau{temperature}"].item(), rel=1e-5)
        assert_gradient(student, case[f"grad_pixelmean_tau{temperature}"])
    batch_mean = loss.item() * student[0, 0].numel()
    assert batch_mean == pytest.approx(case[f"loss_mmrazor_batchmean_tau{temperature}"].item(), rel=1e-5)
    element_mean = loss.item() / 19 / temperature**2
    assert element_mean == pytest.approx(case[f"loss_ifvd_elementmean_tau{temperature}"].item(), rel=1e-5)


def test_features_of_the_reference(reference):
    case = load(reference, "feature_mse")
    student, weight = (case[key].clone().requires_grad_() for key in ("student", "weight"))
    loss = feature_mse(student, case["teacher"], weight)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"].item(), rel=1e-5)
    assert_gradient(student, case["grad"])
    assert_gradient(weight, case["grad_weight"])

    student = output(feature=case["student"].clone().requires_grad_())
    teacher = output(feature=case["teacher"])
    method = CanonicalKDLoss(19, logit_weight=0, feature_weight=1)
    method.prepare(student, teacher)
    with torch.no_grad():
        method.projection.weight.copy_(case["weight"])
    loss = method(student, teacher, LABELS)["feature"]
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"].item(), rel=1e-5)
    assert_gradient(student.features["neck"], case["grad"])
    assert_gradient(method.projection.weight, case["grad_weight"])


def test_teacher_is_resized_to_the_students_feature_map():
    student, teacher = random_output(2, 3, 4, (4, 6)), random_output(2, 3, 5, (8, 12), seed=1)
    method = CanonicalKDLoss(3)
    method.prepare(student, teacher)
    resized = output(
        *(
            F.interpolate(x.detach(), (4, 6), mode="bilinear", align_corners=False)
            for x in (teacher.logits, teacher.features["neck"])
        )
    )
    assert method(student, teacher, LABELS) == method(student, resized, LABELS)


def test_the_state_is_restored_after_prepare():
    student, teacher = random_output(2, 3, 4, (4, 6)), random_output(2, 3, 5, (4, 6), seed=1)
    first, second = CanonicalKDLoss(3), CanonicalKDLoss(3)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        first.prepare(student, teacher) or second.load_state_dict(first.state_dict())
    second.prepare(student, teacher)
    assert first(student, teacher, LABELS)["feature"] != second(student, teacher, LABELS)["feature"]
    second.load_state_dict(first.state_dict())
    assert first(student, teacher, LABELS) == second(student, teacher, LABELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logit_weight": -1}, "weight of 'logit'"),
        ({"feature_weight": float("nan")}, "weight of 'feature'"),
        ({"temperature": -2}, "`temperature`.*above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CanonicalKDLoss(3, **arguments)


def test_bad_outputs_are_named():
    method, student = CanonicalKDLoss(3), random_output(2, 3, 4, (4, 6))
    with pytest.raises(ValueError, match=r"one feature map of the student.*got none.*Capture"):
        method.prepare(output(student.logits), student)
    two = output(student.logits, student.features["neck"])
    two.features["stem"] = student.logits
    with pytest.raises(ValueError, match="of the teacher.*got 'neck', 'stem'"):
        method.prepare(student, two)
    with pytest.raises(ValueError, match="features of the same images, but got 2 of the student and 1"):
        method.prepare(student, random_output(1, 3, 4, (4, 6)))
    with pytest.raises(ValueError, match="logits of 5 classes, but got 3"):
        CanonicalKDLoss(5)(student, student, LABELS)
    with pytest.raises(ValueError, match="labels for 2 images, but got 3"):
        method(student, student, LABELS[:1].expand(3, -1, -1))
