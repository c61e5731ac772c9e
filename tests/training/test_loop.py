"""The training loop through the public functions: it learns, resumes exactly, and refuses inputs that do not fit."""

import errno
import itertools
import json
import os
import signal
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.evaluation.protocol import EvaluationProtocol
from bpkd_sdk.losses import BPKDLoss
from bpkd_sdk.output import SegmentationOutput
from bpkd_sdk.training import loop
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.label_losses import cross_entropy
from bpkd_sdk.training.monitor import DominantTermWarning
from tests.networks import tiny

TRAIN, VAL = ShapesDataset("train", length=10, size=(48, 48)), ShapesDataset("val", length=3, size=(48, 40))
OPTIONS = {"batch_size": 2, "crop_size": (32, 32), "device": "cpu", "check_data": False, "log_every": 2}


class Watched(BPKDLoss):
    """Calls a function in one of its forward passes. Attributes with an underscore are not arguments of a method."""

    _at, _calls = 0, 0

    def forward(self, *inputs):
        self._calls += 1
        if self._calls == self._at:
            self._do()
        return super().forward(*inputs)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_distillation_brings_the_student_to_the_teacher(tmp_path):
    teacher, student = tiny(9, seed=1).eval(), tiny(9, seed=2)
    before, teacher_weights = bpkd_sdk.evaluate(student, VAL, reference=teacher), weights(teacher)
    result = bpkd_sdk.distill(
        teacher, student, (TRAIN, VAL), steps=60, labels="teacher", optimizer="adamw", learning_rate=5e-3,
        output_dir=tmp_path, **OPTIONS,
    )  # fmt: skip
    assert before.pixel_accuracy < 0.5
    assert result.metrics.pixel_accuracy > 0.8
    assert_same(teacher_weights, weights(teacher))


