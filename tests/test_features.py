"""Tests of feature maps by module path: the paths are found, and the maps are recorded and released."""

import gc
import json
import weakref

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from typer.testing import CliRunner

import bpkd_sdk
from bpkd_sdk.cli import app
from bpkd_sdk.features import Capture, feature_path, find_module, list_features, unwrap
from bpkd_sdk.models.zoo import ZOO
from tests.networks import tiny

IMAGE = torch.randn(1, 3, 32, 32)


def last_feature(network, image=IMAGE):
    """Return the feature map at `feature_path`, from one forward pass in eval mode."""
    path = feature_path(network)
    with torch.no_grad(), Capture(network.eval(), [path]) as capture:
        network(image)
        return capture.take()[path]


@pytest.mark.parametrize("name", ZOO)
def test_the_last_feature_map_of_the_zoo(name, shallow):
    network = bpkd_sdk.create_model(name, 7, aux_head=ZOO[name].has_aux_head)
    assert feature_path(network) == "decode_head.dropout:input"
    image = torch.randn(1, 3, 64, 64)
    feature = last_feature(network, image)
    assert feature.shape[1] == ZOO[name].channels
    torch.testing.assert_close(network.decode_head.conv_seg(feature), network(image))


@pytest.mark.parametrize("architecture", [cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()])
def test_the_last_feature_map_of_segmentation_models_pytorch(architecture):
    encoder, side = ("tu-vit_tiny_patch16_224", 224) if architecture == "DPT" else ("resnet18", 128)
    network = bpkd_sdk.create_model(f"smp/{architecture}/{encoder}", 7)
    feature = last_feature(network, torch.randn(1, 3, side, side))
    head = network.segmentation_head
    classifier = head.head[-1] if architecture == "DPT" else head[0]
    assert classifier(feature).shape[1] == 7


@pytest.mark.parametrize(
    ("function", "path"),
    [
        ("fcn_resnet50", "classifier.3:input"),
        ("deeplabv3_mobilenet_v3_large", "classifier.4:input"),
        ("lraspp_mobilenet_v3_large", "classifier.high_classifier:input"),
    ],
)
def test_the_path_in_torchvision(function, path):
    options = {} if function.startswith("lraspp") else {"aux_loss": True}
    network = getattr(torchvision.models.segmentation, function)(
        weights=None, weights_backbone=None, num_classes=7, **options
    )
    assert feature_path(network) == path


def test_the_last_feature_map_of_any_other_network():
    network = tiny(7)
    assert feature_path(network) == "5:input"
    torch.testing.assert_close(network[6](last_feature(network)), network(IMAGE))
    network.aux = nn.Conv2d(8, 7, 1)
    assert feature_path(network) == "5:input"
    with pytest.raises(ValueError, match="no convolution in Linear"):
        feature_path(nn.Linear(3, 3))


def test_output_and_input_of_modules_and_gradients_through_them():
    network = tiny(7)
    with Capture(network, ["2", "3:input", "4"]) as capture:
        logits = network(IMAGE)
        features = capture.take()
    assert list(features) == ["2", "3:input", "4"]
    assert features["2"] is features["3:input"]
    torch.testing.assert_close(network[6](features["4"]), logits)
    features["4"].sum().backward()
    assert network[0].weight.grad.abs().max() > 0


