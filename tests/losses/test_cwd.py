"""Tests of channel-wise distillation against the reference and a plain loop, and of its projection."""

import math

import pytest
import torch

from bpkd_sdk.losses import CWDLoss
from bpkd_sdk.losses.cwd import channel_kl
from tests.losses.cases import assert_gradient, load, random_labels, random_output

LABELS = torch.zeros(2, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("temperature", [1, 4])
def test_reference(reference, temperature):
    case = load(reference, "cwd")
    for compute in (
        lambda s, t: channel_kl(s, t, temperature=temperature),
        lambda s, t: CWDLoss(19, weight=1, temperature=temperature)(s, t, LABELS)["logit"],
    ):
        student = case["student"].clone().requires_grad_()
        loss = compute(student, case["teacher"])
        loss.backward()
        assert loss.item() == pytest.approx(case[f"loss_tau{temperature}"].item(), rel=1e-5)
        assert_gradient(student, case[f"grad_tau{temperature}"])


def plain(student, teacher, temperature):
    """Compute the loss one image, channel and position at a time."""
    total = 0.0
    for s, t in zip(student.flatten(0, 1).flatten(1).tolist(), teacher.flatten(0, 1).flatten(1).tolist(), strict=True):
        p, q = ([math.exp(value / temperature) for value in values] for values in (t, s))
        p, q = ([value / sum(values) for value in values] for values in (p, q))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / (student.shape[0] * student.shape[1])


def test_logits_and_projected_feature_in_float64():
    student = random_output(2, 3, 4, (3, 5), dtype=torch.float64)
    teacher = random_output(2, 3, 6, (3, 5), seed=1, dtype=torch.float64)
    method = CWDLoss(3, weight=2, feature_weight=5, temperature=2.5).double()
    method.prepare(student, teacher)
    method.double()
    terms = method(student, teacher, LABELS)
    assert terms["logit"].item() == pytest.approx(2 * plain(student.logits, teacher.logits, 2.5), rel=1e-9)
    projected = torch.einsum("dc,nchw->ndhw", method.projection.weight[:, :, 0, 0], student.features["neck"])
    expected = 5 * plain(projected, teacher.features["neck"], 2.5)
    assert terms["feature"].item() == pytest.approx(expected, rel=1e-9)
    sum(terms.values()).backward()
    assert method.projection.weight.grad.abs().max() > 0
    assert teacher.logits.grad is None
    assert teacher.features["neck"].grad is None


def test_gaps_beyond_float32s_exponent_stay_finite():
    """The logarithm of a softmax would be minus infinity for these logits."""
    student = torch.zeros(1, 2, 4, 4).requires_grad_()
    teacher = torch.zeros(1, 2, 4, 4)
    teacher[:, :, 0, 0] = 500
    loss = channel_kl(teacher, student.detach()) + channel_kl(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_needs_features_only_when_a_term_uses_them():
    assert not CWDLoss(3).needs_features
    assert CWDLoss.paper(3).needs_features
    student = random_output(2, 3, 4, (4, 4))
    assert list(CWDLoss(3)(student, student, LABELS)) == ["logit"]
    with pytest.raises(RuntimeError, match=r"method\.prepare"):
        CWDLoss(3, feature_weight=1)(student, student, LABELS)


def test_labels_are_not_used():
    student, teacher = random_output(1, 3, 4, (4, 4)), random_output(1, 3, 4, (4, 4), seed=1)
    terms = [CWDLoss(3)(student, teacher, labels)["logit"] for labels in (random_labels(1, 3, (8, 8)), LABELS[:1])]
    assert terms[0] == terms[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1}, "weight of 'logit'"),
        ({"feature_weight": float("inf")}, "weight of 'feature'"),
        ({"temperature": 0}, "`temperature`.*above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CWDLoss(3, **arguments)
