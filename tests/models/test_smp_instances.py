"""Tests of instances of segmentation-models-pytorch: their checkpoints build them again."""

import pytest
import segmentation_models_pytorch as smp
import torch

import bpkd_sdk
from bpkd_sdk.models import get_spec, identify, library
from bpkd_sdk.models.checkpoint import read_header, read_tensors, write_tensors
from bpkd_sdk.models.library import build_from_spec
from tests.families import ALL_METHODS, learns_and_loads, teaches_by_every_method

OPTIONS = {"encoder_name": "tu-test_resnet", "encoder_weights": None, "classes": 9}


def unet(**options):
    torch.manual_seed(0)
    return smp.Unet(**OPTIONS | {"decoder_channels": (32, 32, 16, 16, 16), "decoder_attention_type": "scse"} | options)


def test_an_instance_teaches_by_every_method(tmp_path):
    terms = teaches_by_every_method(unet().eval(), tmp_path)
    assert {term.partition("/")[0] for term in terms} == {"ce", *ALL_METHODS}


def test_an_instance_learns_and_its_checkpoint_needs_no_instance(tmp_path):
    loaded = learns_and_loads(unet(), tmp_path)
    assert loaded.spec.name == "smp/Unet/tu-test_resnet"
    assert loaded.spec.config["decoder_channels"] == [32, 32, 16, 16, 16]


@pytest.mark.parametrize("architecture", ["Unet", "FPN", "DeepLabV3Plus", "UPerNet", "Linknet"])
def test_architectures_are_recognised_with_their_defaults(architecture):
    network = getattr(smp, architecture)("tu-test_resnet", encoder_weights=None, classes=3, in_channels=4)
    spec = identify(network)
    assert spec.name == f"smp/{architecture}/tu-test_resnet"
    assert (spec.num_classes, spec.in_channels) == (3, 4)


def test_pretrained_weights_of_an_instance_determine_its_normalisation():
    assert get_spec(smp.FPN("tu-test_resnet", encoder_weights=None)).mean == (0.485, 0.456, 0.406)
    network = smp.FPN("tu-tf_efficientnet_lite0", encoder_weights=None)
    assert get_spec(network).mean == (0.485, 0.456, 0.406)
    network.config["encoder_weights"] = "imagenet"  # as after a download
    assert get_spec(network).mean == (0.5, 0.5, 0.5)


def test_a_class_of_ones_own_keeps_the_facts_of_the_library():
    class Own(smp.FPN):
        pass

    network = Own("tu-test_resnet", encoder_weights=None)
    assert get_spec(network).size_divisor == 32
    assert identify(network).name is None


def change_head(network):
    network.segmentation_head[0] = torch.nn.Conv2d(16, 5, 3, padding=1)


def change_dropout(network):
    network.segmentation_head.append(torch.nn.Dropout(0.5))


def change_output(network):
    network.register_forward_hook(lambda _module, _inputs, output: output.flip(1))


@pytest.mark.parametrize("change", [change_head, change_dropout, change_output])
def test_a_changed_instance_is_not_recognised(change, tmp_path):
    network = unet()
    change(network)
    assert identify(network).name is None
    bpkd_sdk.save_model(network, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"contains a segmentation_models_pytorch.*load_model\(path, model=\.\.\.\)"):
        bpkd_sdk.load_model(tmp_path / "a.safetensors")


def test_an_instance_is_built_again_only_after_a_change(monkeypatch):
    builds = []
    monkeypatch.setattr(library, "build_from_spec", lambda spec: builds.append(spec) or build_from_spec(spec))
    network = unet()
    assert identify(network) == identify(network)
    assert len(builds) == 1
    change_output(network)
    assert identify(network).name is None
    assert identify(network).name is None
    assert len(builds) == 2


def test_recognition_leaves_the_random_numbers_and_the_network_as_they_are():
    network = unet().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    identify(network)
    assert torch.equal(torch.rand(3), expected)
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("checkpoint_path", "contains 'checkpoint_path', which could load other files"),
        ("decoder_shape", r"cannot build .*'decoder_shape'.*Install the version"),
    ],
)
def test_a_configuration_that_names_files_or_unknown_arguments_is_refused(argument, message, tmp_path):
    path = tmp_path / "a.safetensors"
    bpkd_sdk.save_model(unet(), path)
    header, state = read_header(path), read_tensors(path)[1]
    header["network"]["config"][argument] = "/etc/passwd"
    write_tensors(path, state, header)
    with pytest.raises(ValueError, match=message):
        bpkd_sdk.load_model(path)
