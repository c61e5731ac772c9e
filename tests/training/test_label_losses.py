"""Losses on the labels beside cross-entropy, class weights, and their options, held against arithmetic in float64."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import bpkd_sdk
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.label_losses import LabelLosses, balanced_class_weights
from bpkd_sdk.training.monitor import STEPS_AT_ZERO, LiveView, LossTermMonitor, ZeroTermWarning
from tests.networks import tiny
from tests.scenes import Scenes, write_folder

DATA = Scenes()
OPTIONS = {"steps": 1, "batch_size": 4, "crop_size": (32, 32), "device": "cpu", "log_every": 1, "check_data": False}
ALL = {"ce": 1.0, "dice": 1.0, "focal": 1.0, "lovasz": 1.0}


def case(classes, void, logits=None):
    """Return random logits (2, C, 4, 5) in float64 and labels of the classes but the last, with void pixels."""
    generator = torch.Generator().manual_seed(classes)
    logits = 2 * torch.randn(2, logits or classes, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(max(2, classes - 1), (2, 4, 5), generator=generator)
    labels[0, 1:3] = void
    return logits.requires_grad_(), labels


def losses(logits, labels, void, **options):
    terms = LabelLosses(ALL, void, **options)(logits, labels)
    return {name: term.item() for name, term in terms.items()}


def known_pixels(logits, labels, void):
    """Return the probabilities (P, C), logits (P, C) and labels (P,) of the labelled pixels as arrays."""
    z = logits.detach().permute(0, 2, 3, 1)[labels != void].numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return p, z, labels[labels != void].numpy()


def dice(p, y):
    scores = [
        1 - 2 * p[y == c, c].sum() / (p[:, c].sum() + (y == c).sum()) if (y == c).any() else 0
        for c in range(p.shape[1])
    ]
    return np.mean(scores)


def binary_focal(z, target):
    q = 1 / (1 + np.exp(-z))
    q = np.where(target, q, 1 - q)
    return ((1 - q) ** 2 * -np.log(q)).mean()


def lovasz(p, y):
    """Sum the sorted errors of each class times the growth of the Jaccard loss of the sets of the largest errors."""
    total = []
    for c in np.unique(y):
        errors = np.abs((y == c) - p[:, c])
        order, foreground = np.argsort(-errors), set(np.flatnonzero(y == c))
        loss, before, wrong = 0.0, 0.0, set()
        for pixel in order:
            wrong.add(pixel)
            jaccard_loss = len(wrong) / len(foreground | wrong)
            loss += errors[pixel] * (jaccard_loss - before)
            before = jaccard_loss
        total.append(loss)
    return np.mean(total)


@pytest.mark.parametrize("void", [255, -1])
def test_the_losses_equal_their_definitions_on_the_labelled_pixels(void):
    logits, labels = case(4, void)
    p, z, y = known_pixels(logits, labels, void)
    expected = {
        "ce": -np.log(p[np.arange(len(y)), y]).mean(),
        "dice": dice(p, y),
        "focal": np.mean([binary_focal(z[:, c], y == c) for c in range(4)]),
        "lovasz": lovasz(p, y),
    }
    assert losses(logits, labels, void) == pytest.approx(expected, rel=1e-6)


def test_one_logit_has_the_losses_of_two_classes():
    logits, labels = case(2, 255, logits=1)
    two = F.pad(logits.detach(), (0, 0, 0, 0, 1, 0))
    p, z, y = known_pixels(two, labels, 255)
    ours = losses(logits, labels, 255)
    expected = {"dice": dice(p, y), "lovasz": lovasz(p, y), "focal": binary_focal(z[:, 1], y == 1)}
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert losses(logits, labels, 255, class_weights=(1.0, 3.0))["ce"] == pytest.approx(
        -(np.where(y == 1, 3, 1) * np.log(p[np.arange(len(y)), y])).mean()
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_void_pixels_alone_have_no_loss_and_no_gradient(channels):
    logits = torch.randn(1, channels, 2, 2, requires_grad=True)
    terms = LabelLosses(ALL, 255, (1.0,) * max(2, channels))(logits, torch.full((1, 4, 4), 255))
    assert {name: (term.item(), term.shape) for name, term in terms.items()} == dict.fromkeys(ALL, (0.0, ()))
    torch.stack(list(terms.values())).sum().backward()
    assert logits.grad.abs().max() == 0


def test_the_losses_are_computed_in_float32_under_autocast():
    logits, labels = case(3, 255)
    half = logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        terms = LabelLosses(ALL, 255)(half, labels)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert {name: term.item() for name, term in terms.items()} == losses(half.float(), labels, 255)


def test_class_weights_multiply_the_pixels_of_their_class():
    logits, labels = case(3, 255)
    p, _, y = known_pixels(logits, labels, 255)
    weights = (0.5, 2.0, 0.0)
    ours = losses(logits, labels, 255, class_weights=weights)
    assert ours["ce"] == pytest.approx((np.array(weights)[y] * -np.log(p[np.arange(len(y)), y])).mean())
    assert ours | {"ce": 0} == losses(logits, labels, 255) | {"ce": 0}  # other losses do not use them


class Counted(Scenes):
    """Two label maps with 6 pixels of class 0, 2 of class 1, none of class 2, and void."""

    def __getitem__(self, index):
        label = torch.tensor([[0, 0, 0, 1, 255]], dtype=torch.uint8)
        return torch.zeros(3, 1, 5, dtype=torch.uint8), label


def test_balanced_weights_have_a_mean_of_1_over_the_labelled_pixels():
    assert balanced_class_weights(Counted(length=2)) == pytest.approx((8 / (2 * 6), 8 / (2 * 2), 0))


def plain():
    """A network without batch norm, so that micro-batches do not change it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))


