"""Every method through `distill`: its terms are recorded; its own parts learn, are resumed, and are not in the student."""

import pytest
import torch
from safetensors import safe_open

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import METHODS, CanonicalKDLoss, CWDLoss, SKDSLoss, create_method
from tests.networks import tiny

TRAIN = ShapesDataset("train", length=8, size=(48, 48))
OPTIONS = {"batch_size": 2, "crop_size": (32, 32), "device": "cpu", "check_data": False, "log_every": 1}
# Methods with parts of their own: a critic, a projection, a memory.
WITH_STATE = ["skds", "ifvd", "cirkd", "canonical"]


def teacher():
    return tiny(9, width=12, seed=1).eval()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_distills(name, tmp_path):
    result = bpkd_sdk.distill(teacher(), tiny(9), (TRAIN, None), method=name, steps=3, output_dir=tmp_path, **OPTIONS)
    terms = [record["terms"] for record in result.history]
    assert len(terms) == 3
    assert len(terms[0]) > 1
    assert terms[0].keys() == terms[-1].keys()
    with safe_open(tmp_path / "last.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tiny(9).state_dict())


@pytest.mark.parametrize("name", WITH_STATE)
def test_the_methods_own_parts_learn_and_are_resumed(name, tmp_path):
    options = OPTIONS | {"steps": 6, "evaluate_every": 3}

    def run(folder, method, resume=False):
        return bpkd_sdk.distill(
            teacher(), tiny(9), (TRAIN, None), method=method, output_dir=folder, resume=resume, **options
        )

    torch.manual_seed(0)
    whole = run(tmp_path / "whole", name)
    method = create_method(name, 9)
    forward, calls = method.forward, []

    def crash(*inputs):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return forward(*inputs)

    method.forward = crash
    with pytest.raises(MemoryError):
        run(tmp_path / "parts", method)
    parts = run(tmp_path / "parts", name, resume=True)
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[key], value, rtol=0, atol=0)
    with safe_open(tmp_path / "whole" / "resume.safetensors", framework="pt") as file:
        own = [key for key in file.keys() if key.startswith("module/method.")]  # noqa: SIM118
    assert own


def test_a_learned_projection_moves_and_is_saved(tmp_path):
    method, starts = CanonicalKDLoss(9), []
    build = method.build
    method.build = lambda outputs: (build(outputs), starts.append(method.projection.weight.detach().clone()))
    result = bpkd_sdk.distill(teacher(), tiny(9), (TRAIN, None), method=method, steps=4, output_dir=tmp_path, **OPTIONS)
    with safe_open(result.output_dir / "resume.safetensors", framework="pt") as file:
        saved = file.get_tensor("module/method.projection.weight")
    assert torch.equal(saved, method.projection.weight.cpu())
    assert (saved - starts[0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (CWDLoss(weight=3), CWDLoss(weight=5), "method.weights.logit: was 3, is 5"),
        ("bpkd", "cwd", "method.class: was 'BPKDLoss', is 'CWDLoss'"),
        (SKDSLoss(critic_loss="hinge"), SKDSLoss(critic_loss="wgan-gp"), "critic_loss: was 'hinge', is 'wgan-gp'"),
    ],
    ids=["weight", "class", "critic"],
)
def test_another_method_does_not_go_on_with_a_run(first, second, message, tmp_path):
    options = OPTIONS | {"steps": 1, "output_dir": tmp_path}
    bpkd_sdk.distill(teacher(), tiny(9), (TRAIN, None), method=first, **options)
    with pytest.raises(ValueError, match=message):
        bpkd_sdk.distill(teacher(), tiny(9), (TRAIN, None), method=second, resume=True, **options)


def test_a_compiled_student_is_saved_as_what_it_is(tmp_path):
    student = torch.compile(tiny(9), backend="eager")
    result = bpkd_sdk.distill(teacher(), student, (TRAIN, None), steps=2, output_dir=tmp_path, **OPTIONS)
    loaded = bpkd_sdk.load_model(result.checkpoint, model=tiny(9))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), result.model(images))


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("method", ["canonical", "bpkd"], ids=["with-features", "logits-only"])
def test_an_unknown_feature_path_lists_those_that_exist(method, network, tmp_path):
    options = OPTIONS | {"steps": 1, "output_dir": tmp_path, f"{network}_feature": "9"}
    with pytest.raises(ValueError, match="no module at '9'"):
        bpkd_sdk.distill(teacher(), tiny(9), (TRAIN, None), method=method, **options)


def test_the_zoo_and_segmentation_models_pytorch_need_no_paths(tmp_path):
    data = ShapesDataset("train", length=4, size=(64, 64))
    student = bpkd_sdk.create_model("smp/FPN/tu-mobilenetv3_small_050", 9)
    guide = bpkd_sdk.create_model("pspnet_r18", 9).eval()
    options = OPTIONS | {"crop_size": (64, 64), "steps": 1, "method": "canonical"}
    result = bpkd_sdk.distill(guide, student, (data, None), output_dir=tmp_path, **options)
    assert result.history[0]["terms"]["feature"] > 0
