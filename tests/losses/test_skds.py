"""Tests of structured distillation against the reference and plain loops, and of the critic with its optimiser."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bpkd_sdk.losses import SKDSLoss, similarity
from bpkd_sdk.losses.critic import Adversary, Critic, critic_loss, generator_loss, gradient_penalty
from bpkd_sdk.losses.divergence import pixel_kl
from bpkd_sdk.losses.method import OutputPair
from bpkd_sdk.losses.skds import pair_similarity, pixel_cross_entropy
from bpkd_sdk.output import as_output
from tests.losses.cases import assert_gradient, load, output, random_output

LABELS = torch.zeros(2, 8, 8, dtype=torch.uint8)


def build_adversary(logits, kind):
    adversary = Adversary(kind)
    adversary.build(logits)
    return adversary


def test_pixel_term_of_the_reference(reference):
    case = load(reference, "skds_pixel")
    method = SKDSLoss(19, pixel_weight=1, pair_weight=0, adversarial_weight=0, pixel_loss="cross_entropy")
    for compute in (pixel_cross_entropy, lambda s, t: method(s, t, LABELS)["pixel"]):
        student = case["student"].clone().requires_grad_()
        loss = compute(student, case["teacher"])
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"].item(), rel=1e-5)
        assert_gradient(student, case["grad"])
    divergence = len(student) * pixel_kl(student, case["teacher"])
    assert divergence.item() + case["teacher_entropy"].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "pool", "constant_norm"),
    [("scale0.5", 0.5, True), ("scale0.25", 0.25, True), ("pool2_fullgrad", 2, False)],
)
@pytest.mark.parametrize("chunk", [1 << 20, 7], ids=["whole", "chunks"])
def test_pair_term_of_the_reference(reference, monkeypatch, name, pool, constant_norm, chunk):
    monkeypatch.setattr(similarity, "_CHUNK", chunk)
    case = load(reference, "skds_pair")
    key = name.split("_")
    method = SKDSLoss(
        19, pixel_weight=0, pair_weight=1, adversarial_weight=0, pair_pool=pool, pair_constant_norm=constant_norm
    )
    for compute in (
        lambda s, t: pair_similarity(s, t, pool=pool, constant_norm=constant_norm),
        lambda s, t: method(output(feature=s), output(feature=t), LABELS)["pair"],
    ):
        student = case["student"].clone().requires_grad_()
        loss = compute(student, case["teacher"])
        loss.backward()
        assert loss.item() == pytest.approx(case["_".join(["loss", *key])].item(), rel=1e-5)
        assert_gradient(student, case["_".join(["grad", *key])], relative=3e-5)


@pytest.mark.parametrize("chunk", [1 << 20, 13], ids=["whole", "chunks"])
def test_pair_gradient_by_finite_differences(monkeypatch, chunk):
    monkeypatch.setattr(similarity, "_CHUNK", chunk)
    student, teacher = (torch.randn(2, width, 3, 4, dtype=torch.float64) for width in (3, 5))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: pair_similarity(s, teacher, pool=1), student)


def test_scores_of_the_reference(reference):
    case = load(reference, "skds_adv")
    student, teacher = case["score_student"], case["score_teacher"]
    assert critic_loss(student, teacher, "wgan-gp").item() == pytest.approx(case["d_wgan"].item(), rel=1e-5)
    assert critic_loss(student, teacher, "hinge").item() == pytest.approx(case["d_hinge"].item(), rel=1e-5)
    for name in ("g_wgan", "g_hinge"):
        assert generator_loss(student).item() == pytest.approx(case[name].item(), rel=1e-5)


def test_adversarial_term_of_the_reference(reference):
    """The critic of this test returns its input as scores."""
    case = load(reference, "skds_adv")
    method = SKDSLoss(1, pixel_weight=0, pair_weight=0, adversarial_weight=0.5).eval()
    method.adversary.critic = nn.Identity()
    # The scores have one channel, which would be the logit of two classes; `terms` takes them as they are.
    scores = OutputPair(as_output(case["score_student"]), as_output(case["score_teacher"]))
    term = method.terms(scores, LABELS)["adversarial"]
    assert term.item() == pytest.approx(case["g_hinge"].item(), rel=1e-5)


def test_gradient_penalty_of_a_linear_critic():
    """The gradient of a linear critic is constant and equals its weights."""
    critic = nn.Conv2d(2, 1, 3, bias=False).double()
    maps = [torch.randn(4, 2, 3, 3, dtype=torch.float64) for _ in range(2)]
    penalty = gradient_penalty(critic, *maps)
    assert penalty.item() == pytest.approx((critic.weight.norm().item() - 1) ** 2)
    (slope,) = torch.autograd.grad(penalty, critic.weight)
    torch.testing.assert_close(slope, 2 * (critic.weight.norm() - 1) * critic.weight / critic.weight.norm())


@pytest.mark.parametrize(("side", "depth"), [(4, 0), (7, 0), (8, 1), (33, 3), (64, 4), (65, 4), (300, 4)])
def test_the_number_of_layers_of_the_critic_depends_on_the_size(side, depth):
    critic = Critic(3, side)
    strides = [part for part in critic.modules() if isinstance(part, nn.Conv2d) and part.stride == (2, 2)]
    assert len(strides) == depth
    assert critic(torch.zeros(2, 3, side, side + 3)).shape[:2] == (2, 1)


@pytest.mark.parametrize("kind", ["hinge", "wgan-gp"])
def test_the_critic_is_updated_by_adam(kind):
    """Three steps are compared with torch's Adam on a copy of the critic."""
    torch.manual_seed(0)
    maps = [(torch.randn(2, 3, 16, 16), 1 + torch.randn(2, 3, 16, 16)) for _ in range(3)]
    adversary = build_adversary(maps[0][0], kind)
    critic = Critic(3, 16)
    critic.load_state_dict(adversary.critic.state_dict())
    optimizer = torch.optim.Adam(critic.parameters(), lr=4e-4, betas=(0.9, 0.99))
    for step, (student, teacher) in enumerate(maps):
        torch.manual_seed(step)
        loss = critic_loss(critic(student), critic(teacher), kind)
        if kind == "wgan-gp":
            loss = loss + 10 * gradient_penalty(critic, student, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected = -critic(student).mean()
        torch.manual_seed(step)
        term = adversary(student, teacher)
        torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(adversary.critic.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_critic_learns_to_distinguish_the_logits():
    torch.manual_seed(0)
    # The teacher's logits are not constant, because the critic's batch norm maps all constant logits to the same.
    student, teacher = torch.randn(4, 3, 8, 8).requires_grad_(), torch.linspace(-1, 1, 8).expand(4, 3, 8, 8)
    adversary = build_adversary(student, "hinge")
    before = critic_loss(adversary.critic(student), adversary.critic(teacher), "hinge").item()
    for _ in range(30):
        term = adversary(student, teacher)
    scores = [adversary.critic(maps.detach()).mean().item() for maps in (student, teacher)]
    assert scores[0] + 0.1 < scores[1]
    assert critic_loss(adversary.critic(student), adversary.critic(teacher), "hinge").item() < before
    assert not any(weight.requires_grad for weight in adversary.parameters())
    term.backward()
    assert student.grad.abs().max() > 0


def test_the_critic_is_not_trained_in_eval_mode():
    maps = torch.randn(2, 3, 8, 8)
    adversary = build_adversary(maps, "hinge").eval()
    before = {key: value.clone() for key, value in adversary.state_dict().items()}
    adversary(maps, maps + 1)
    assert all(torch.equal(value, before[key]) for key, value in adversary.state_dict().items())


def test_a_resumed_run_equals_one_without_interruption():
    batches = [(random_output(2, 3, 4, (9, 8), seed=i), random_output(2, 3, 6, (9, 8), seed=9 + i)) for i in range(4)]

    def step(method, index):
        torch.manual_seed(index)
        return [term.item() for term in method(*batches[index], LABELS).values()]

    torch.manual_seed(0)
    whole = SKDSLoss(3, critic_loss="wgan-gp")
    whole.prepare(*batches[0])
    expected = [step(whole, 0), step(whole, 1)]
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    expected += [step(whole, 2), step(whole, 3)]
    resumed = SKDSLoss(3, critic_loss="wgan-gp")
    resumed.prepare(*batches[0])
    resumed.load_state_dict(state)
    assert [step(resumed, 2), step(resumed, 3)] == expected[2:]


def test_a_teacher_of_another_stride_in_the_papers_setting():
    student, teacher = random_output(2, 3, 4, (9, 8)), random_output(2, 3, 6, (18, 16), seed=1)
    method = SKDSLoss.paper(3)
    method.prepare(student, teacher)
    terms = method(student, teacher, LABELS)
    resized = F.interpolate(teacher.logits.detach(), (9, 8), mode="bilinear", align_corners=False)
    assert terms["pixel"].item() == pytest.approx(10 * pixel_cross_entropy(student.logits, resized).item())
    sum(terms.values()).backward()
    assert teacher.logits.grad is None
    assert all(torch.isfinite(x.grad).all() for x in (student.logits, student.features["neck"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_weight": -1}, "weight of 'pixel'"),
        ({"pair_weight": -1}, "weight of 'pair'"),
        ({"adversarial_weight": -1}, "weight of 'adversarial'"),
        ({"pixel_loss": "ce"}, "one of {'kl', 'cross_entropy'}"),
        ({"critic_loss": "hing"}, "Did you mean 'hinge'"),
        ({"pair_pool": 0}, "`pair_pool`.*got 0"),
        ({"pair_pool": 1.5}, "`pair_pool`.*got 1.5"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SKDSLoss(3, **arguments)


def test_logits_that_are_too_small_for_a_critic_are_refused():
    small = random_output(2, 3, 4, (3, 8))
    with pytest.raises(ValueError, match="at least 4 x 4 for a critic, but got 3 x 8"):
        SKDSLoss(3).prepare(small, small)
