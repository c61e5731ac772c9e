"""Checks that every network of another library must pass, as an instance and by name."""

import torch

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import quantize, to_onnx
from bpkd_sdk.losses import METHODS
from bpkd_sdk.output import as_output
from tests.networks import tiny

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


def deploys_at_any_size(network, folder):
    """Export a network for images of any size, verified at two others, and quantise it; return both reports."""
    report = to_onnx(network, folder / "a.onnx", input_size=SIZE, dynamic_size=True)
    assert report.verified
    assert SIZE not in {run.size for run in report.verification.runs}
    return report, quantize(folder / "a.onnx", folder / "b.onnx", ShapesDataset("train", length=4, size=SIZE), images=4)