def run(folder, **options):
    return bpkd_sdk.train(plain(), (DATA, None), output_dir=folder, **OPTIONS | options)


def test_a_run_with_all_losses_records_each(tmp_path):
    names = ("ce", "dice:0.5", "focal:2", "lovasz")
    result = run(tmp_path / "run", losses=names, class_weights="balanced", steps=2)
    record = result.history[-1]
    assert record["weights"] == {"ce": 1.0, "dice": 0.5, "focal": 2.0, "lovasz": 1.0}
    assert record["terms"].keys() == record["weights"].keys()
    assert record["loss"] == pytest.approx(sum(record["terms"].values()))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["class_weights"] == pytest.approx(balanced_class_weights(DATA))
    assert facts["config"]["losses"] == list(names)
    view = LiveView("train", 10, 0)
    view.log(record)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(view._render())
    assert all(text in capture.get() for text in ("ce", "dice", "focal", "lovasz", "0.5"))
    with pytest.raises(ValueError, match="losses"):
        run(tmp_path / "run", losses=("ce",), class_weights="balanced", steps=2, resume=True)


def test_sums_over_pixels_do_not_depend_on_micro_batches(tmp_path):
    options = {"losses": ("ce", "focal", "dice"), "class_weights": (0.5, 1, 3)}
    whole, split = (run(tmp_path / str(parts), accumulate=parts, **options).history[0]["terms"] for parts in (1, 4))
    assert (split["ce"], split["focal"]) == pytest.approx((whole["ce"], whole["focal"]), rel=1e-5)
    assert split["dice"] != pytest.approx(whole["dice"], rel=1e-3)  # the mean over micro-batches


def test_the_auxiliary_head_has_the_same_losses(tmp_path):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = plain()

        def forward(self, images):
            logits = self.body(images)
            return {"out": logits, "aux": logits}

    terms = bpkd_sdk.train(
        Auxiliary(), (DATA, None), output_dir=tmp_path, losses=("focal", "dice:2"), aux_weight=0.25, **OPTIONS
    ).history[0]["terms"]
    assert terms.keys() == {"focal", "dice", "aux"}
    assert terms["aux"] == pytest.approx(0.25 * (terms["focal"] + terms["dice"]))


