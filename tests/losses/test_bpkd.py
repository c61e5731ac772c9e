"""Tests of the BPKD loss against the reference, against loops in float64, and in edge cases."""

import numpy as np
import pytest
import torch

from bpkd_sdk.boundary import edge_masks
from bpkd_sdk.losses import BPKDLoss, create_method
from bpkd_sdk.losses.bpkd import bpkd_body, bpkd_edge, dense_class_kl, masked_class_kl
from bpkd_sdk.output import SegmentationOutput


@pytest.fixture(scope="module")
def case(reference):
    with np.load(reference / "losses" / "bpkd_c19_void.npz") as content:
        return dict(content)


def tensors(case):
    return (
        torch.from_numpy(case["student"]).requires_grad_(),
        torch.from_numpy(case["teacher"]),
        torch.from_numpy(case["labels"]),
    )


def assert_gradient(tensor, expected, relative=1e-5):
    difference = np.abs(tensor.grad.numpy() - expected).max()
    assert difference <= relative * np.abs(expected).max() + 1e-8


@pytest.mark.parametrize("term", ["edge", "body"])
def test_terms_of_the_reference(case, term):
    student, teacher, labels = tensors(case)
    loss = BPKDLoss(19, edge_weight=1, body_weight=1, class_reduction="sum")(student, teacher, labels)[term]
    loss.backward()
    assert loss.item() == pytest.approx(float(case[f"loss_{term}"]), rel=1e-5)
    assert_gradient(student, case[f"grad_{term}"])


def test_paper_weights_with_the_sum_of_the_reference(case):
    student, teacher, labels = tensors(case)
    loss = sum(BPKDLoss(19, edge_weight=50, body_weight=20, class_reduction="sum")(student, teacher, labels).values())
    loss.backward()
    assert loss.item() == pytest.approx(float(case["loss"]), rel=1e-5)
    assert_gradient(student, case["grad"])


def test_paper_setting_is_the_pooled_term_of_the_reference(case):
    student, teacher, labels = tensors(case)
    terms = BPKDLoss.paper(19)(student, teacher, labels)
    terms["edge"].backward()
    assert terms["edge"].item() == pytest.approx(50 * float(case["pooled_count_edge"]), rel=1e-5)
    assert terms["body"].item() == pytest.approx(20 * float(case["loss_body"]), rel=1e-5)
    assert_gradient(student, 50 * case["pooled_count_grad"])
    mass = BPKDLoss(19, edge_weight=1, class_reduction="pooled", edge_count="mass")(*tensors(case))["edge"]
    assert mass.item() == pytest.approx(float(case["pooled_mass_edge"]), rel=1e-5)


@pytest.mark.parametrize(("edge_count", "count"), [("positions", "count"), ("mass", "mass")])
@pytest.mark.parametrize(("void", "name"), [("clear", "zero"), ("keep", "raw"), ("guard", "guard")])
def test_other_readings_of_the_reference(case, edge_count, count, void, name):
    loss = BPKDLoss(19, edge_weight=1, body_weight=1, class_reduction="sum", edge_count=edge_count, void=void)
    terms = loss(*tensors(case))
    for term in ("edge", "body"):
        assert terms[term].item() == pytest.approx(float(case[f"alt_{count}_{name}_{term}"]), rel=1e-5)


def softmax(x, axis):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def plain_terms(student, teacher, masks, alpha, temperature, class_reduction, edge_count):
    """Compute the equations in float64, one image, class and position at a time."""
    images, classes = student.shape[:2]
    edge = body = 0.0
    for n in range(images):
        p, q = (softmax(z[n] * masks[n] / temperature, 0) for z in (teacher, student))
        phi = (p * (np.log(p) - np.log(q))).sum(0)
        per_class, counts = [], []
        for c in range(classes):
            positions = (masks[n, c] > 0).sum()
            if positions:
                per_class.append(alpha[c] * (phi * masks[n, c]).sum())
                counts.append(positions if edge_count == "positions" else masks[n, c].sum())
        if class_reduction == "pooled":
            edge += sum(per_class) / max(sum(counts), 1)
        elif per_class:
            means = [total / max(count, 1) for total, count in zip(per_class, counts, strict=True)]
            edge += np.sum(means) if class_reduction == "sum" else np.mean(means)
        for c in range(classes):
            p, q = (softmax((z[n, c] * (1 - masks[n, c]) / temperature).ravel(), 0) for z in (teacher, student))
            body += temperature**2 / classes * (p * (np.log(p) - np.log(q))).sum()
    return edge / images, body / images


