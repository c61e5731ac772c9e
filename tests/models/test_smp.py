"""Tests of the networks of segmentation-models-pytorch: each architecture builds, with its stride and size divisor."""

import pytest
import segmentation_models_pytorch as smp
import torch
from huggingface_hub import constants

import bpkd_sdk
from bpkd_sdk.models.smp import ARCHITECTURES, normalization

# Architectures that require a certain kind of encoder; the others are tested with ResNet-18.
ENCODERS = {"DPT": "tu-vit_tiny_patch16_224", "Segformer": "mit_b0"}
SIZES = {"DPT": 224, "PAN": 128}  # DPT has position embeddings for one size; PAN pools its features three times
WITHOUT_LAST_UPSAMPLING = {"FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet", "Segformer"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_builds_with_logits_at_its_decoders_stride(architecture):
    name = f"smp/{architecture}/{ENCODERS.get(architecture, 'resnet18')}"
    torch.manual_seed(0)
    model = bpkd_sdk.create_model(name, 5).eval()
    size = SIZES.get(architecture, 64)
    with torch.no_grad():
        logits = model(torch.randn(1, 3, size, size))
    stride = size // logits.shape[-1]
    assert logits.shape[:2] == (1, 5)
    assert stride > 1 if architecture in WITHOUT_LAST_UPSAMPLING else stride == 1
    assert (model.spec.name, model.spec.num_classes) == (name, 5)


def test_architectures_are_all_of_the_library():
    assert set(ARCHITECTURES) == {cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()}


def test_the_size_divisor_is_the_one_that_the_network_requires():
    model = bpkd_sdk.create_model("smp/FPN/resnet18", 5).eval()
    assert model.spec.size_divisor == 32
    with pytest.raises(RuntimeError, match="divisible by 32"):
        model(torch.randn(1, 3, 64, 70))


def test_get_spec_reads_the_size_divisor_of_a_module_of_the_library():
    assert bpkd_sdk.models.get_spec(smp.FPN("resnet18", encoder_weights=None)).size_divisor == 32


@pytest.mark.parametrize(
    ("encoder", "weights", "mean"),
    [
        ("tu-tf_efficientnet_lite0", "imagenet", (0.5, 0.5, 0.5)),
        ("tu-tf_efficientnet_lite0", "none", (0.485, 0.456, 0.406)),
    ],
)
def test_pretrained_weights_determine_the_normalisation(encoder, weights, mean):
    """The test reads the normalisation only, because the weights would have to be downloaded."""
    assert normalization(encoder, weights)[0] == pytest.approx(mean)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet10t"])
def test_without_a_connection_the_error_names_the_option_and_the_cache(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(RuntimeError, match=rf"'imagenet' weights.*{tmp_path}/hub (.*\n)*.*backbone_weights='none'"):
        bpkd_sdk.create_model(f"smp/FPN/{encoder}", 5, backbone_weights="imagenet")


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("dpn92", r"no pretrained weights 'imagenet'. It has: 'imagenet\+5k'"),
        ("tu-test_resnet.nope", "no pretrained weights .imagenet.. It has: none"),
        ("tu-resnet18d_nope", "Did you mean 'resnet18d"),
    ],
)
def test_weights_that_do_not_exist_are_refused_before_anything_else(encoder, message):
    with pytest.raises(ValueError, match=message):
        bpkd_sdk.train(f"smp/FPN/{encoder}", "no_data")


def test_names_of_networks():
    names = bpkd_sdk.list_models()
    assert "smp/DeepLabV3Plus/mobilenet_v2" in names
    assert names[0] == "pspnet_r101"
    with pytest.raises(ValueError, match="Did you mean 'pspnet_r18'"):
        bpkd_sdk.create_model("pspnet_r_18", 5)
    with pytest.raises(ValueError, match="no auxiliary segmentation head"):
        bpkd_sdk.create_model("smp/FPN/resnet18", 5, aux_head=True)
    with pytest.raises(ValueError, match="at least 1"):
        bpkd_sdk.create_model("pspnet_r18", 0)
