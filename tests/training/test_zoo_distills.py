"""Every network of the zoo as student and as teacher, through `distill`."""

import pytest
import torch

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.models.zoo import ZOO
from tests.networks import tiny

DATA = ShapesDataset("train", length=2, size=(64, 64))
OPTIONS = {"steps": 1, "batch_size": 2, "crop_size": (64, 64), "device": "cpu", "check_data": False}


@pytest.mark.parametrize("entry", [pytest.param(entry, id=name) for name, entry in ZOO.items() if not entry.variant_of])
def test_student_and_teacher(entry, shallow, tmp_path):
    torch.manual_seed(0)
    network = bpkd_sdk.create_model(entry.name, DATA.num_classes, aux_head=entry.has_aux_head)
    before = network.decode_head.conv_seg.weight.clone()
    run = bpkd_sdk.distill(tiny(9).eval(), network, (DATA, None), output_dir=tmp_path / "student", **OPTIONS)
    assert list(run.history[0]["terms"]) == ["ce", *(["aux"] if entry.has_aux_head else []), "edge", "body"]
    assert not torch.equal(before, network.decode_head.conv_seg.weight)
    weights = [value.clone() for value in network.state_dict().values()]
    run = bpkd_sdk.distill(run.model, tiny(9), (DATA, None), output_dir=tmp_path / "teacher", **OPTIONS)
    assert all(term > 0 for term in run.history[0]["terms"].values())
    assert all(torch.equal(a, b) for a, b in zip(weights, network.state_dict().values(), strict=True))