@pytest.mark.parametrize("edge_count", ["positions", "mass"])
@pytest.mark.parametrize("class_reduction", ["mean", "sum", "pooled"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equations_in_float64(temperature, class_reduction, edge_count):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, 6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 4, (3, 6, 7), generator=generator).repeat_interleave(5, 1).repeat_interleave(5, 2)
    labels[1] = 2
    alpha = [1.0, 2.0, 3.0, 4.0, 5.0]
    loss = BPKDLoss(
        5,
        edge_weight=3,
        body_weight=2,
        alpha=alpha,
        temperature=temperature,
        class_reduction=class_reduction,
        edge_count=edge_count,
    )
    terms = loss(student, teacher, labels)
    masks = edge_masks(labels, 5, (6, 7)).double().numpy()
    edge, body = plain_terms(student.numpy(), teacher.numpy(), masks, alpha, temperature, class_reduction, edge_count)
    assert terms["edge"].item() == pytest.approx(3 * edge, rel=1e-6)
    assert terms["body"].item() == pytest.approx(2 * body, rel=1e-6)


def test_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    masks = torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: bpkd_edge(z, teacher, masks), student)
    assert torch.autograd.gradcheck(lambda z: bpkd_body(z, teacher, masks, temperature=2.0), student)


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("share", [0, 0.3, 1], ids=["no-edge", "some", "all"])
def test_the_divergence_from_masked_logits_equals_that_from_all(share, scale):
    """The first is computed on a CPU, the second on other devices."""
    generator = torch.Generator().manual_seed(2)
    student, teacher, masks = (torch.randn(2, 3, 50, generator=generator, dtype=torch.float64) for _ in range(3))
    masks = masks.sigmoid() * (torch.rand(masks.shape, generator=generator) < share)
    results = []
    for divergence in (masked_class_kl, dense_class_kl):
        logits = (scale * student).requires_grad_()
        phi = divergence(logits, scale * teacher, masks, 2.0)
        (gradient,) = torch.autograd.grad((phi * masks.sum(1)).sum(), logits)
        results.append((phi.detach(), gradient))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classes", [19, 150])
def test_other_devices_than_the_cpu_are_not_waited_for(classes):
    """Tensors on the device "meta" have no values: an operation that depends on values raises an error."""
    student = torch.randn(2, classes, 8, 16, device="meta", requires_grad=True)
    masks = edge_masks(torch.zeros(2, 64, 128, dtype=torch.uint8, device="meta"), classes, (8, 16))
    terms = [compute(student, student.detach(), masks) for compute in (bpkd_edge, bpkd_body)]
    sum(terms).backward()
    assert student.grad.shape == student.shape


@pytest.mark.parametrize("fill", [pytest.param(1, id="one-class"), pytest.param(255, id="void-only")])
def test_no_edge_gives_exactly_zero(fill):
    student = torch.randn(2, 3, 8, 8).requires_grad_()
    labels = torch.full((2, 32, 32), fill, dtype=torch.uint8)
    edge = BPKDLoss(3)(student, torch.randn(2, 3, 8, 8), labels)["edge"]
    edge.backward()
    assert edge.item() == 0
    assert student.grad.abs().max() == 0


def test_equal_logits_give_zero():
    logits = torch.randn(2, 3, 8, 8)
    labels = torch.randint(0, 3, (2, 32, 32))
    assert all(abs(term.item()) < 1e-6 for term in BPKDLoss(3)(logits, logits.clone(), labels).values())


def test_teacher_is_resized_to_the_student_and_gets_no_gradient():
    student = torch.randn(1, 3, 8, 8).requires_grad_()
    teacher = torch.randn(1, 3, 16, 16).requires_grad_()
    labels = torch.randint(0, 3, (1, 32, 32))
    loss = BPKDLoss(3)
    terms = loss(student, SegmentationOutput(teacher), labels)
    resized = torch.nn.functional.interpolate(teacher, (8, 8), mode="bilinear", align_corners=False)
    assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in loss(student, resized, labels).items()}
    sum(terms.values()).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_do_not_overflow(dtype):
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(1, 3, 64, 64, generator=generator) * 3000).to(dtype).requires_grad_()
    teacher = (torch.randn(1, 3, 64, 64, generator=generator) * 3000).to(dtype)
    labels = torch.randint(0, 3, (1, 16, 16), generator=generator).repeat_interleave(16, 1).repeat_interleave(16, 2)
    expected = BPKDLoss(3)(student.detach().float(), teacher.float(), labels)
    with torch.autocast("cpu", dtype=dtype):
        terms = BPKDLoss(3)(student, teacher, labels)
    sum(terms.values()).backward()
    assert all(terms[name].item() == pytest.approx(expected[name].item(), rel=1e-5) for name in expected)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 7, "temperature": 0}, "`temperature`.*above 0"),
        ({"edge_weight": -1}, "weight of 'edge'"),
        ({"body_weight": float("nan")}, "weight of 'body'"),
        ({"class_reduction": "average"}, "one of {'mean', 'sum', 'pooled'}"),
        ({"edge_count": "position"}, "Did you mean 'positions'"),
        ({"alpha": [1.0, 2.0]}, "one number or 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BPKDLoss(3, **arguments)


def test_bad_tensors_are_named():
    loss, labels = BPKDLoss(3), torch.zeros(2, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"agree in images and classes.*\(2, 3\) and \(2, 4\)"):
        loss(torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 2, 2), labels)
    with pytest.raises(ValueError, match="logits of 3 classes, but got 4"):
        loss(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2), labels)
    with pytest.raises(ValueError, match="labels for 1 images, but got 2"):
        loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), labels)


def test_methods_by_name():
    assert create_method("bpkd", 3).weights == {"edge": 1, "body": 2}
    paper = create_method("bpkd_paper", 3)
    assert (paper.weights, paper.class_reduction) == ({"edge": 50, "body": 20}, "pooled")
    with pytest.raises(ValueError, match="Did you mean 'bpkd'"):
        create_method("bpdk", 3)
