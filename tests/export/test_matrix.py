"""Every network of the zoo and every architecture of segmentation-models-pytorch, from torch to a verified file."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bpkd_sdk
from bpkd_sdk.data.shapes import render
from bpkd_sdk.evaluation.inference import whole_logits
from bpkd_sdk.export import to_onnx
from bpkd_sdk.models import ZOO
from bpkd_sdk.models.smp import ARCHITECTURES

DPT = "smp/DPT/tu-vit_tiny_patch16_224"
FROM_ZOO = ["pspnet_r18", "isanet_r18", "hrnetv2p_w18s", "deeplabv3plus_mv2", "pspnet_r101"]
FROM_SMP = [f"smp/{name}/{'mit_b0' if name == 'Segformer' else 'resnet18'}" for name in ARCHITECTURES if name != "DPT"]
# PAN pools its features thrice; DPT's position embeddings are for one size.
SIZES = {"smp/PAN/resnet18": (176, 192), DPT: (224, 224)}


def settled(name, size):
    """A network whose batch norms know the scenes and whose residuals are small, as in trained ones: few logits tie."""
    torch.manual_seed(0)
    network = bpkd_sdk.create_model(name, 2)
    for path, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            if path.endswith("bn3"):
                nn.init.constant_(module.weight, 0.2)
    images = torch.from_numpy(np.stack([render(0, "settle", index, size)[0] for index in range(4)]))
    with torch.no_grad():
        whole_logits(network, images.permute(0, 3, 1, 2))
    return network.eval()


@pytest.mark.parametrize("name", [*FROM_ZOO, *FROM_SMP])
def test_any_size_and_batch(name, tmp_path):
    size = SIZES.get(name, (96, 128))
    report = to_onnx(settled(name, size), tmp_path / "m.onnx", input_size=size, dynamic_size=True)
    assert report.verified
    assert {run.batch for run in report.verification.runs} == {1, 3}
    assert size not in {run.size for run in report.verification.runs}
    (entry,) = onnx.load(report.path).metadata_props
    assert json.loads(entry.value)["network"]["name"] == name


@pytest.mark.parametrize("name", ["pspnet_r18", "smp/PSPNet/resnet18", DPT])
def test_one_size(name, tmp_path):
    size = SIZES.get(name, (90, 120))
    assert to_onnx(settled(name, size), tmp_path / "m.onnx", input_size=size, dynamic_batch=name != DPT).verified


@pytest.mark.parametrize(("name", "reason"), [(DPT, r"Input height \(.*\) doesn't match model \(224\)")])
def test_refused_with_the_networks_reason(name, reason, tmp_path):
    network = bpkd_sdk.create_model(name, 2).eval()
    with pytest.raises(RuntimeError, match=f"torch cannot export {name}.*{reason}.*dynamic_size=False.*No file"):
        to_onnx(network, tmp_path / "m.onnx", input_size=(96, 128), dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


def test_the_rest_of_the_zoo_is_made_of_the_same_parts():
    """Exporting all of it takes minutes; what is left out differs in depth and width alone."""

    def parts(name):
        with torch.device("meta"):
            return {type(module) for module in bpkd_sdk.create_model(name, 2).modules()}

    exported = set().union(*map(parts, FROM_ZOO))
    for name in set(ZOO) - set(FROM_ZOO):
        assert parts(name) <= exported, name
