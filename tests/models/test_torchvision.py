"""Tests of networks of torchvision: names, instances, and the library's weights."""

import pytest
import torch
import torchvision
from torchvision.models import get_model, segmentation

import bpkd_sdk
from bpkd_sdk.models import identify
from bpkd_sdk.models.torchvision import list_models
from tests.families import ALL_METHODS, DATA, OPTIONS, learns_and_loads, teaches_by_every_method
from tests.networks import tiny

SMALL = "torchvision/lraspp_mobilenet_v3_large"
WITH_HEAD = "torchvision/deeplabv3_mobilenet_v3_large"


def instance(name, **options):
    torch.manual_seed(0)
    return get_model(name.removeprefix("torchvision/"), weights=None, weights_backbone=None, num_classes=9, **options)


@pytest.fixture
def saved_weights(monkeypatch):
    """The library's complete weights, random, without their download."""
    torch.manual_seed(1)
    network = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
    weights = segmentation.LRASPP_MobileNet_V3_Large_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: network.state_dict())
    return network


@pytest.mark.parametrize("name", [SMALL, WITH_HEAD])
def test_they_teach_by_every_method(name, tmp_path):
    terms = teaches_by_every_method(instance(name).eval(), tmp_path)
    assert {term.partition("/")[0] for term in terms} == {"ce", *ALL_METHODS}


@pytest.mark.parametrize(
    ("name", "options"), [(SMALL, {}), (WITH_HEAD, {"aux_loss": True})], ids=["lraspp", "deeplabv3-aux"]
)
def test_an_instance_learns_and_its_checkpoint_needs_no_instance(name, options, tmp_path):
    loaded = learns_and_loads(instance(name, **options), tmp_path)
    assert loaded.spec.name == name
    assert loaded.spec.aux_head == bool(options)


@pytest.mark.parametrize("name", list_models())
def test_every_network_is_built_by_name_and_recognised(name):
    with torch.device("meta"):
        network = bpkd_sdk.create_model(name, 5, aux_head="lraspp" not in name)
        theirs = get_model(
            name.removeprefix("torchvision/"), weights_backbone=None, num_classes=5, aux_loss="lraspp" not in name
        )
    assert network.spec.num_classes == 5
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_an_auxiliary_head_of_other_classes_is_kept(tmp_path):
    """As after a fine-tuning that replaced only the last layer of the main head."""
    network = get_model("deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=21, aux_loss=True)
    network.classifier[-1] = torch.nn.Conv2d(256, 9, 1)
    assert identify(network).config == {"aux_classes": 21}
    bpkd_sdk.save_model(network, tmp_path / "a.safetensors")
    loaded = bpkd_sdk.load_model(tmp_path / "a.safetensors")
    assert loaded.aux_classifier[-1].out_channels == 21
    assert loaded.classifier[-1].out_channels == 9


def test_a_changed_instance_is_not_recognised():
    network = instance(SMALL)
    network.backbone["0"][0] = torch.nn.Conv2d(4, 16, 3, stride=2, padding=1, bias=False)
    assert identify(network).name is None
    network = instance(SMALL)
    network.register_forward_hook(lambda _module, _inputs, output: {"out": -output["out"]})
    assert identify(network).name is None


def test_complete_weights_bring_their_classes(saved_weights):
    for name in (SMALL, f"{SMALL}@COCO_WITH_VOC_LABELS_V1"):
        network = bpkd_sdk.load_model(name)
        spec = network.spec
        assert (spec.name, spec.num_classes, spec.class_names[15]) == (SMALL, 21, "person")
        assert spec.mean == (0.485, 0.456, 0.406)
        assert network.provenance["weights"]["source"] == "torchvision, COCO_WITH_VOC_LABELS_V1"
        assert torch.equal(network.classifier.high_classifier.weight, saved_weights.classifier.high_classifier.weight)
    with pytest.raises(ValueError, match=r"has no weights 'COCO'. Did you mean|It has: COCO_WITH"):
        bpkd_sdk.load_model(f"{SMALL}@COCO")


def test_a_checkpoint_in_a_folder_with_the_name_of_a_library_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torchvision").mkdir()
    bpkd_sdk.save_model(bpkd_sdk.create_model("smp/FPN/tu-test_resnet", 3), "torchvision/last.safetensors")
    assert bpkd_sdk.load_model("torchvision/last.safetensors").spec.num_classes == 3


def test_a_teacher_by_name_has_its_complete_weights(saved_weights, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"The teacher has 21: __background__, aeroplane.*(.*\n)*.*pass class_map"):
        bpkd_sdk.distill(SMALL, tiny(9), (DATA, None), output_dir=tmp_path / "run", **OPTIONS)
    groups = {name: [] for name in DATA.class_names} | {"ground": ["__background__"], "disc": ["car", "bus"]}
    run = bpkd_sdk.distill(
        SMALL, tiny(9), (DATA, None), class_map=groups, check_teacher=False, output_dir=tmp_path / "run", **OPTIONS
    )
    printed = " ".join(capsys.readouterr().err.split())
    assert "Teacher: torchvision/lraspp_mobilenet_v3_large with the weights torchvision, COCO" in printed
    assert run.history[0]["terms"].keys() == {"ce", "edge", "body"}


def test_the_encoder_starts_from_a_file_or_from_imagenet_weights(tmp_path, monkeypatch):
    torch.manual_seed(2)
    classifier = torchvision.models.mobilenet_v3_large()
    torch.save(classifier.state_dict(), tmp_path / "a.pth")
    network = bpkd_sdk.create_model(SMALL, 3, backbone_weights=tmp_path / "a.pth")
    assert torch.equal(network.backbone["0"][0].weight, classifier.features[0][0].weight)

    def offline(*_args, **_options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(RuntimeError, match=r"'imagenet' weights.*checkpoints nor could.*not known(.*\n)*.*'none'"):
        bpkd_sdk.create_model(SMALL, 3, backbone_weights="imagenet")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchvision/fcn_resnet5", {}, "Did you mean 'torchvision/fcn_resnet50'"),
        (SMALL, {"aux_head": True}, "no auxiliary segmentation head"),
        (SMALL, {"in_channels": 4}, "3 channels, but got in_channels=4"),
        (SMALL, {"backbone_weights": "coco"}, "'imagenet'"),
        (f"{SMALL}@DEFAULT", {}, "Open them with load_model"),
    ],
)
def test_bad_names_and_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        bpkd_sdk.create_model(name, 3, **options)
