"""Tests of the weights that an encoder starts from: files, and what a run records and prints about them."""

import json
import re

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.models.zoo import build_network
from tests.networks import tiny

DATA = ShapesDataset("train", length=4, size=(64, 64)), None
OPTIONS = {"steps": 1, "batch_size": 2, "crop_size": (64, 64), "device": "cpu", "check_data": False}


def same(ours, theirs):
    return all(torch.equal(ours[key], value) for key, value in theirs.items() if not key.endswith("batches_tracked"))


@pytest.mark.parametrize("encoder", ["tu-test_resnet", "tu-test_convnext"])
def test_a_file_of_timm_fits_the_encoder_of_the_library(encoder, tmp_path):
    torch.manual_seed(1)
    classifier = timm.create_model(encoder.removeprefix("tu-"))
    save_file(classifier.state_dict(), tmp_path / "a.safetensors")
    network = bpkd_sdk.create_model(f"smp/Unet/{encoder}", 3, backbone_weights=tmp_path / "a.safetensors")
    expected = timm.create_model(encoder.removeprefix("tu-"), features_only=True)
    expected.load_state_dict({
        key: classifier.state_dict()[key.replace("stages_", "stages.").replace("stem_", "stem.")]
        for key in expected.state_dict()
    })  # fmt: skip
    assert same(network.encoder.model.state_dict(), expected.state_dict())


def test_a_file_of_a_whole_network_gives_its_encoder_only(tmp_path):
    torch.manual_seed(1)
    other = smp.FPN("resnet18", encoder_weights=None, classes=7)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "a.pth")
    network = bpkd_sdk.create_model("smp/Unet/resnet18", 3, backbone_weights=tmp_path / "a.pth")
    assert same(network.encoder.state_dict(), other.encoder.state_dict())
    network = bpkd_sdk.create_model("smp/Unet/resnet18", 3, backbone_weights=tmp_path / "a.pth", in_channels=1)
    torch.testing.assert_close(network.encoder.conv1.weight, other.encoder.conv1.weight.sum(1, keepdim=True))


def test_a_file_of_timm_fits_a_network_of_the_zoo(tmp_path, monkeypatch):
    torch.manual_seed(1)
    theirs = timm.create_model("mobilenetv2_100.ra_in1k")
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    network = build_network("deeplabv3plus_mv2", 3, backbone_weights=str(tmp_path / "a.pth"))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, in_chans: theirs)
    downloaded = build_network("deeplabv3plus_mv2", 3, backbone_weights="imagenet")
    assert same(network.backbone.state_dict(), downloaded.backbone.state_dict())


def test_files_that_do_not_fit_are_refused(tmp_path):
    build = "smp/FPN/resnet34"
    with pytest.raises(FileNotFoundError, match=r"no file .*none.pth. Pass backbone_weights="):
        bpkd_sdk.create_model(build, 3, backbone_weights=tmp_path / "none.pth")
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not a readable PyTorch checkpoint of plain tensors"):
        bpkd_sdk.create_model(build, 3, backbone_weights=tmp_path / "half.pth")
    (tmp_path / "half.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        bpkd_sdk.create_model(build, 3, backbone_weights=tmp_path / "half.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="missing: conv1.weight"):
        bpkd_sdk.create_model(build, 3, backbone_weights=tmp_path / "list.pth")
    deep, shallow = (smp.encoders.get_encoder(f"resnet{depth}", weights=None) for depth in (34, 18))
    torch.save(shallow.state_dict(), tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"missing: layer1.2.bn1.bias"):
        bpkd_sdk.create_model(build, 3, backbone_weights=tmp_path / "r18.pth")
    torch.save(deep.state_dict(), tmp_path / "r34.pth")
    with pytest.raises(ValueError, match=r"belongs to another encoder: it also contains 'layer1.2.bn1.bias'"):
        bpkd_sdk.create_model("smp/FPN/resnet18", 3, backbone_weights=tmp_path / "r34.pth")


@pytest.mark.parametrize("value", [None, True, 3])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match="'imagenet', 'none' or the path of a file, but got"):
        bpkd_sdk.create_model("pspnet_r18", 3, backbone_weights=value)


def test_training_by_name_starts_from_imagenet_weights(tmp_path):
    with pytest.raises(RuntimeError, match=r"'imagenet' weights for the encoder of 'smp/FPN/resnet18' are neither in"):
        bpkd_sdk.train("smp/FPN/resnet18", DATA, output_dir=tmp_path / "run", **OPTIONS)
    with pytest.raises(RuntimeError, match=r"'imagenet' weights for the encoder of 'smp/FPN/resnet18' are neither in"):
        bpkd_sdk.compare(tiny(9).eval(), "smp/FPN/resnet18", (DATA[0], DATA[0]), steps=1, output_dir=tmp_path / "all")
    with pytest.raises(ValueError, match=r"no ImageNet weights that fit the encoder of 'pspnet_r18'.*'none'"):
        bpkd_sdk.train("pspnet_r18", "no_data", output_dir=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def networks(printed):
    """Returns the texts of the lines on student and teacher."""
    return [re.search(f"^{role}: +(.*)$", printed, re.M)[1] for role in ("Student", "Teacher")]


def test_a_run_states_the_weights_that_it_starts_from(tmp_path, capsys):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "r.pth")
    run = bpkd_sdk.distill(
        tiny(9).eval(), "smp/Unet/tu-test_resnet", DATA, backbone_weights=tmp_path / "r.pth",
        output_dir=tmp_path / "a", **OPTIONS,
    )  # fmt: skip
    weights = f"with a pretrained encoder ({tmp_path / 'r.pth'}) and a random decoder"
    student, teacher = networks(capsys.readouterr().err)
    assert student.startswith(f"smp/Unet/tu-test_resnet {weights}; ")
    assert re.search("; [0-9.]+ [kM] parameters, [0-9.]+ [kM] MACs per crop$", student)
    assert teacher.startswith("Sequential as given; ")
    origin = json.loads((tmp_path / "a" / "run.json").read_text())["origin"]
    assert origin["student"]["backbone_weights"].keys() == {"file", "sha256"}
    provenance = bpkd_sdk.load_model(run.checkpoint).provenance
    assert provenance["origin"] == origin
    assert run.model.provenance == provenance
    second = bpkd_sdk.distill(
        run.checkpoint, "smp/Unet/tu-test_resnet", DATA, backbone_weights="none", output_dir=tmp_path / "b", **OPTIONS
    )
    student, teacher = networks(capsys.readouterr().err)
    assert student.startswith("smp/Unet/tu-test_resnet with random weights; ")
    assert teacher.startswith(f"smp/Unet/tu-test_resnet from {run.checkpoint}; ")
    assert second.model.provenance["origin"]["teacher"]["origin"] == origin
    bpkd_sdk.train(run.model, DATA, output_dir=tmp_path / "c", **OPTIONS)
    assert "with the weights of the run 'bpkd smp/Unet/tu-test_resnet', step 1;" in capsys.readouterr().err
    bpkd_sdk.train(run.model, DATA, output_dir=tmp_path / "c", resume=True, **OPTIONS)
    assert f"with the weights of the run in {tmp_path / 'c'};" in capsys.readouterr().err


def test_a_file_for_a_module_is_refused(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "r.pth")
    with pytest.raises(ValueError, match="loaded only into a network that is given by its name, but got student Seq"):
        bpkd_sdk.train(tiny(9), DATA, backbone_weights=tmp_path / "r.pth", output_dir=tmp_path / "run", **OPTIONS)