def test_the_monitor_compares_with_all_losses_on_the_labels():
    monitor = LossTermMonitor((None, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.observe({"step": 1, "terms": {"dice": 0.02, "focal": 0.02, "edge": 3.9}}, first_step=0)
    with pytest.warns(UserWarning, match=r"105 times the loss on the labels \(0.04\)"):
        monitor.observe({"step": 2, "terms": {"dice": 0.02, "focal": 0.02, "edge": 4.2}}, first_step=1)
    with pytest.warns(
        ZeroTermWarning, match=r"'dice' has been exactly 0.*Check whether the labels are all void .*\)\.$"
    ):
        monitor.observe({"step": STEPS_AT_ZERO, "terms": {"dice": 0.0, "focal": 0.1}}, first_step=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": ("dise",)}, "`losses` to be one of .*but got 'dise'.*Did you mean 'dice'"),
        ({"losses": "dice"}, r"a tuple such as \('ce', 'dice:0.5'\), but got 'dice'"),
        ({"losses": ("ce", "dice:0")}, "a weight above 0"),
        ({"losses": ("ce", "dice:half")}, "a weight above 0"),
        ({"losses": ("ce", "ce:2")}, "another name"),
        ({"losses": ()}, "at least one name"),
        ({"class_weights": "equal"}, "'balanced', or one number per class.*'equal'"),
        ({"class_weights": (1, -1, 1)}, "0 or above"),
        ({"class_weights": (0, 0, 0)}, "not all 0"),
        ({"class_weights": (1, math.inf, 1)}, "one number per class"),
        ({"class_weights": (1, 2)}, r"3 numbers, one per class of scenes \(background, red, green\), but got 2"),
        ({"class_weights": (1, 2, 3), "losses": ("dice",)}, "apply to the cross-entropy"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


class Named(DistillationLoss):
    def forward(self, student, teacher, labels):
        return {"dice": student.logits.mean()}


def test_what_does_not_fit_a_method_is_refused(tmp_path):
    arguments = (tiny(3, seed=1).eval(), tiny(3), (DATA, None))
    options = OPTIONS | {"output_dir": tmp_path / "run", "check_teacher": False}
    with pytest.raises(ValueError, match="'balanced' is computed from the labels .* One number per class|predictions"):
        bpkd_sdk.distill(*arguments, labels="teacher", class_weights="balanced", **options)
    with pytest.raises(ValueError, match="returns a term with the name of another loss: dice"):
        bpkd_sdk.distill(*arguments, method=Named(), losses=("dice",), **options)


def test_a_comparison_refuses_them_before_it_scores_the_teacher(tmp_path):
    options = {key: value for key, value in OPTIONS.items() if key not in ("log_every", "check_data")}
    for wrong, message in (({"class_weights": (1, 2)}, "3 numbers"), ({"freeze_encoder_steps": 1}, "is not known")):
        with pytest.raises(ValueError, match=message):
            bpkd_sdk.compare(
                tiny(3, seed=1).eval(),
                tiny(3),
                (DATA, Scenes(length=2)),
                output_dir=tmp_path / "runs",
                **options | wrong,
            )
    assert not (tmp_path / "runs").exists()


def test_the_command_line_takes_losses_and_class_weights(bpkd, tmp_path):
    data = write_folder(tmp_path / "data", train=2, val=1, size=32)
    arguments = ["train", "smp/FPN/tu-test_resnet", "--data", data, "--device", "cpu", "--steps", 1, "--batch-size", 2,
                 "--crop-size", "32x32", "--backbone-weights", "none", "--output", tmp_path / "run"]  # fmt: skip
    code, _, errors = bpkd(*arguments, "--losses", "ce", "--losses", "dice:0.5", "--class-weights", "1,1,2.5",
                           "--freeze-encoder-steps", 1)  # fmt: skip
    assert code == 0, errors
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["config"]["losses"], facts["class_weights"]) == (["ce", "dice:0.5"], [1.0, 1.0, 2.5])
    code, _, errors = bpkd(*arguments, "--class-weights", "1;2")
    assert code != 0
    assert "'balanced', or numbers as in 1,2.5,4, but got '1;2'" in " ".join(errors.split())


def test_the_defaults_are_cross_entropy_alone():
    assert TrainingConfig().loss_weights == {"ce": 1.0}
    assert TrainingConfig.from_options(json.loads(json.dumps(TrainingConfig(class_weights=(1, 2)).to_dict()))) == (
        TrainingConfig(class_weights=(1, 2))
    )
