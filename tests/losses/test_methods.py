"""Tests that every method must pass."""

import pytest
import torch
from torch import nn

from bpkd_sdk.losses import (
    METHODS,
    BPKDLoss,
    CanonicalKDLoss,
    CIRKDLoss,
    CWDLoss,
    DISTLoss,
    IFVDLoss,
    SKDSLoss,
    create_method,
)
from bpkd_sdk.output import SegmentationOutput
from tests.losses.cases import LABELS, STUDENT, TEACHER, outputs, prepared, random_output, step

EVERY = {**METHODS, **{f"{cls.__name__}.paper": cls.paper for cls in (CWDLoss, SKDSLoss, IFVDLoss, CIRKDLoss)}}


@pytest.fixture(params=EVERY)
def make(request):
    return lambda: EVERY[request.param](3, ignore_index=255)


def test_terms_are_finite_scalars_and_reach_the_student_only(make):
    method = prepared(make())
    terms, student, teacher = step(method, 1)
    assert all(term.shape == () and torch.isfinite(term) for term in terms.values())
    assert student.logits.grad.abs().max() > 0
    assert method.needs_features == (student.features["neck"].grad is not None)
    assert teacher.logits.grad is None
    assert teacher.features["neck"].grad is None
    assert all((weight.grad is not None) == weight.requires_grad for weight in method.parameters())


def test_the_same_seed_gives_the_same_run_and_a_resumed_run_continues_equally(make):
    def run(method, seeds):
        return [{name: term.item() for name, term in step(method, seed)[0].items()} for seed in seeds]

    first, second = prepared(make()), prepared(make())
    assert run(first, (1, 2)) == run(second, (1, 2))
    resumed = prepared(make(), seed=5)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    resumed.load_state_dict(state)
    assert run(first, (3, 4)) == run(resumed, (3, 4))


@pytest.mark.parametrize("cls", [BPKDLoss, CWDLoss, SKDSLoss, IFVDLoss, CIRKDLoss, CanonicalKDLoss, DISTLoss])
def test_the_number_of_classes_is_taken_from_the_first_logits(cls):
    explicit, inferred = prepared(cls(3)), prepared(cls())
    assert inferred.num_classes == 3
    assert step(explicit, 1)[0] == step(inferred, 1)[0]
    with pytest.raises(ValueError, match="logits of 3 classes, but got 4"):
        inferred.prepare(*(random_output(2, 4, 4, (9, 12)) for _ in range(2)))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (BPKDLoss(alpha=[1.0, 2.0]), "`alpha` to be one number or 3"),
        (CIRKDLoss(pixel_queue=2), "at least 3, one entry for each class, but got 2"),
    ],
    ids=["alpha", "queue"],
)
def test_arguments_are_checked_once_the_number_of_classes_is_known(method, message):
    with pytest.raises(ValueError, match=message):
        method.prepare(*outputs())


def test_logits_are_enough_where_no_features_are_needed(make):
    method = make()
    if method.needs_features:
        method.prepare(*outputs())
        with pytest.raises(ValueError, match="one feature map of the student"):
            method(*(output.logits for output in outputs()), LABELS)
    else:
        student, teacher = outputs()
        expected = method(student, teacher, LABELS)
        assert method(student.logits, teacher.logits, LABELS) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(make, dtype):
    def halved(output, back):
        values = [x.detach().to(dtype) for x in (output.logits, output.features["neck"])]
        logits, feature = (x.float() if back else x for x in values)
        return SegmentationOutput(logits.requires_grad_(), {"neck": feature.requires_grad_()})

    results = []
    for back in (True, False):
        method = prepared(make())
        student, teacher = (halved(output, back) for output in outputs())
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=not back):
            terms = method(student, teacher, LABELS)
        torch.stack(list(terms.values())).sum().backward()
        assert torch.isfinite(student.logits.grad).all()
        results.append({name: term.item() for name, term in terms.items()})
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "labels",
    [pytest.param(torch.full((1, 36, 48), fill), id=name) for name, fill in (("void-only", 255), ("one-class", 2))],
)
def test_batch_of_one_with_one_label(make, labels):
    student, teacher = (random_output(1, *shape, seed=shape[1]) for shape in (STUDENT, TEACHER))
    method = make()
    method.prepare(student, teacher)
    terms = method(student, teacher, labels)
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert torch.isfinite(student.logits.grad).all()


@pytest.mark.parametrize("make", [CWDLoss.paper, CanonicalKDLoss], ids=["cwd", "canonical"])
def test_trainable_parts_are_trained_with_the_student(make):
    """Training only the projection reduces the sum of the terms."""
    method = prepared(make(3))
    trainable = [weight for weight in method.parameters() if weight.requires_grad]
    assert trainable
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    totals = []
    for _ in range(15):
        optimizer.zero_grad()
        totals.append(torch.stack(list(step(method, 1)[0].values())).sum().item())
        optimizer.step()
    assert totals[-1] < totals[0]


def test_a_method_whose_weights_are_all_0_is_refused():
    with pytest.raises(
        ValueError, match="one weight of CWDLoss to be above 0, but the weights of logit, feature are 0"
    ):
        CWDLoss(3, weight=0)


def test_methods_by_name():
    assert list(METHODS) == ["bpkd", "bpkd_paper", "cwd", "skds", "ifvd", "cirkd", "canonical", "dist"]
    for name in METHODS:
        assert create_method(name, 3, ignore_index=-1).ignore_index == -1
    with pytest.raises(ValueError, match="Did you mean 'cirkd'"):
        create_method("cirdk", 3)
    method = CWDLoss(3)
    assert create_method(method, 3) is method
    assert isinstance(method, nn.Module)
