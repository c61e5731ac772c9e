"""Tests of intra-class feature variation against the reference and a plain loop, and in edge cases."""

import pytest
import torch

from bpkd_sdk.losses import IFVDLoss
from bpkd_sdk.losses.divergence import pixel_kl
from bpkd_sdk.losses.ifvd import feature_variation
from tests.losses.cases import assert_gradient, load, output, random_labels, random_output


def test_reference(reference):
    case = load(reference, "ifvd")
    method = IFVDLoss(19, kd_weight=0, variation_weight=1, adversarial_weight=0)
    for compute in (
        lambda s, t, y: feature_variation(s, t, y, 19),
        lambda s, t, y: method(output(feature=s), output(feature=t), y)["variation"],
    ):
        student = case["student"].clone().requires_grad_()
        loss = compute(student, case["teacher"], case["labels"])
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"].item(), rel=1e-5)
        assert_gradient(student, case["grad"])


def plain_cosines(features, labels, void):
    """Compute the cosines one class at a time; void positions have the cosine 1."""
    cosines = torch.ones(labels.shape, dtype=features.dtype)
    for image in range(len(features)):
        for label in labels[image].unique().tolist():
            if label == void:
                continue
            member = labels[image] == label
            centre = features[image][:, member].mean(1)
            for row, column in member.nonzero().tolist():
                own = features[image, :, row, column]
                cosines[image, row, column] = (own @ centre) / own.norm() / centre.norm()
    return cosines


@pytest.mark.parametrize("void", [255, -1])
def test_equation_in_float64(void):
    student = random_output(3, 5, 4, (6, 7), dtype=torch.float64)
    teacher = random_output(3, 5, 9, (6, 7), seed=1, dtype=torch.float64)
    labels = random_labels(3, 5, (24, 28), void=void)
    loss = IFVDLoss(5, kd_weight=3, variation_weight=2, adversarial_weight=0, ignore_index=void)
    terms = loss(student, teacher, labels)
    s, t = student.features["neck"], teacher.features["neck"]
    small = labels[:, ::4, ::4]
    expected = (plain_cosines(s, small, void) - plain_cosines(t, small, void)).square().mean()
    assert terms["variation"].item() == pytest.approx(2 * expected.item(), rel=1e-9)
    assert terms["kd"].item() == pytest.approx(3 * pixel_kl(student.logits, teacher.logits).item(), rel=1e-9)
    terms["variation"].backward()
    gradient = s.grad.clone()
    s.grad = None
    (2 * (plain_cosines(s, small, void) - plain_cosines(t, small, void)).square().mean()).backward()
    torch.testing.assert_close(gradient, s.grad)


@pytest.mark.parametrize("fill", [pytest.param(255, id="void-only"), pytest.param(1, id="one-class")])
def test_batch_of_one_with_one_label(fill):
    student, teacher = random_output(1, 3, 4, (4, 4)), random_output(1, 3, 8, (4, 4), seed=1)
    labels = torch.full((1, 16, 16), fill, dtype=torch.uint8)
    loss = feature_variation(student.features["neck"], teacher.features["neck"], labels, 3)
    loss.backward()
    assert torch.isfinite(student.features["neck"].grad).all()
    assert (loss.item() == 0) == (fill == 255)


def test_features_of_zero_do_not_divide_by_zero():
    student, teacher = torch.zeros(1, 4, 4, 4).requires_grad_(), torch.randn(1, 4, 4, 4)
    loss = feature_variation(student, teacher, random_labels(1, 3, (16, 16)), 3)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_same_features_give_zero():
    features = torch.randn(2, 4, 8, 8)
    assert feature_variation(features, features.clone(), random_labels(2, 3, (32, 32)), 3).item() == 0


def test_paper_averages_kd_over_all_elements():
    paper = IFVDLoss.paper(19)
    assert paper.weights == {"kd": 10 / 19, "variation": 200, "adversarial": 0.001}
    assert paper.adversary.kind == "wgan-gp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kd_weight": -1}, "weight of 'kd'"),
        ({"variation_weight": -1}, "weight of 'variation'"),
        ({"adversarial_weight": -1}, "weight of 'adversarial'"),
        ({"critic_loss": "wgan"}, "Did you mean 'wgan-gp'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        IFVDLoss(3, **arguments)


def test_labels_out_of_range_are_named():
    features = torch.zeros(1, 4, 4, 4)
    with pytest.raises(ValueError, match=r"labels in \[0, 3\)"):
        feature_variation(features, features, torch.full((1, 8, 8), 7), 3)
