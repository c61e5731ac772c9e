"""Tests of DIST against the reference and plain loops, and where a correlation is not defined."""

import numpy as np
import pytest
import torch

from bpkd_sdk.losses import DISTLoss
from tests.losses.cases import assert_gradient, load, random_labels, random_output

LABELS = torch.zeros(2, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("term", ["inter", "intra"])
@pytest.mark.parametrize("temperature", [1, 4])
def test_reference(reference, temperature, term):
    case = load(reference, "dist")
    student = case["student"].clone().requires_grad_()
    loss = DISTLoss(19, temperature=temperature)(student, case["teacher"], LABELS)[term]
    loss.backward()
    assert loss.item() == pytest.approx(case[f"{term}_tau{temperature}"].item(), rel=1e-5)
    assert_gradient(student, case[f"grad_{term}_tau{temperature}"])


def test_weights_and_temperature_in_float64():
    """numpy computes the correlations of single rows and columns."""
    student, teacher = (random_output(2, 4, 1, (3, 5), seed=seed, dtype=torch.float64).logits for seed in (0, 1))
    terms = DISTLoss(4, inter_weight=2, intra_weight=3, temperature=2.5)(student, teacher, LABELS)
    rows = [(z / 2.5).softmax(1).detach().movedim(1, 3).flatten(0, 2).numpy() for z in (student, teacher)]
    inter = [1 - np.corrcoef(s, t)[0, 1] for s, t in zip(*rows, strict=True)]
    intra = [1 - np.corrcoef(s, t)[0, 1] for s, t in zip(*(x.T for x in rows), strict=True)]
    assert terms["inter"].item() == pytest.approx(2 * np.mean(inter), rel=1e-6)
    assert terms["intra"].item() == pytest.approx(3 * np.mean(intra), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 500.0], ids=["uniform", "nearly-uniform", "certain"])
def test_probabilities_without_variation_stay_finite(scale):
    """A class that is certainly absent everywhere has no variation either."""
    student, teacher = (scale * random_output(2, 3, 1, (4, 4), seed=seed).logits.detach() for seed in (0, 1))
    student[:, 2], teacher[:, 2] = -1000, -1000
    terms = DISTLoss(3)(student.requires_grad_(), teacher, LABELS)
    sum(terms.values()).backward()
    assert all(-1e-6 <= term.item() <= 2 + 1e-6 for term in terms.values())
    assert torch.isfinite(student.grad).all()


def test_the_same_relations_give_zero():
    """The terms do not change when the teacher is more confident by a factor."""
    probabilities = (torch.rand(2, 5, 4, 6, dtype=torch.float64) / 2).softmax(1)
    sharper = 0.2 + 2 * (probabilities - 0.2)  # above 0, with the sum 1
    terms = DISTLoss(5)(probabilities.log(), sharper.log(), LABELS)
    assert all(abs(term.item()) < 1e-5 for term in terms.values())


def test_labels_are_not_used():
    student, teacher = (random_output(2, 3, 1, (4, 4), seed=seed).logits for seed in (0, 1))
    assert DISTLoss(3)(student, teacher, random_labels(2, 3, (8, 8))) == DISTLoss(3)(student, teacher, LABELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inter_weight": -1}, "weight of 'inter'"),
        ({"inter_weight": 0, "intra_weight": 0}, "weights of inter, intra are 0"),
        ({"temperature": 0}, "`temperature`.*above 0"),
    ],
    ids=["weight", "no-term", "temperature"],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DISTLoss(3, **arguments)
