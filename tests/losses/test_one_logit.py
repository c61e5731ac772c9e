"""Networks with one logit: every method computes the loss of two classes with the logits 0 and z, in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bpkd_sdk.boundary import edge_masks
from bpkd_sdk.classes import two_class_logits
from bpkd_sdk.losses import METHODS, BPKDLoss, CanonicalKDLoss, CWDLoss, SKDSLoss, create_method
from bpkd_sdk.losses.critic import Adversary
from bpkd_sdk.output import SegmentationOutput, comparable_outputs
from bpkd_sdk.training.label_losses import cross_entropy
from tests.losses.cases import random_labels, random_output

LABELS = random_labels(2, 2, (36, 48))
SIZE = (9, 12)


def one_logit(channels, seed):
    """Return an output with one logit z, and outputs of the same probabilities with the logits a and a + z."""
    output = random_output(2, 1, channels, SIZE, seed=seed, dtype=torch.float64)
    shift = torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
    z = output.logits.detach()
    return output, SegmentationOutput(torch.cat([shift, shift + z], 1).requires_grad_(), output.features)


def terms_and_gradient(method, student, teacher):
    method = copy.deepcopy(method)
    torch.manual_seed(3)
    terms = method(student, teacher, LABELS)
    (gradient,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), student.logits)
    return {name: term.item() for name, term in terms.items()}, gradient


@pytest.mark.parametrize("method", [*METHODS, ["bpkd", "skds", "cirkd"]], ids=str)
def test_one_and_two_logits_give_the_same_terms_and_gradients(method):
    """All pairs of networks give the terms of a student with the logits [0, z] and a teacher of the same form."""
    (student, two_student), (teacher, two_teacher) = one_logit(4, 1), one_logit(6, 2)
    created = create_method(method, 2)
    torch.manual_seed(0)
    created.prepare(student, teacher)
    created.double()
    for part in created.modules():
        if isinstance(part, Adversary):  # a critic always computes in float32
            part.float()
    zero = SegmentationOutput(F.pad(student.logits.detach(), (0, 0, 0, 0, 1, 0)).requires_grad_(), student.features)
    zero_teacher = SegmentationOutput(F.pad(teacher.logits.detach(), (0, 0, 0, 0, 1, 0)), teacher.features)
    expected, gradient = terms_and_gradient(created, zero, zero_teacher)
    assert all(np.isfinite(value) for value in expected.values())
    for ours, theirs in ((student, teacher), (student, two_teacher), (two_student, teacher)):
        terms, slope = terms_and_gradient(created, ours, theirs)
        assert terms == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(slope[:, -1], gradient[:, 1], rtol=1e-4, atol=1e-6 * gradient.abs().max().item())
        if slope.shape[1] == 2:  # only the difference of both logits matters
            torch.testing.assert_close(slope[:, 0], -slope[:, 1])


def bernoulli_kl(p, q):
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def test_the_terms_are_those_of_sigmoids():
    student, teacher = (random_output(2, 1, 4, SIZE, seed=seed, dtype=torch.float64) for seed in (1, 2))
    z, t = student.logits.detach(), teacher.logits.detach()
    divergence = bernoulli_kl(t.sigmoid(), z.sigmoid())
    logit = CanonicalKDLoss(feature_weight=0)(student, teacher, LABELS)["logit"]
    assert logit.item() == pytest.approx(5 * divergence.mean().item(), rel=1e-12)
    pixel = SKDSLoss(pair_weight=0, adversarial_weight=0)(student, teacher, LABELS)["pixel"]
    assert pixel.item() == pytest.approx(5 * divergence.mean().item(), rel=1e-12)

    over_positions = [x.flatten(1).log_softmax(1) for x in (t, z)]
    per_image = (over_positions[0].exp() * (over_positions[0] - over_positions[1])).sum(1)
    cwd = CWDLoss(weight=1)(student, teacher, LABELS)["logit"]  # the channel of zeros adds 0 to the mean
    assert cwd.item() == pytest.approx(per_image.mean().item() / 2, rel=1e-12)

    masks = edge_masks(LABELS, 2, SIZE).double()
    edge = bernoulli_kl((masks[:, 1:] * t).sigmoid(), (masks[:, 1:] * z).sigmoid())
    expected = 0.0
    for image in range(2):
        for index in range(2):  # both classes have an edge in both images, so alpha 2 over 2 classes is 1
            mask = masks[image, index]
            expected += (edge[image, 0] * mask).sum().item() / (mask > 0).sum().item() / 2
    assert BPKDLoss()(student, teacher, LABELS)["edge"].item() == pytest.approx(expected, rel=1e-9)


def test_the_cross_entropy_is_that_of_a_sigmoid():
    z = torch.randn(2, 1, 36, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20
    labelled = LABELS != 255
    target = (LABELS == 1).double()
    expected = F.binary_cross_entropy_with_logits(z[:, 0][labelled], target[labelled])
    assert cross_entropy(z, LABELS, 255).item() == pytest.approx(expected.item(), rel=1e-12)
    large = torch.full((1, 1, 2, 2), 300.0)  # e^300 is not finite in float32
    assert cross_entropy(large, torch.zeros(1, 2, 2, dtype=torch.long), 255).item() == 300
    assert cross_entropy(large.half(), torch.ones(1, 2, 2, dtype=torch.long), 255).item() == 0


def test_only_pairs_with_one_logit_are_changed():
    three, two = (SegmentationOutput(torch.randn(1, classes, 2, 2)) for classes in (3, 2))
    assert comparable_outputs(two, two) == (two, two)
    assert comparable_outputs(three, three) == (three, three)
    half = two_class_logits(torch.tensor([[1.0, 1.001]], dtype=torch.bfloat16))
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match=r"agree in images and classes, but got \(1, 1\) and \(1, 3\)"):
        CWDLoss()(torch.randn(1, 1, 2, 2), three, torch.zeros(1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"Expected logits of 1 classes, but got 2 \(one logit has two\)"):
        CWDLoss(1)(torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8))
