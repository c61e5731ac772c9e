"""Devices, batch norm and batches of several processes, tested in one process; `test_processes.py` starts two."""

import pytest
import torch
from timm.layers import SyncBatchNormAct
from torch import nn

import bpkd_sdk
from bpkd_sdk.losses import CIRKDLoss, SKDSLoss
from bpkd_sdk.losses.method import Composition
from bpkd_sdk.output import SegmentationOutput
from bpkd_sdk.training.accelerator import create_accelerator, synchronize_batch_norm
from bpkd_sdk.training.config import TrainingConfig
from tests.networks import tiny


def plain_batch_norms(module):
    return [name for name, part in module.named_modules() if type(part) is nn.BatchNorm2d]


def test_synchronized_batch_norm_changes_no_output():
    torch.manual_seed(0)
    network = bpkd_sdk.create_model("smp/FPN/tu-mobilenetv3_small_050", 3).eval()
    images, keys = torch.randn(2, 3, 64, 64), list(network.state_dict())
    with torch.no_grad():
        expected = network(images)
        synchronize_batch_norm(network)
        torch.testing.assert_close(network(images), expected)
    assert not plain_batch_norms(network)
    assert any(isinstance(part, SyncBatchNormAct) for part in network.modules())
    assert list(network.state_dict()) == keys


def test_projections_are_synchronized_and_critics_are_not():
    output = SegmentationOutput(torch.zeros(2, 3, 8, 8), {"neck": torch.rand(2, 4, 8, 8)})
    method = Composition([CIRKDLoss(3), SKDSLoss(3)])
    method.prepare(output, output)
    synchronize_batch_norm(method)
    assert isinstance(method.methods["cirkd"].projection[1], nn.SyncBatchNorm)
    assert all(".critic." in name for name in plain_batch_norms(method))
    assert plain_batch_norms(method)


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="'cuda:1' is one device for several processes; pass 'cuda' instead"):
        create_accelerator(TrainingConfig(device="cuda:1"))


def test_a_batch_too_small_for_batch_norm_says_so(tmp_path):
    student = nn.Sequential(tiny(9), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(9))
    data = bpkd_sdk.data.ShapesDataset("train", length=2, size=(32, 32))
    options = {
        "steps": 1,
        "batch_size": 2,
        "accumulate": 2,
        "crop_size": (32, 32),
        "device": "cpu",
        "check_data": False,
    }
    with pytest.raises(ValueError, match="batch of 1 image is too small for the student's batch norm.*accumulate"):
        bpkd_sdk.train(student, (data, None), output_dir=tmp_path, **options)