def test_training_lowers_the_loss_and_writes_what_it_says(tmp_path):
    result = bpkd_sdk.train(
        tiny(9), (TRAIN, VAL), steps=40, optimizer="adamw", learning_rate=1e-2, evaluate_every=20, output_dir=tmp_path,
        **OPTIONS,
    )  # fmt: skip
    losses = [record["terms"]["ce"] for record in result.history if "terms" in record]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert [record["step"] for record in result.history if "metrics" in record] == [20, 40]
    assert result.metrics.miou == pytest.approx(result.history[-1]["metrics"]["miou"])
    assert result.history == [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert not result.model.training
    again = bpkd_sdk.load_model(result.checkpoint, model=tiny(9, seed=5))
    assert_same(weights(result.model), weights(again))
    assert again.spec.class_names == TRAIN.class_names
    best = max(record["metrics"]["miou"] for record in result.history if "metrics" in record)
    loaded = bpkd_sdk.load_model(tmp_path / "best.safetensors", model=tiny(9))
    assert bpkd_sdk.evaluate(loaded, VAL).miou == pytest.approx(best)


def test_first_step_is_sgd_by_hand(tmp_path):
    """One step of SGD with default options equals the same step computed from the batch of the loader."""
    from bpkd_sdk.training.loader import training_loader

    config = TrainingConfig(steps=1, batch_size=2, crop_size=(32, 32))
    images, labels = next(iter(training_loader(TRAIN, config, (32, 32), first_step=0, on_gpu=False)))
    by_hand = tiny(9)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    logits = by_hand((images / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    logits = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
    F.cross_entropy(logits, labels.long(), ignore_index=255).backward()
    optimizer.step()
    model = tiny(9)
    bpkd_sdk.train(model, (TRAIN, None), steps=1, output_dir=tmp_path, **OPTIONS)
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, optimizer, workers):
    options = OPTIONS | {"steps": 9, "optimizer": optimizer, "workers": workers, "evaluate_every": 4, "seed": 3}
    teacher = tiny(9, seed=1).eval()
    whole = bpkd_sdk.distill(teacher, tiny(9, dropout=0.3), (TRAIN, VAL), output_dir=tmp_path / "whole", **options)

    method = Watched(9)
    method._at, method._do = 5, lambda: os.kill(os.getpid(), signal.SIGINT)
    options |= {"output_dir": tmp_path / "parts"}
    advice = (
        f"of 9, with a checkpoint. To continue, repeat the call with output_dir='{tmp_path / 'parts'}' and resume=True"
    )
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step 5 {advice}"):
        bpkd_sdk.distill(teacher, tiny(9, dropout=0.3), (TRAIN, VAL), method=method, **options)
    usable = bpkd_sdk.load_model(tmp_path / "parts" / "last.safetensors", model=tiny(9))
    assert not torch.equal(next(usable.parameters()), next(whole.model.parameters()))
    parts = bpkd_sdk.distill(
        teacher, tiny(9, seed=7, dropout=0.3), (TRAIN, VAL), method=Watched(9), resume=True, **options
    )
    assert_same(weights(whole.model), weights(parts.model))
    assert parts.metrics == whole.metrics
    scored = [[r for r in run.history if "metrics" in r] for run in (whole, parts)]
    assert scored[0] == scored[1]


def test_ten_minutes_without_a_checkpoint_make_one_due(tmp_path, monkeypatch):
    options = OPTIONS | {"steps": 9, "log_every": 100}
    teacher = tiny(9, seed=1).eval()
    whole = bpkd_sdk.distill(teacher, tiny(9, dropout=0.3), (TRAIN, None), output_dir=tmp_path / "whole", **options)
    assert [record["step"] for record in whole.history] == [2, 4, 6, 8, 9]  # the evaluations that there are no data for

    def crash():
        raise MemoryError

    clock = itertools.count(step=200)  # each step takes 200 seconds
    monkeypatch.setattr(loop, "monotonic", lambda: next(clock))
    options |= {"checkpoint_every": 100, "evaluate_every": 100, "output_dir": tmp_path / "parts"}
    method = Watched(9)
    method._at, method._do = 8, crash
    with pytest.raises(MemoryError):
        bpkd_sdk.distill(teacher, tiny(9, dropout=0.3), (TRAIN, None), method=method, **options)
    parts = bpkd_sdk.distill(teacher, tiny(9, dropout=0.3), (TRAIN, None), method=Watched(9), resume=True, **options)
    assert [record["step"] for record in parts.history] == [3, 6, 9]
    assert [record["step"] for record in parts.history if "metrics" in record] == []
    assert_same(weights(whole.model), weights(parts.model))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    options = OPTIONS | {"steps": 4, "output_dir": tmp_path}
    first = bpkd_sdk.train(tiny(9), (TRAIN, VAL), **options)
    again = bpkd_sdk.train(tiny(9, seed=4), (TRAIN, VAL), resume=True, **options)
    assert_same(weights(first.model), weights(again.model))
    assert first.history == again.history
    assert first.metrics == again.metrics


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_validation_between_two_images(tmp_path, number):
    history, read = tmp_path / "run" / "history.jsonl", []

    class Interrupting(ShapesDataset):
        def __getitem__(self, index):
            if history.exists() and history.read_text():  # not in the checks before step 1
                read.append(index)
                if len(read) == 2:
                    os.kill(os.getpid(), number)
            return super().__getitem__(index)

    val = Interrupting("val", length=len(VAL), size=(48, 40))
    options = OPTIONS | {"steps": 4, "evaluate_every": 2, "output_dir": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 2 of 4, with a checkpoint.*resume=True"):
        bpkd_sdk.train(tiny(9), (TRAIN, val), **options)
    assert read == [0, 1]
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    result = bpkd_sdk.train(tiny(9), (TRAIN, val), resume=True, **options)
    whole = bpkd_sdk.train(tiny(9), (TRAIN, VAL), **options | {"output_dir": tmp_path / "whole"})
    assert [record["step"] for record in result.history if "metrics" in record] == [2, 4]
    assert_same(weights(result.model), weights(whole.model))
    assert result.metrics == whole.metrics


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    runs = [
        bpkd_sdk.train(tiny(9), (TRAIN, None), steps=3, seed=seed, output_dir=tmp_path / str(i), **OPTIONS)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert_same(weights(runs[0].model), weights(runs[1].model))
    assert not torch.equal(next(runs[0].model.parameters()), next(runs[2].model.parameters()))


@pytest.mark.parametrize("crash_at", [4, 7], ids=["before-any-checkpoint", "after-one"])
def test_a_crash_leaves_the_history_of_the_last_checkpoint(tmp_path, crash_at):
    options = OPTIONS | {"steps": 8, "checkpoint_every": 4, "evaluate_every": 8, "output_dir": tmp_path}

    def crash():
        raise MemoryError

    teacher, method = tiny(9, seed=1).eval(), Watched(9)
    method._at, method._do = crash_at, crash
    with pytest.raises(MemoryError):
        bpkd_sdk.distill(teacher, tiny(9), (TRAIN, None), method=method, **options)
    result = bpkd_sdk.distill(teacher, tiny(9), (TRAIN, None), method=Watched(9), resume=True, **options)
    assert [record["step"] for record in result.history] == [2, 4, 6, 8]


@pytest.mark.parametrize("full_at", ["last", "resume", "best", "scored"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, full_at):
    options = OPTIONS | {"steps": 6, "checkpoint_every": 2, "evaluate_every": 4}
    whole = bpkd_sdk.train(tiny(9), (TRAIN, VAL), output_dir=tmp_path / "whole", **options)
    synced, fsync = [], os.fsync
    of_step_4 = ["last", "resume", "best", "scored"]
    of_step_2 = ["trial", "history.jsonl", "run.json", "last of step 2", "resume of step 2"]
    before = [*of_step_2, *of_step_4[: of_step_4.index(full_at)]]

    def fill_up(number):
        if len(synced) == len(before):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced.append(number)
        fsync(number)

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", fill_up)
        with pytest.raises(OSError, match="checkpoint of step 4 .*No space left.* resume=True"):
            bpkd_sdk.train(tiny(9), (TRAIN, VAL), output_dir=tmp_path / "parts", **options)
    assert not list((tmp_path / "parts").glob(".*"))
    usable = bpkd_sdk.load_model(tmp_path / "parts" / "last.safetensors", model=tiny(9))
    assert usable.provenance["step"] == (2 if full_at == "last" else 4)
    parts = bpkd_sdk.train(tiny(9, seed=4), (TRAIN, VAL), output_dir=tmp_path / "parts", resume=True, **options)
    assert [record["step"] for record in parts.history] == [2, 4, 4, 6, 6]
    assert_same(weights(whole.model), weights(parts.model))
    best = [bpkd_sdk.load_model(tmp_path / run / "best.safetensors", model=tiny(9)) for run in ("whole", "parts")]
    assert_same(*map(weights, best))


def test_auxiliary_head_and_dict_and_object_outputs(tmp_path):
    class Auxiliary(nn.Module):
        """Returns a dict of two heads, like the networks of torchvision."""

        def __init__(self):
            super().__init__()
            self.body = tiny(9)
            self.aux = nn.Conv2d(3, 9, 1)

        def forward(self, images):
            return {"out": self.body(images), "aux": self.aux(images[:, :, ::8, ::8])}

    class HuggingFace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny(9, seed=1)

        def forward(self, pixel_values):
            return SegmentationOutput(self.body(pixel_values))

    model = Auxiliary()
    before = model.aux.weight.clone()
    result = bpkd_sdk.distill(HuggingFace().eval(), model, (TRAIN, None), steps=2, output_dir=tmp_path, **OPTIONS)
    terms = result.history[0]["terms"]
    assert list(terms) == ["ce", "aux", "edge", "body"]
    assert result.history[0]["loss"] == pytest.approx(sum(terms.values()))
    assert not torch.equal(before, model.aux.weight)


def test_unlabelled_images_with_the_teachers_labels(tmp_path):
    unlabelled = ShapesDataset("train", length=6, size=(48, 48))
    unlabelled.has_labels = False
    with pytest.raises(ValueError, match="labels='teacher'"):
        bpkd_sdk.distill(tiny(9, seed=1).eval(), tiny(9), (unlabelled, None), steps=2, output_dir=tmp_path, **OPTIONS)
    result = bpkd_sdk.distill(
        tiny(9, seed=1).eval(), tiny(9), (unlabelled, unlabelled), steps=2, labels="teacher", output_dir=tmp_path,
        **OPTIONS,
    )  # fmt: skip
    assert result.history[0]["terms"]["edge"] > 0
    assert 0 <= result.metrics.pixel_accuracy <= 1


def test_a_loud_term_is_warned_of(tmp_path):
    method = BPKDLoss(9, edge_weight=1e5)
    with pytest.warns(DominantTermWarning, match="'edge' is .* times the cross-entropy") as caught:
        bpkd_sdk.distill(
            tiny(9, seed=1).eval(), tiny(9), (TRAIN, None), method=method, steps=4, output_dir=tmp_path, **OPTIONS
        )
    assert sum(warning.category is DominantTermWarning for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", DominantTermWarning)
        bpkd_sdk.distill(tiny(9, seed=1).eval(), tiny(9), (TRAIN, None), steps=2, output_dir=tmp_path / "2", **OPTIONS)


def test_cross_entropy_leaves_void_out_and_survives_nothing_but_void():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    labels = torch.tensor([[[0, 255], [2, 1]]])
    expected = -(logits.log_softmax(1)[0, [0, 2, 1], [0, 1, 1], [0, 0, 1]]).mean()
    assert cross_entropy(logits, labels, 255).item() == pytest.approx(expected.item())
    empty = cross_entropy(logits, torch.full((1, 2, 2), 255), 255)
    empty.backward()
    assert empty.item() == 0
    assert logits.grad.abs().max() == 0


class Exploding(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = tiny(9)

    def forward(self, images):
        return self.body(images) * (float("nan") if self.training else 1)


@pytest.mark.parametrize(
    ("teacher", "student", "options", "error", "message"),
    [
        pytest.param(
            tiny(5).eval(), tiny(9), {}, ValueError, "teacher predicts 5 classes, but shapes/train has 9", id="classes"
        ),
        pytest.param(tiny(9).eval(), tiny(4), {}, ValueError, "student predicts 4 classes", id="student-classes"),
        pytest.param(tiny(9), tiny(9), {}, ValueError, r"teacher is in training mode.*teacher.eval\(\)", id="mode"),
        pytest.param(
            tiny(9).eval(), Exploding(), {}, FloatingPointError, "ce is nan, .* between steps 1 and 1", id="nan"
        ),
        pytest.param(tiny(9).eval(), tiny(9), {"steps": 0}, ValueError, "`steps`", id="steps"),
        pytest.param(tiny(9).eval(), tiny(9), {"step": 3}, TypeError, "Did you mean 'steps'", id="unknown-option"),
        pytest.param(tiny(9).eval(), tiny(9), {"precision": "half"}, ValueError, "`precision`.*'half'", id="precision"),
        pytest.param(
            tiny(9).eval(), tiny(9), {"device": "cuda"}, RuntimeError, "torch sees 0 CUDA devices", id="device"
        ),
        pytest.param(tiny(9).eval(), tiny(9), {"method": "bpdk"}, ValueError, "Did you mean 'bpkd'", id="method"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, teacher, student, options, error, message):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(error, match=message):
        bpkd_sdk.distill(
            teacher, student, (TRAIN, None), **{"steps": 2, "output_dir": tmp_path / "run"} | OPTIONS | options
        )
    assert not (tmp_path / "run" / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 2.5}, "`steps` to be a whole number, but got 2.5"),
        ({"steps": "5"}, "`steps` to be a whole number, but got '5'"),
        ({"batch_size": True}, "`batch_size` to be a whole number, but got True"),
        ({"learning_rate": "0.1"}, "`learning_rate` to be a number, but got '0.1'"),
        (
            {"crop_size": 64},
            r"`crop_size` to be \(height, width\), two whole numbers of at least 1, but got 64. For a square, pass \(64, 64\)",
        ),
        ({"gradient_clip": 0}, "`gradient_clip` to be above 0, but got 0"),
        ({"gradient_clip": -1.0}, "`gradient_clip` to be above 0, but got -1.0"),
        ({"learning_rate": -0.1}, "`learning_rate` to be above 0"),
        ({"weight_decay": -1e-4}, "`weight_decay` to be at least 0"),
        ({"aux_weight": -0.4}, "`aux_weight` to be at least 0"),
        ({"workers": -1}, "`workers` to be at least 0"),
        ({"seed": -1}, "`seed` to be at least 0"),
        (
            {"crop_size": (512,)},
            r"`crop_size` to be \(height, width\), two whole numbers of at least 1, but got \(512,\)",
        ),
        ({"teacher_mean": (0.5,) * 17}, "`teacher_mean` to be 1 to 16 numbers"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_options(option)


@pytest.mark.parametrize(
    "option",
    [{"labels": "teacher"}, {"method_warmup": 3}, {"teacher_precision": "fp32"}, {"teacher_mean": (0.5, 0.5, 0.5)}],
    ids=str,
)
def test_options_of_a_teacher_are_refused_without_one(option, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* needs a teacher, and train.. has none"):
        bpkd_sdk.train(tiny(9), (TRAIN, None), output_dir=tmp_path / "run", **OPTIONS, **option)
    assert not (tmp_path / "run").exists()


def test_runs_without_a_folder_do_not_share_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {bpkd_sdk.train(tiny(9), (TRAIN, None), steps=1, **OPTIONS).output_dir for _ in range(3)}
    assert len(folders) == 3


def test_a_teacher_and_a_method_are_required(tmp_path):
    with pytest.raises(TypeError, match=r"Use train\(\) to train without them"):
        bpkd_sdk.distill(tiny(9).eval(), tiny(9), (TRAIN, None), method=None, output_dir=tmp_path / "run", **OPTIONS)
    with pytest.raises(TypeError, match="`protocol` to be an EvaluationProtocol, but got dict"):
        bpkd_sdk.train(tiny(9), (TRAIN, None), protocol={"mode": "whole"}, output_dir=tmp_path / "run", **OPTIONS)


def test_a_run_that_failed_in_its_first_step_can_start_again(tmp_path):
    options = OPTIONS | {"steps": 1, "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match="too small for the student's batch norm"):
        bpkd_sdk.train(
            nn.Sequential(tiny(9), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(9)),
            (TRAIN, None),
            **options | {"batch_size": 1},
        )
    assert bpkd_sdk.train(tiny(9), (TRAIN, None), **options).history[-1]["step"] == 1


def test_a_crop_the_network_cannot_take_is_refused(tmp_path):
    class Deep(nn.Module):
        def forward(self, images):
            return F.avg_pool2d(images, 64)

    with pytest.raises(ValueError, match=r"student cannot process a crop of \(32, 32\)"):
        bpkd_sdk.train(Deep(), (TRAIN, None), steps=1, output_dir=tmp_path, **OPTIONS)
    network = bpkd_sdk.create_model("smp/FPN/tu-mobilenetv3_small_050", 9)
    with pytest.raises(ValueError, match=r"multiples of 32, as the student requires.*Nearest: \(32, 64\)"):
        bpkd_sdk.train(network, (TRAIN, None), steps=1, output_dir=tmp_path, **OPTIONS | {"crop_size": (40, 60)})


def test_a_run_is_not_overwritten_nor_resumed_with_other_options(tmp_path):
    options = OPTIONS | {"output_dir": tmp_path, "steps": 2}
    bpkd_sdk.train(tiny(9), (TRAIN, None), **options)
    with pytest.raises(FileExistsError, match="resume=True"):
        bpkd_sdk.train(tiny(9), (TRAIN, None), **options)
    with pytest.raises(ValueError, match="steps: was 2, is 3"):
        bpkd_sdk.train(tiny(9), (TRAIN, None), resume=True, **options | {"steps": 3})
    with pytest.raises(ValueError, match="protocol.flip: was False, is True"):
        bpkd_sdk.train(tiny(9), (TRAIN, None), resume=True, protocol=EvaluationProtocol(flip=True), **options)


def test_validation_follows_the_protocol(tmp_path):
    protocol = EvaluationProtocol(crop_size=(16, 16), base_size=(60, 40))
    result = bpkd_sdk.train(tiny(9), (TRAIN, VAL), steps=2, protocol=protocol, output_dir=tmp_path, **OPTIONS)
    assert result.metrics == bpkd_sdk.evaluate(result.model, VAL, protocol=protocol)
    assert result.metrics != bpkd_sdk.evaluate(result.model, VAL)
    assert json.loads((tmp_path / "run.json").read_text())["protocol"]["crop_size"] == [16, 16]


def test_a_result_is_no_network_and_the_error_names_the_one_in_it(tmp_path):
    result = loop.TrainingResult(tiny(9).eval(), None, [], tmp_path / "last.safetensors", tmp_path)
    size, data = (64, 64), (TRAIN, VAL)
    for use in (
        lambda: bpkd_sdk.train(result, data, steps=1, output_dir=tmp_path / "run", **OPTIONS),
        lambda: bpkd_sdk.distill(result, tiny(9), data, steps=1, output_dir=tmp_path / "run", **OPTIONS),
        lambda: bpkd_sdk.compare(tiny(9).eval(), result, data, steps=1, output_dir=tmp_path / "run", device="cpu"),
        lambda: bpkd_sdk.evaluate(result, VAL),
        lambda: bpkd_sdk.profile(result),
        lambda: bpkd_sdk.load_model(result),
        lambda: bpkd_sdk.save_model(result, tmp_path / "m.safetensors"),
        lambda: bpkd_sdk.save_pretrained(result, tmp_path / "m", input_size=size, license="mit"),
        lambda: bpkd_sdk.to_onnx(result, tmp_path / "m.onnx", input_size=size),
        lambda: bpkd_sdk.Predictor(result),
        lambda: bpkd_sdk.create_model("pspnet_r18", 9, weights=result),
    ):
        with pytest.raises(TypeError, match=r"but got a TrainingResult. Pass the network in it, which is .model"):
            use()
    for use in (
        lambda: bpkd_sdk.quantize(result, tmp_path / "m.onnx", VAL),
        lambda: bpkd_sdk.to_tensorrt(result, tmp_path / "m.engine"),
        lambda: bpkd_sdk.to_web(result, tmp_path / "site"),
        lambda: bpkd_sdk.to_triton(result.model, tmp_path / "repository"),
    ):
        with pytest.raises(
            TypeError, match=r"exported file, but got a (TrainingResult|Sequential). Export the network"
        ):
            use()
    (row,) = bpkd_sdk.benchmark(result, device="cpu").rows
    assert "Pass the network in it, which is .model" in row.problem
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="Expected the path or the name of a network, but got a Sequential"):
        bpkd_sdk.load_model(tiny(9))


def test_interrupts_are_left_alone_outside_the_main_thread(tmp_path):
    results = []

    def work():
        results.append(bpkd_sdk.train(tiny(9), (TRAIN, None), steps=2, output_dir=tmp_path, **OPTIONS))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].history[-1]["step"] == 2


def test_precision_bf16_on_the_cpu(tmp_path):
    model = tiny(9)
    result = bpkd_sdk.distill(
        tiny(9, seed=1).eval(), model, (TRAIN, None), steps=2, precision="bf16", output_dir=tmp_path, **OPTIONS
    )
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
    assert result.model(torch.zeros(1, 3, 32, 32)).dtype is torch.float32
