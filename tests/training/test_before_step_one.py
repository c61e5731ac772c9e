"""A run checks everything that it will need before its first step, and writes nothing if a check fails."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bpkd_sdk
from bpkd_sdk.evaluation import EvaluationProtocol
from tests.networks import tiny
from tests.scenes import NAMES, Scenes, write_folder

OPTIONS = {"steps": 4, "batch_size": 2, "crop_size": (32, 32), "device": "cpu", "log_every": 1, "evaluate_every": 2}
VAL = Scenes(start=100, length=2)


class Changed(Scenes):
    """Scenes whose samples pass through a function."""

    def __init__(self, change, **options):
        super().__init__(**options)
        self.change = change

    def __getitem__(self, index):
        return self.change(*super().__getitem__(index))


class OfOneSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = tiny(3)

    def forward(self, images):
        if images.shape[2:] != (32, 32):
            raise AssertionError(f"Input height ({images.shape[2]}) doesn't match model (32).")
        return self.body(images)


class NotSaved(nn.Module):
    """A network whose spec contains a number that JSON cannot represent."""

    def __init__(self):
        super().__init__()
        self.body = tiny(3)
        self.spec = bpkd_sdk.NetworkSpec(None, 3, mean=(np.float32(0.5),) * 3)

    def forward(self, images):
        return self.body(images)


def with_facts(**facts):
    """Scenes with some attributes replaced."""
    data = Scenes()
    data.__dict__.update(facts)
    return data


@pytest.mark.parametrize(
    ("network", "data", "message"),
    [
        pytest.param(tiny(3), (Changed(lambda image, label: (image.float() / 255, label)), VAL), r"scenes\[0\]: image is float32 \(3, 48, 48\), expected uint8.*from 0\.0\S* to 0\.\d+; return", id="floats"),
        pytest.param(tiny(3), (Scenes(), Changed(lambda image, label: (image.float() / 255, label))), r"image is float32", id="floats-in-validation"),
        pytest.param(tiny(3), (Changed(lambda image, label: (image.permute(1, 2, 0), label)), VAL), r"image is uint8 \(48, 48, 3\), expected uint8 \(3, H, W\)", id="channels-last"),
        pytest.param(tiny(3), (Changed(lambda image, label: (image.numpy(), label)), VAL), "image is a ndarray, expected a torch tensor", id="array"),
        pytest.param(tiny(3), (Changed(lambda image, label: (image, label.float())), VAL), r"label is float32 \(48, 48\), expected .*uint8 or int64", id="float-labels"),
        pytest.param(tiny(3), (Changed(lambda image, label: (image, label.bool())), VAL), "label is bool", id="bool-labels"),
        pytest.param(tiny(3), (Changed(lambda image, label: (image, label[None])), VAL), r"label is uint8 \(1, 48, 48\)", id="label-axes"),
        pytest.param(tiny(3), (Changed(lambda image, label: (image // 255, label)), VAL), "contain only the values 0 and 1", id="divided"),
        pytest.param(tiny(3), (Changed(lambda image, label: 1 / 0), VAL), r"scenes\[0\]: ZeroDivisionError", id="own-error"),
        pytest.param(OfOneSize(), (Scenes(), VAL), r"validation image scenes\[0\] of \(48, 48\) cannot be .*match model.*\n.*EvaluationProtocol.crop_size=", id="one-size"),
        pytest.param(NotSaved(), (Scenes(), VAL), "checkpoint of NotSaved cannot be written", id="not-saved"),
        pytest.param(tiny(3).requires_grad_(False), (Scenes(), VAL), "no parameter that requires a gradient", id="frozen"),
        pytest.param(nn.Sequential(tiny(3), nn.Threshold(torch.inf, torch.nan)), (Scenes(), VAL), "student's outputs are not finite", id="nan"),
        pytest.param(tiny(3), (Scenes(), Scenes(length=0)), "has no images to validate on", id="no-validation-images"),
        pytest.param(tiny(3), (Scenes(), Changed(lambda image, label: (image, label * 0 + 255))), "All labels of scenes are void", id="void-validation"),
        pytest.param(tiny(3), (Scenes(names=("a", "a", "b")), None), "different strings, one per class", id="names-twice"),
        pytest.param(tiny(3), (Scenes(names=(0, 1, 2)), None), "different strings, one per class", id="names-of-numbers"),
        pytest.param(tiny(3), (with_facts(ignore_index=np.int64(255)), None), "`ignore_index` an int, but got .*np.int64", id="void-of-numpy"),
        pytest.param(tiny(3), (with_facts(palette=np.zeros((3, 3), np.uint8)), None), r"one \(r, g, b\) of ints per class", id="palette-of-numpy"),
        pytest.param(tiny(1), (Scenes(names=("object",)), None), "has one class, 'object'.*'background'", id="one-class"),
        pytest.param(tiny(300), (Scenes(names=tuple(map(str, range(300)))), None), "2 to 256 classes.* has 300", id="many-classes"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, network, data, message):
    with pytest.raises(ValueError, match=message):
        bpkd_sdk.train(network, data, output_dir=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_the_first_sample_is_looked_at_also_where_the_rest_is_not(tmp_path):
    data = Changed(lambda image, label: (image.float(), label))
    with pytest.raises(ValueError, match="image is float32"):
        bpkd_sdk.train(tiny(3), (data, None), output_dir=tmp_path / "run", check_data=False, **OPTIONS)


@pytest.mark.parametrize("late", [lambda i, y: (i.float() / 255, y), lambda i, y: (i, y + 5)])
def test_samples_that_change_after_the_check_are_named(tmp_path, late):
    class Late(Scenes):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            sample = super().__getitem__(index)
            return late(*sample) if self.reads > 20 else sample

    with pytest.raises(ValueError, match=r"scenes\[\d\]: (image is float32|labels \[.*\] are outside the classes)"):
        bpkd_sdk.train(tiny(3), (Late(), None), output_dir=tmp_path, **OPTIONS | {"steps": 40})


def test_a_student_with_a_softmax_inside_is_told(tmp_path):
    class Exp(nn.Module):
        def forward(self, logits):
            return logits.exp() / logits.exp().sum(1, keepdim=True)

    with pytest.warns(UserWarning, match="The student's outputs .* contains a softmax"):
        bpkd_sdk.train(nn.Sequential(tiny(3), Exp()), (Scenes(), None), output_dir=tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        pytest.param(3, TypeError, "Expected a data set that has a length .* but got a int", id="int"),
        pytest.param([1, 2], ValueError, r"list does not state its classes.*class_names=\['background'", id="no-classes"),
        pytest.param((Scenes(), [1]), ValueError, r"list\[0\]: sample is a int, expected \(image, mask\)", id="no-images"),
        pytest.param((Scenes(), VAL, VAL), ValueError, "a pair .* but got 3 entries", id="three"),
        pytest.param((n for n in range(3)), TypeError, "but got a generator. Data that are only iterated", id="generator"),
        pytest.param(np.zeros((4, 8, 8, 3)), TypeError, r"an array, float64 \(4, 8, 8, 3\). Pair images", id="array"),
        pytest.param({"train": Scenes(), "test": VAL}, ValueError, "but `data` has 'train', 'test'. Pass a pair", id="splits"),
    ],
)  # fmt: skip
def test_what_is_no_data_set_is_named(tmp_path, data, error, message):
    class_names = NAMES[:3] if isinstance(data, tuple) else None
    with pytest.raises(error, match=message):
        bpkd_sdk.train(tiny(3), data, class_names=class_names, output_dir=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_the_path_of_a_data_set_is_not_scored():
    with pytest.raises(TypeError, match="Expected a data set .* but got a str. Open a folder .*open_dataset"):
        bpkd_sdk.evaluate(tiny(3).eval(), "data")


def test_a_void_label_inside_the_classes(tmp_path):
    root = write_folder(tmp_path / "data", {"class_names": ["void", "a", "b"], "ignore_index": 0})
    with pytest.raises(ValueError, match=r"ignore_index=0, is also the id of the class 'void'.*classes\.json"):
        bpkd_sdk.train(tiny(3), root, output_dir=tmp_path / "run", **OPTIONS)
    with pytest.raises(ValueError, match=r"ignore_index=0, is also the id of the class 'void'"):
        bpkd_sdk.evaluate(tiny(3).eval(), bpkd_sdk.open_dataset("folder", root=root, split="val"))


def test_a_network_of_one_size_is_validated_by_windows(tmp_path):
    protocol = EvaluationProtocol(crop_size=(32, 32))
    result = bpkd_sdk.train(OfOneSize(), (Scenes(), VAL), protocol=protocol, output_dir=tmp_path, **OPTIONS)
    assert result.metrics.images == 2


def test_the_largest_validation_image_is_tried(tmp_path):
    sizes = []

    class Listening(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny(3)

        def forward(self, images):
            sizes.append(tuple(images.shape[2:]))
            return self.body(images)

    root = write_folder(tmp_path / "data", train=2, val=3)
    large = np.zeros((64, 80), np.uint8)
    Image.fromarray(np.repeat(large[..., None], 3, axis=2)).save(root / "images/val/1.png")
    Image.fromarray(large).save(root / "labels/val/1.png")
    bpkd_sdk.train(Listening(), root, output_dir=tmp_path / "run", **OPTIONS)
    before_the_first_crop_of_a_batch = sizes[: sizes.index((64, 80)) + 1]
    assert set(before_the_first_crop_of_a_batch) == {(32, 32), (64, 80)}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, is_there):
    if is_there:
        (tmp_path / "run").mkdir()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        bpkd_sdk.train(tiny(3), (Scenes(), VAL), output_dir=tmp_path / "run", **OPTIONS)
    assert (tmp_path / "run").exists() == is_there
    assert not list(tmp_path.glob("run/*"))


class Failing(Scenes):
    """Raises an error at the validation after step 2, when the first checkpoint is written."""

    folder = None

    def __getitem__(self, index):
        if self.folder is not None and (self.folder / "last.safetensors").exists():
            raise RuntimeError("cannot read")
        return super().__getitem__(index)


def test_a_failing_validation_loses_no_step(tmp_path):
    whole = bpkd_sdk.train(tiny(3), (Scenes(), VAL), output_dir=tmp_path / "whole", **OPTIONS)
    data = (Scenes(), Failing(start=100, length=2))
    data[1].folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="cannot read"):
        bpkd_sdk.train(tiny(3), data, output_dir=tmp_path / "run", **OPTIONS)
    provenance = bpkd_sdk.load_model(tmp_path / "run/last.safetensors", model=tiny(3)).provenance
    assert (provenance["step"], provenance["metrics"]) == (2, None)
    data[1].folder = None
    again = bpkd_sdk.train(tiny(3, seed=9), data, output_dir=tmp_path / "run", resume=True, **OPTIONS)
    strip = [{key: record.get(key) for key in ("step", "terms", "metrics")} for record in again.history]
    assert strip == [{key: record.get(key) for key in ("step", "terms", "metrics")} for record in whole.history]
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Teacher(nn.Module):
    """Returns NaN from a given call on."""

    def __init__(self, calls):
        super().__init__()
        self.body = tiny(3, seed=1)
        self.left = calls

    def forward(self, images):
        self.left -= 1
        logits = self.body(images)
        return logits if self.left >= 0 else logits * torch.nan


@pytest.mark.filterwarnings("ignore:The teacher")
def test_a_teacher_that_is_not_finite_is_named(tmp_path):
    data = (Scenes(), None)
    with pytest.raises(ValueError, match="The teacher's outputs are not finite"):
        bpkd_sdk.distill(
            Teacher(0).eval(), tiny(3), data, output_dir=tmp_path / "a", **OPTIONS | {"crop_size": (48, 48)}
        )
    assert not (tmp_path / "a").exists()
    options = OPTIONS | {"check_teacher": False}
    with pytest.raises(FloatingPointError, match=r"The teacher's logits are not finite between steps 1 and 1\."):
        bpkd_sdk.distill(Teacher(1).eval(), tiny(3), data, output_dir=tmp_path / "b", **options)


def test_the_check_of_the_teacher_changes_nothing_of_the_run(tmp_path):
    weights = []
    for check_teacher in (True, False):
        with pytest.warns() if check_teacher else _nothing():
            result = bpkd_sdk.distill(
                tiny(3, seed=1).eval(), tiny(3, dropout=0.5), (Scenes(), None), method="skds",
                check_teacher=check_teacher, output_dir=tmp_path / str(check_teacher), **OPTIONS,
            )  # fmt: skip
        weights.append(result.model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def interrupted(tmp_path, teacher, data, **options):
    """A run that is stopped after its checkpoint at step 2."""

    class Stopping(type(data[0])):
        def __getitem__(self, index):
            if (tmp_path / "resume.safetensors").is_file():
                raise InterruptedError
            return super().__getitem__(index)

    stopping = Stopping.__new__(Stopping)
    stopping.__dict__.update(data[0].__dict__)
    with pytest.raises(InterruptedError):
        bpkd_sdk.distill(teacher, tiny(3), (stopping, data[1]), output_dir=tmp_path, **OPTIONS | options)


@pytest.mark.filterwarnings("ignore:The teacher")
@pytest.mark.parametrize(
    ("teacher", "data", "named"),
    [
        pytest.param(tiny(3, seed=1), (Scenes(), VAL), None, id="the same"),
        pytest.param(tiny(3, seed=2), (Scenes(), VAL), r"teacher\.sha256: was ", id="teacher"),
        pytest.param(tiny(3, seed=1), (Scenes(start=50), VAL), r"data\.train\.fingerprint: was ", id="images"),
        pytest.param(tiny(3, seed=1), (Scenes(), Scenes(start=200, length=2)), r"data\.val\.fingerprint", id="validation"),
        pytest.param(tiny(3, seed=1), (Scenes((0, 2, 1)), Scenes((0, 2, 1), start=100, length=2)), r"data\.train\.class_names: was \['background', 'red', 'green'\], is \['background', 'green', 'red'\]", id="order"),
    ],
)  # fmt: skip
def test_a_run_goes_on_with_its_own_inputs_only(tmp_path, teacher, data, named):
    interrupted(tmp_path, tiny(3, seed=1).eval(), (Scenes(), VAL))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def go_on():
        return bpkd_sdk.distill(teacher.eval(), tiny(3), data, output_dir=tmp_path, resume=True, **OPTIONS)

    if named is None:
        assert go_on().history[-1]["step"] == 4
        return
    with pytest.raises(ValueError, match=rf"started with other inputs.*\n(.*\n)*.*{named}"):
        go_on()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.filterwarnings("ignore:The teacher")
def test_other_versions_are_told_and_not_refused(tmp_path):
    interrupted(tmp_path, tiny(3, seed=1).eval(), (Scenes(), VAL))
    file = tmp_path / "run.json"
    facts = json.loads(file.read_text())
    facts["parts"][-1]["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(facts))
    with pytest.warns(UserWarning, match=r"other versions.*torch: was '1\.0', is '"):
        bpkd_sdk.distill(tiny(3, seed=1).eval(), tiny(3), (Scenes(), VAL), output_dir=tmp_path, resume=True, **OPTIONS)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        bpkd_sdk.distill(tiny(3, seed=1).eval(), tiny(3), (Scenes(), VAL), output_dir=tmp_path, resume=True, **OPTIONS)


@pytest.mark.filterwarnings("ignore:The teacher")
def test_a_run_without_a_state_is_held_against_its_inputs_too(tmp_path):
    bpkd_sdk.train(tiny(3), (Scenes(), VAL), output_dir=tmp_path, **OPTIONS)
    (tmp_path / "resume.safetensors").unlink()
    with pytest.warns(UserWarning, match="no resume.safetensors to resume from"):
        bpkd_sdk.train(tiny(3), (Scenes(), VAL), output_dir=tmp_path, resume=True, **OPTIONS)
    (tmp_path / "resume.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="no resume.safetensors"),
        pytest.raises(ValueError, match=r"data\.train\.fingerprint"),
    ):
        bpkd_sdk.train(tiny(3), (Scenes(start=7), VAL), output_dir=tmp_path, resume=True, **OPTIONS)
    (tmp_path / "resume.safetensors").write_bytes((tmp_path / "last.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"resume\.safetensors is not the state of a run: it lacks optimizer_scalars"):
        bpkd_sdk.train(tiny(3), (Scenes(), VAL), output_dir=tmp_path, resume=True, **OPTIONS)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json does not describe a run"):
        bpkd_sdk.train(tiny(3), (Scenes(), VAL), output_dir=tmp_path, resume=True, **OPTIONS)


def test_a_data_set_that_moved_is_the_same(tmp_path):
    from bpkd_sdk.training.records import fingerprint

    roots = [write_folder(tmp_path / name, NAMES[:3]) for name in ("one", "two")]
    assert len({fingerprint(bpkd_sdk.open_dataset("folder", root=root)) for root in roots}) == 1


def test_a_run_without_validation_data_states_that_it_has_no_scores(tmp_path, capsys):
    result = bpkd_sdk.train(tiny(3), (Scenes(), None), output_dir=tmp_path, **OPTIONS)
    assert result.metrics is None
    assert "No validation data: there will be no scores" in " ".join(capsys.readouterr().err.split())


def test_validation_on_the_training_data_is_reported(tmp_path):
    data = [(image, label) for image, label in Scenes()]
    for number, same in enumerate((Scenes(), data)):
        with pytest.warns(UserWarning, match="Training and validation data are the same") as caught:
            bpkd_sdk.train(tiny(3), (same, same), class_names=NAMES[:3], output_dir=tmp_path / str(number), **OPTIONS)
        assert {warning.filename for warning in caught} == {__file__}  # not a line of the package


def test_the_list_of_a_random_split_is_a_pair(tmp_path):
    parts = torch.utils.data.random_split(Scenes(), [6, 2])
    assert bpkd_sdk.train(tiny(3), parts, output_dir=tmp_path, **OPTIONS).metrics.images == 2
