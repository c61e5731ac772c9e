"""Tests of loading the teacher of a row and the backbone of its student."""

import pytest
import torch

from bpkd_sdk.models.zoo import build_network
from bpkd_sdk.recipes import find_recipe
from bpkd_sdk.recipes.reproduction import create_student, load_teacher

RECIPE = find_recipe("cityscapes/pspnet_r18")


@pytest.fixture(scope="module")
def pretrained():
    """Weights of a backbone, as in the checkpoints of OpenMMLab's classifiers."""
    torch.manual_seed(5)
    return build_network("pspnet_r18", 2).backbone.state_dict()


def without_counters(state):
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda state: state, id="bare"),
        pytest.param(lambda state: {"meta": {}, "state_dict": {f"backbone.{key}": value for key, value in state.items()}}, id="wrapped"),
        pytest.param(lambda state: {**without_counters(state), "fc.weight": torch.zeros(10, 512)}, id="old-with-classifier"),
    ],
)  # fmt: skip
def test_backbone_files_of_all_versions_load(tmp_path, pretrained, content):
    torch.save(content(pretrained), tmp_path / "r18.pth")
    student = create_student(RECIPE, 19, tmp_path / "r18.pth")
    loaded = student.backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in without_counters(pretrained).items())
    assert student.auxiliary_head is not None


def test_a_backbone_with_random_weights_gives_a_warning():
    with pytest.warns(UserWarning, match=r"start from ImageNet weights. Get https://.*resnet18_v1c"):
        create_student(RECIPE, 19, None)


def test_a_row_refuses_another_teacher():
    with pytest.raises(
        ValueError, match=r"needs its teacher, a pspnet_r101. Get https://.*pspnet_r101-d8_512x1024_80k"
    ):
        load_teacher(RECIPE, None)
    with pytest.raises(ValueError, match="teacher of the row .* is a pspnet_r101, but got a pspnet_r18"):
        load_teacher(RECIPE, build_network("pspnet_r18", 19).eval())
