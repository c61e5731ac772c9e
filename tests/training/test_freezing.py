"""Freezing of the encoder for the first steps."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import segmentation

import bpkd_sdk
from bpkd_sdk.training.freezing import find_encoder
from tests.conftest import missing
from tests.networks import tiny
from tests.scenes import Scenes
from tests.training.two_processes import Interrupted

DATA = Scenes(length=8)
OPTIONS = {"batch_size": 2, "crop_size": (32, 32), "device": "cpu", "log_every": 1, "check_data": False}


class Network(nn.Module):
    """A network whose encoder has batch norm and a layer that never trains."""

    def __init__(self):
        super().__init__()
        layers = tiny(3)
        self.encoder, self.head = layers[:5], layers[5:]
        self.encoder[3].bias.requires_grad_(False)

    def forward(self, images):
        return self.head(self.encoder(images))


def changed(network, before):
    """Return the names of the weights and buffers that differ."""
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


def train(network, folder, **options):
    return bpkd_sdk.train(network, (DATA, None), output_dir=folder, **OPTIONS | options)


def test_weights_and_statistics_of_the_encoder_stay_until_the_step(tmp_path):
    network = Network()
    before = copy.deepcopy(network.state_dict())
    result = train(network, tmp_path / "frozen", steps=2, freeze_encoder_steps=2)
    assert changed(network, before) == {"head.6.weight", "head.6.bias"}
    assert [record.get("encoder") for record in result.history] == ["frozen", "frozen"]
    assert [name for name, weight in network.named_parameters() if not weight.requires_grad] == ["encoder.3.bias"]

    network = Network()
    result = train(network, tmp_path / "released", steps=2, freeze_encoder_steps=1)
    assert changed(network, before) == before.keys() - {"encoder.3.bias"}
    assert network.encoder[1].num_batches_tracked == 1  # only the second step
    assert [record.get("encoder") for record in result.history] == ["frozen", None]


def test_a_resumed_run_releases_the_encoder_at_the_same_step(tmp_path):
    options = OPTIONS | {"steps": 6, "freeze_encoder_steps": 4, "optimizer": "adamw", "check_teacher": False}
    teacher, networks = tiny(3, seed=1).eval(), (Network(), Network(), Network())
    bpkd_sdk.distill(
        teacher, networks[0], (DATA, None), method=Interrupted(3), output_dir=tmp_path / "whole", **options
    )
    method = Interrupted(3)
    method._rank = 0
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        bpkd_sdk.distill(teacher, networks[1], (DATA, None), method=method, output_dir=tmp_path / "cut", **options)
    assert networks[1].encoder[0].weight.requires_grad
    assert torch.equal(networks[1].encoder[0].weight, networks[2].encoder[0].weight)
    resumed = bpkd_sdk.distill(
        teacher, networks[2], (DATA, None), method=Interrupted(3), output_dir=tmp_path / "cut", resume=True, **options
    )
    assert [record["step"] for record in resumed.history if "encoder" in record] == [1, 2, 3, 4]
    for name, value in networks[0].state_dict().items():
        assert torch.equal(value, networks[2].state_dict()[name]), name


def test_encoders_of_all_libraries_are_found(shallow):
    zoo = bpkd_sdk.create_model("pspnet_r18", 2)
    assert find_encoder(zoo) is zoo.backbone
    smp = bpkd_sdk.create_model("smp/FPN/tu-test_resnet", 2, backbone_weights="none")
    assert find_encoder(smp) is smp.encoder
    assert find_encoder(nn.Sequential(smp)) is smp.encoder  # a wrapper
    torchvision = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    assert find_encoder(torchvision) is torchvision.backbone


def test_encoders_of_transformers_are_found():
    try:
        import transformers
    except ImportError:
        missing("transformers is not installed")
    config = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8
    )
    network = transformers.SegformerForSemanticSegmentation(config)
    assert find_encoder(network) is network.segformer


def test_networks_without_a_known_encoder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"encoder of Sequential is not known; its parts are: 0, 1, .*`backbone`"):
        train(tiny(3), tmp_path / "run", steps=2, freeze_encoder_steps=1)
    frozen = Network()
    frozen.head.requires_grad_(False)
    with pytest.raises(ValueError, match="no weights outside of its encoder"):
        train(frozen, tmp_path / "run", steps=2, freeze_encoder_steps=1)
    with pytest.raises(ValueError, match="`freeze_encoder_steps` to be at least 0, but got -1"):
        train(Network(), tmp_path / "run", steps=2, freeze_encoder_steps=-1)
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="freeze_encoder_steps=1 freezes random weights"):
        train("smp/FPN/tu-test_resnet", tmp_path / "run", steps=1, freeze_encoder_steps=1, backbone_weights="none")
