"""Tests of checkpoints: round trips, and the files that are refused."""

import json
import pickle
import socket

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bpkd_sdk
from bpkd_sdk.files import write_atomically
from bpkd_sdk.models.checkpoint import read_header, write_tensors
from tests.networks import tiny

NAME = "smp/FPN/tu-mobilenetv3_small_050"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return bpkd_sdk.create_model(NAME, 5).eval()


def test_a_round_trip_needs_only_the_file(model, tmp_path):
    bpkd_sdk.save_model(model, tmp_path / "a.safetensors", training={"steps": 3})
    again = bpkd_sdk.load_model(tmp_path / "a.safetensors")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), again(images))
    assert again.spec == model.spec
    assert again.provenance == {"steps": 3}
    assert not again.training
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["bpkd"])
    assert header["training"] == {"steps": 3}
    assert header["network"]["name"] == NAME
    assert header["versions"]["torch"] == torch.__version__.split("+")[0] or "torch" in header["versions"]


def test_create_model_loads_a_checkpoint(model, tmp_path):
    bpkd_sdk.save_model(model, tmp_path / "a.safetensors")
    again = bpkd_sdk.create_model(NAME, 5, weights=tmp_path / "a.safetensors").eval()
    assert torch.equal(next(model.parameters()), next(again.parameters()))
    with pytest.raises(ValueError, match=r"does not fit FPN.*\n.*misshapen: segmentation_head"):
        bpkd_sdk.create_model(NAME, 6, weights=tmp_path / "a.safetensors")


def test_a_network_of_the_users_class_needs_an_instance(tmp_path):
    own = tiny(4)
    own.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=4, class_names=("a", "b", "c", "d"), mean=(0.0,) * 3)
    bpkd_sdk.save_model(own, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"contains a torch.nn.*Sequential.*load_model\(path, model=\.\.\.\)"):
        bpkd_sdk.load_model(tmp_path / "own.safetensors")
    again = bpkd_sdk.load_model(tmp_path / "own.safetensors", model=tiny(4, seed=1))
    assert again.spec == own.spec
    assert torch.equal(again[0].weight, own[0].weight)
    with pytest.raises(ValueError, match="missing: 0.weight|misshapen"):
        bpkd_sdk.load_model(tmp_path / "own.safetensors", model=tiny(4, width=9))


def test_altered_weights_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    bpkd_sdk.save_model(tiny(4), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state["0.weight"][0, 0, 0, 0] += 1e-3
    save_file(state, path, metadata=metadata)
    with pytest.raises(ValueError, match="do not match the hash"):
        bpkd_sdk.load_model(path, model=tiny(4))


def test_files_that_are_not_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        bpkd_sdk.load_model(tmp_path / "none.safetensors")
    whole = tmp_path / "a.safetensors"
    bpkd_sdk.save_model(tiny(4), whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a readable safetensors file.*truncated"):
        bpkd_sdk.load_model(tmp_path / "cut.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="no bpkd-sdk header"):
        bpkd_sdk.load_model(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="ends in '.safetensors'"):
        bpkd_sdk.save_model(tiny(4), tmp_path / "a.pt")


def test_pickles_are_never_loaded(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = tmp_path / "hostile.safetensors"
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        bpkd_sdk.load_model(path)
    assert not (tmp_path / "owned").exists()


def test_a_failed_write_leaves_only_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smp/DeepLabV3Pluss/resnet18", "Did you mean 'DeepLabV3Plus'"),
        ("smp/FPN/resnet81", "Did you mean 'resnet18'"),
        ("smp/FPN", "a name like"),
    ],
)
def test_errors_about_unknown_names_state_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        bpkd_sdk.create_model(name, 5)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"mean": (0.5, 0.5)}, "`mean` to have one value for each of 3"),
        ({"std": (0.5, 0.0, 0.5)}, "`std` to be above 0"),
        ({"mean": (123.675, 116.28, 103.53)}, "of images in 0..1, but got .*Divide them by 255"),
        ({"class_names": ("a", "b")}, "`class_names` to have one entry per class, 3, but got 2"),
        ({"palette": ((0, 0, 0),)}, "`palette` to have one entry per class, 3, but got 1"),
    ],
)
def test_inconsistent_facts_are_refused(facts, message):
    with pytest.raises(ValueError, match=message):
        bpkd_sdk.NetworkSpec(None, 3, **facts)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"name": None}, "num_classes: Field required"),
        ({"name": None, "num_classes": "many"}, "num_classes: .*valid integer"),
        ({"name": None, "num_classes": 3, "depth": 18}, "depth: Unexpected keyword"),
        ({"name": None, "num_classes": 3, "palette": [[0, 0]] * 3}, "palette.0.2: Field required"),
        ({"name": None, "num_classes": 3, "mean": [0.5]}, "`mean` to have one value for each of 3"),
        (None, "NetworkSpec: "),
    ],
)
def test_a_header_that_does_not_describe_a_network_is_refused(facts, message, tmp_path):
    path = tmp_path / "a.safetensors"
    bpkd_sdk.save_model(tiny(4), path)
    header = read_header(path) | {"network": facts}
    write_tensors(path, load_file(path), header)
    with pytest.raises(ValueError, match=rf"The header of .*a.safetensors does not hold a valid(.*\n)*.*{message}"):
        bpkd_sdk.load_model(path, model=tiny(4))


def test_a_field_that_an_older_header_lacks_has_its_default():
    assert bpkd_sdk.NetworkSpec.from_dict({"name": None, "num_classes": 3}) == bpkd_sdk.NetworkSpec(None, 3)


def upernet(**backbone):
    arguments = {"model_type": "upernet", "backbone_config": {"model_type": "resnet", "depths": [1] * 4}, **backbone}
    return {"class": "UperNetForSemanticSegmentation", "arguments": arguments}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("smp/Unet/tu-hf-hub:nobody/nothing", None),
        ("smp/Unet/tu-hf_hub:nobody/nothing", {"classes": 3}),
        ("smp/Unet/tu-local-dir:/nowhere", None),
        ("smp/Unet/tu-resnet18.hf-hub:nobody/nothing", {"classes": 3}),
        ("smp/Unet/tu-resnet18", {"classes": 3, "pretrained_cfg_overlay": {"hf_hub_id": "nobody/nothing"}}),
        ("torchvision/deeplabv3_resnet50@DEFAULT", None),
        ("transformers/nobody/nothing", None),
        ("transformers/a", upernet(backbone="resnet18", backbone_config=None)),
        ("transformers/a", upernet(backbone="nobody/nothing", use_pretrained_backbone=True)),
        ("transformers/a", upernet(attn_implementation="nobody/nothing")),
        ("hf://nobody/nothing", None),
    ],
)
def test_a_file_that_names_another_place_is_refused_without_the_network(name, config, tmp_path, monkeypatch):
    """A refused name must not be looked up either: HF_HUB_OFFLINE is not set for a user."""

    def forbid(*_arguments, **_options):
        raise AssertionError("the network was used")

    for module, attribute in ((socket, "getaddrinfo"), (socket.socket, "connect")):
        monkeypatch.setattr(module, attribute, forbid)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    network = tiny(3)
    network.spec = bpkd_sdk.NetworkSpec(name, 3, config=config)
    bpkd_sdk.save_model(network, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"from which files|no model|valid sources|load_model|could load|cannot build|Unknown"
    ):
        bpkd_sdk.load_model(tmp_path / "a.safetensors")