def test_features_and_hooks_are_released():
    network = tiny(7)
    capture = Capture(network, ["4"])
    network(IMAGE)
    feature = weakref.ref(capture.take()["4"])
    gc.collect()
    assert feature() is None
    with pytest.raises(RuntimeError, match="'4' did not run"):
        capture.take()
    network(IMAGE)
    capture.remove()
    network(IMAGE)
    with pytest.raises(RuntimeError, match="did not run"):
        capture.take()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "decode_head.bottelneck",
            "Did you mean 'decode_head.bottleneck'.*in 'decode_head' are:.*decode_head.conv_seg",
        ),
        ("decode_head.nothing.at.all:input", "in 'decode_head' are:"),
        ("xyz", "in the network are:.*backbone.*decode_head"),
        ("", "in the network are:"),
    ],
)
def test_the_error_for_a_path_that_does_not_exist_lists_the_modules(path, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Capture(bpkd_sdk.create_model("pspnet_r18", 3), ["backbone", path])


def test_a_bad_path_leaves_no_hook():
    network = tiny(7)
    with pytest.raises(ValueError, match="no module at 'nowhere'"):
        Capture(network, ["4", "nowhere"])
    assert not network[4]._forward_hooks


def test_values_that_are_not_feature_maps_are_refused():
    network = bpkd_sdk.create_model("pspnet_r18", 3).eval()
    capture = Capture(network, ["decode_head:input"])
    network(IMAGE)
    with pytest.raises(TypeError, match="'decode_head:input', but got"):
        capture.take()
    flat = nn.Sequential(nn.Flatten())
    capture = Capture(flat, ["0"])
    flat(IMAGE)
    with pytest.raises(TypeError, match=r"at '0', but got \(1, 3072\)"):
        capture.take()


def test_compiled_network():
    network = tiny(7).eval()
    expected = network[:5](IMAGE)
    compiled = torch.compile(network, backend="eager")
    assert unwrap(compiled) is network
    assert feature_path(compiled) == "5:input"
    capture = Capture(compiled, ["4", "5:input"])
    for _ in range(2):
        compiled(IMAGE)
        features = capture.take()
        torch.testing.assert_close(features["4"], expected)
        torch.testing.assert_close(features["5:input"], expected)
    features["4"].sum().backward()
    assert network[0].weight.grad.abs().max() > 0


def test_wrapped_networks(tmp_path):
    network = tiny(7).eval()
    expected = network[:5](IMAGE)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrappers = [nn.DataParallel(network), nn.parallel.DistributedDataParallel(network)]
        wrappers.append(torch.compile(wrappers[1], backend="eager"))
        for wrapped in wrappers:
            assert find_module(wrapped, "4") is network[4]
            with Capture(wrapped, ["4"]) as capture:
                wrapped(IMAGE)
                torch.testing.assert_close(capture.take()["4"], expected)
    finally:
        dist.destroy_process_group()


def test_list_features():
    network = bpkd_sdk.create_model("pspnet_r18", 5, aux_head=True).train()
    network.decode_head.eval()
    rows = list_features(network, (64, 96))
    shapes = {row.path: row.shape for row in rows}
    assert shapes["decode_head.bottleneck"] == (1, 128, 8, 12)
    assert shapes["decode_head"] == (1, 5, 8, 12)
    paths = [row.path for row in rows]
    assert [row.path for row in rows if row.is_default] == ["decode_head.dropout:input"]
    assert shapes["decode_head.dropout:input"] == (1, 128, 8, 12)
    assert paths.index("decode_head.bottleneck") < paths.index("decode_head.dropout:input")
    assert paths.index("backbone.layer1") < paths.index("backbone.layer4") < paths.index("decode_head.bottleneck")
    assert not any(path.startswith("auxiliary_head") for path in paths)
    assert network.training
    assert not network.decode_head.training
    with Capture(network.eval(), paths[:3]) as capture:
        network(torch.zeros(1, 3, 64, 96))
        captured = [(path, tuple(feature.shape)) for path, feature in capture.take().items()]
        assert captured == [(row.path, row.shape) for row in rows[:3]]


def inspected(*arguments):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_inspect_a_name():
    facts = json.loads(inspected("smp/FPN/tu-mobilenetv3_small_050", "--classes", 5, "--input-size", "64x96", "--json"))
    assert (facts["classes"], facts["sides must be multiples of"], facts["stride of the logits"]) == (5, 32, 4)
    taken = [row for row in facts["features"] if row["is_default"]]
    assert taken == [{"path": "segmentation_head.0:input", "shape": [1, 128, 16, 24], "is_default": True}]


def test_inspect_a_checkpoint(tmp_path):
    network = bpkd_sdk.create_model("pspnet_r18", 5)
    bpkd_sdk.save_model(network, tmp_path / "network.safetensors")
    out = inspected(tmp_path / "network.safetensors", "--input-size", "64x64")
    assert any("decode_head.dropout:input" in line and "default" in line for line in out.splitlines())
    assert "backbone.layer1.0.conv1" not in out
    assert "backbone.layer1.0.conv1" in inspected(tmp_path / "network.safetensors", "--input-size", "64x64", "--all")
