"""Networks of other than three channels: how they are built, normalise, and come back from a checkpoint."""

from dataclasses import replace

import pytest
import torch

import bpkd_sdk
from bpkd_sdk import NetworkSpec
from bpkd_sdk.models import get_spec, set_spec


@pytest.mark.parametrize("name", ["pspnet_r18", "pspnet_r18b", "deeplabv3plus_mv2", "hrnetv2p_w18s"])
@pytest.mark.usefixtures("shallow")
def test_every_stem_of_the_zoo_takes_five_channels(name):
    network = bpkd_sdk.create_model(name, 2, in_channels=5).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 5, 64, 64)).shape[1] == 2
    assert (network.spec.in_channels, network.spec.mean, network.spec.std) == (5, (), ())


def test_the_checkpoint_of_a_4_channel_network_is_built_again_with_its_normalisation(tmp_path):
    network = bpkd_sdk.create_model("smp/Linknet/tu-test_resnet", 2, in_channels=4).eval()
    spec = replace(network.spec, value_range=(0, 4095), mean=(0.1,) * 4, std=(0.2,) * 4, bands=(2, 1, 0))
    set_spec(network, spec)
    bpkd_sdk.save_model(network, tmp_path / "a.safetensors")
    again = bpkd_sdk.load_model(tmp_path / "a.safetensors")
    assert again.spec == spec
    images = torch.full((1, 4, 32, 32), 819.0)
    torch.testing.assert_close(again.spec.normalize(images), torch.full((1, 4, 32, 32), (819 / 4095 - 0.1) / 0.2))
    torch.testing.assert_close(again(images), network(images))


def test_an_image_is_scaled_from_the_lowest_value_of_the_range():
    spec = NetworkSpec(None, 2, in_channels=1, value_range=(-10, 30), mean=(0.5,), std=(0.25,))
    assert spec.normalize(torch.tensor([-10.0, 10, 30]).view(1, 1, 1, 3)).flatten().tolist() == [-2, 0, 2]


def test_a_network_without_measured_mean_refuses_to_normalise():
    network = bpkd_sdk.create_model("smp/Linknet/tu-test_resnet", 2, in_channels=4)
    with pytest.raises(ValueError, match="mean and the standard deviation of the network's 4 channels are not known"):
        get_spec(network).normalize(torch.zeros(1, 4, 8, 8))


def test_imitated_images_are_normalised_as_the_pictures_are_by_imagenet():
    pictures = torch.randint(100, 140, (1, 3, 4, 4), dtype=torch.uint8)
    spec = NetworkSpec(None, 2, in_channels=4, value_range=(0, 4095), mean=(0.5,) * 4, std=(0.1,) * 4)
    images = spec.imitate(pictures)
    assert images.shape == (1, 4, 4, 4)
    assert images.dtype == torch.float32
    expected = NetworkSpec(None, 2).normalize(pictures)[:, [0, 1, 2, 0]]
    torch.testing.assert_close(spec.normalize(images), expected, atol=1e-4, rtol=0)
    assert NetworkSpec(None, 2).imitate(pictures) is pictures


def test_a_spec_with_the_wrong_number_of_means_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`mean` to have one value for each of 4 channels.*pass mean=.. and std=.."):
        NetworkSpec(None, 2, in_channels=4)
    (tmp_path / "x.pth").touch()
    with pytest.raises(ValueError, match="in_channels=5"):
        bpkd_sdk.create_model("pspnet_r18", 2, weights=tmp_path / "x.pth", in_channels=5)
