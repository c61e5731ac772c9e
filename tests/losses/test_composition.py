"""Tests of a composition of methods: its terms, its state, and a training run with it."""

import pytest
import torch
from safetensors import safe_open

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import BPKDLoss, CanonicalKDLoss, CIRKDLoss, Composition, CWDLoss, SKDSLoss, create_method
from bpkd_sdk.losses.method import DistillationLoss
from tests.losses.cases import LABELS, outputs, prepared, step
from tests.networks import tiny


def test_terms_and_gradient_equal_those_of_the_single_methods():
    singles = {"bpkd": create_method("bpkd", 3), "cwd": CWDLoss(weight=3), "canonical": CanonicalKDLoss()}
    composed = prepared(create_method(["bpkd", CWDLoss(weight=3), CanonicalKDLoss()], 3))
    prepared(singles["canonical"]).load_state_dict(composed.methods["canonical"].state_dict())
    terms, student, _ = step(composed, 1)
    results = {name: step(method, 1) for name, method in singles.items()}
    expected = {f"{name}/{term}": value for name, (own, *_) in results.items() for term, value in own.items()}
    assert terms == expected
    assert list(terms) == ["bpkd/edge", "bpkd/body", "cwd/logit", "canonical/logit", "canonical/feature"]
    torch.testing.assert_close(student.logits.grad, sum(own.logits.grad for _, own, _ in results.values()))
    assert composed.weights["cwd/logit"] == 3
    assert composed.weights.keys() >= terms.keys()


def test_two_methods_of_the_same_name_are_numbered_and_independent():
    method = prepared(create_method(["cwd", CWDLoss(feature_weight=1), "bpkd_paper", CWDLoss(feature_weight=2)], 3))
    assert list(step(method, 1)[0]) == [
        "cwd/logit", "cwd2/logit", "cwd2/feature", "bpkd_paper/edge", "bpkd_paper/body", "cwd3/logit", "cwd3/feature",
    ]  # fmt: skip
    assert method.name == "cwd+cwd2+bpkd_paper+cwd3"
    assert list(method.state_dict()) == ["methods.cwd2.projection.weight", "methods.cwd3.projection.weight"]


def test_the_state_is_restored():
    """The methods have a critic with its optimiser, a memory and a projection."""

    def make(seed):
        return prepared(Composition([SKDSLoss(), CIRKDLoss(), CanonicalKDLoss()]), seed)

    first, second = make(0), make(1)
    step(first, 1)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert step(first, 2)[0] == step(second, 2)[0]
    assert step(first, 3)[0] == step(second, 3)[0]


@pytest.mark.parametrize(
    ("methods", "needed"), [(["bpkd", "cwd"], False), (["bpkd", "ifvd"], True)], ids=["logits", "features"]
)
def test_features_are_needed_if_one_method_needs_them(methods, needed):
    assert create_method(methods, 3).needs_features == needed


def test_terms_of_a_users_method_have_its_name():
    class Constant(DistillationLoss):
        name = "constant"

        def forward(self, student, teacher, labels):
            return {"one": torch.ones(())}

    assert create_method([Constant(), Constant()], 3)(*outputs(), LABELS) == {"constant/one": 1, "constant2/one": 1}


CWD = CWDLoss()


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (["bpkd", "cdw"], ValueError, "`method` to be one of .* but got 'cdw'. Did you mean 'cwd'?"),
        ([], ValueError, "at least one method, but got none"),
        ([CWD, CWD], ValueError, "the same object twice"),
        ([CWDLoss], TypeError, r"a method such as CWDLoss\(weight=3\)"),
        (3, TypeError, "the name of a method.*but got 3"),
    ],
    ids=["unknown", "empty", "twice", "class", "number"],
)
def test_values_that_are_not_methods_are_refused(method, error, message):
    with pytest.raises(error, match=message):
        create_method(method, 3)


def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="logits of 5 classes, but got 3"):
        create_method(["cwd", BPKDLoss(5)], 3).prepare(*outputs())


class Crash(CWDLoss):
    """A method that raises an error in its fourth step."""

    _calls = 0

    def forward(self, *inputs):
        self._calls += 1
        if self._calls == 4:
            raise MemoryError
        return super().forward(*inputs)


def test_distills_and_resumes(tmp_path):
    data = ShapesDataset("train", length=8, size=(48, 48))
    options = {"batch_size": 2, "crop_size": (32, 32), "device": "cpu", "check_data": False, "log_every": 1}

    def run(folder, cwd, resume=False):
        torch.manual_seed(0)
        return bpkd_sdk.distill(
            tiny(9, width=12, seed=1).eval(), tiny(9), (data, None), method=["bpkd", cwd, "skds", "cirkd"], steps=4,
            evaluate_every=2, output_dir=tmp_path / folder, resume=resume, **options,
        )  # fmt: skip

    whole = run("whole", CWDLoss(weight=3))
    with pytest.raises(MemoryError):
        run("parts", Crash(weight=3))
    parts = run("parts", Crash(weight=3), resume=True)
    assert [record["terms"] for record in parts.history] == [record["terms"] for record in whole.history]
    assert {"ce", "bpkd/edge", "cwd/logit", "skds/adversarial", "cirkd/memory_pixel"} < whole.history[0]["terms"].keys()
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[key], value, rtol=0, atol=0)
    with safe_open(whole.checkpoint, framework="pt") as file:
        assert set(file.keys()) == set(tiny(9).state_dict())
