"""The bridge to segmentation-models-pytorch: every architecture builds, says what it needs, and keeps its stride."""

import pytest
import segmentation_models_pytorch as smp
import torch

import bpkd_sdk
from bpkd_sdk.models.smp import ARCHITECTURES, normalization

# Architectures that need a certain kind of encoder; the others take ResNet-18.
ENCODERS = {"DPT": "tu-vit_tiny_patch16_224", "Segformer": "mit_b0"}
SIZES = {"DPT": 224, "PAN": 128}  # position embeddings for one size; features pooled thrice
WITHOUT_LAST_UPSAMPLING = {"FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet", "Segformer"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_builds_with_logits_at_its_own_stride(architecture):
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


def test_the_divisor_is_what_the_network_needs():
    model = bpkd_sdk.create_model("smp/FPN/resnet18", 5).eval()
    assert model.spec.size_divisor == 32
    with pytest.raises(RuntimeError, match="divisible by 32"):
        model(torch.randn(1, 3, 64, 70))


def test_a_module_of_the_library_itself_is_understood():
    assert bpkd_sdk.models.get_spec(smp.FPN("resnet18", encoder_weights=None)).size_divisor == 32


@pytest.mark.parametrize(
    ("encoder", "weights", "mean"),
    [
        ("tu-tf_efficientnet_lite0", "imagenet", (0.5, 0.5, 0.5)),
        ("tu-tf_efficientnet_lite0", None, (0.485, 0.456, 0.406)),
    ],
)
def test_pretrained_weights_bring_their_normalisation(encoder, weights, mean):
    """Only the facts beside the weights: the weights themselves would be downloaded."""
    assert normalization(encoder, weights)[0] == pytest.approx(mean)


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(**_):
        raise OSError("Name or service not known")

    monkeypatch.setitem(ARCHITECTURES, "FPN", offline)
    with pytest.raises(RuntimeError, match=r"'imagenet' weights of encoder 'resnet18' could not be had.*Connect"):
        bpkd_sdk.create_model("smp/FPN/resnet18", 5, backbone_weights="imagenet")


def test_names():
    names = bpkd_sdk.list_models()
    assert "smp/DeepLabV3Plus/mobilenet_v2" in names
    assert names[0] == "pspnet_r101"
    with pytest.raises(ValueError, match="Did you mean 'pspnet_r18'"):
        bpkd_sdk.create_model("pspnet_r_18", 5)
    with pytest.raises(ValueError, match="no auxiliary segmentation head"):
        bpkd_sdk.create_model("smp/FPN/resnet18", 5, aux_head=True)
    with pytest.raises(ValueError, match="at least 1"):
        bpkd_sdk.create_model("pspnet_r18", 0)
