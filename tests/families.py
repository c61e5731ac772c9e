"""Checks that every network of another library must pass, as an instance and by name."""

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torchvision.models import segmentation

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import METHODS
from bpkd_sdk.output import as_output
from tests.networks import tiny
from tests.transformers_networks import NETWORKS, build

SIZE = (64, 64)
ALL_METHODS = [name for name in METHODS if name != "bpkd_paper"]  # these are the terms of "bpkd" with other weights
DATA = ShapesDataset("train", length=2, size=SIZE)
OPTIONS = {"steps": 1, "batch_size": 2, "crop_size": SIZE, "device": "cpu", "check_data": False}


def teaches_by_every_method(network, folder):
    """Distil a student by all methods at once; return the terms of the loss."""
    before = [parameter.clone() for parameter in network.parameters()]
    run = bpkd_sdk.distill(
        network, tiny(9), (DATA, None), method=ALL_METHODS, check_teacher=False, output_dir=folder, **OPTIONS
    )
    assert all(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
    return run.history[0]["terms"]


def learns_and_loads(network, folder):
    """Train a network for a step; return it as `load_model` builds it from the checkpoint alone."""
    before = [parameter.clone() for parameter in network.parameters()]
    run = bpkd_sdk.train(network, (DATA, None), output_dir=folder, **OPTIONS)
    assert any(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
    loaded = bpkd_sdk.load_model(run.checkpoint)
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (as_output(model(images)).logits for model in (loaded, run.model))
    torch.testing.assert_close(ours, theirs)
    assert loaded.spec == run.model.spec
    assert loaded.spec.class_names == DATA.class_names
    assert bpkd_sdk.profile(loaded, SIZE).macs > 0
    return loaded


class _Backbone(nn.Module):
    """A backbone for the networks of torchvision, with two feature maps."""

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, images):
        low = self.low(images)
        high = self.high(low)
        return {"low": low, "high": high, "out": high}


def _fcn():
    return segmentation.FCN(_Backbone(), segmentation.fcn.FCNHead(16, 9))


def _deeplabv3():
    return segmentation.DeepLabV3(_Backbone(), segmentation.deeplabv3.DeepLabHead(16, 9, (2, 4, 6)))


def _lraspp():
    return segmentation.LRASPP(_Backbone(), 8, 16, 9)


def _smp():
    return smp.PSPNet("tu-test_resnet", encoder_weights=None, classes=9, psp_out_channels=32)


def family(name):
    """Build the small network of a family of networks of other libraries, with random weights, in eval mode."""
    if name in NETWORKS:
        return build(name)
    torch.manual_seed(0)
    return OTHERS[name]().eval()


OTHERS = {"fcn": _fcn, "deeplabv3": _deeplabv3, "lraspp": _lraspp, "smp": _smp}
FAMILIES = (*NETWORKS, *OTHERS)
