"""Counts agree with counts by hand, with the paper's 16 figures, and with those of the original networks."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bpkd_sdk.evaluation.profile import Profile, profile
from bpkd_sdk.models.zoo import ZOO, ZooEntry, build_network

ENTRIES = [pytest.param(entry, id=name) for name, entry in ZOO.items()]
TABLE = [pytest.param(entry, id=name) for name, entry in ZOO.items() if not entry.variant_of]


@cache
def profile_of(entry: ZooEntry, num_classes: int) -> Profile:
    with torch.device("meta"):
        return profile(build_network(entry.name, num_classes, aux_head=entry.has_aux_head))


def test_the_zoo_has_the_papers_table() -> None:
    figures = {name: (entry.paper_gflops, entry.paper_params) for name, entry in ZOO.items() if not entry.variant_of}
    assert figures == {
        "pspnet_r101": (256.89, 68.07),
        "pspnet_r18": (54.53, 12.82),
        "hrnetv2p_w48": (95.64, 65.95),
        "hrnetv2p_w18s": (10.49, 3.97),
        "deeplabv3plus_r101": (255.67, 62.68),
        "deeplabv3plus_mv2": (69.60, 15.35),
        "isanet_r101": (228.21, 56.80),
        "isanet_r18": (54.33, 12.46),
    }


@pytest.mark.parametrize("entry", TABLE)
def test_the_papers_figures_are_reproduced(entry: ZooEntry) -> None:
    got = profile_of(entry, 150)
    assert (round(got.paper_macs / 1e9, 2), round(got.params / 1e6, 2)) == (entry.paper_gflops, entry.paper_params)


@pytest.mark.parametrize("entry", ENTRIES)
def test_counts_equal_those_of_the_originals(entry: ZooEntry, reference: Path) -> None:
    facts = json.loads((reference / "models" / f"{entry.name.replace('hrnetv2p', 'hrnet')}.json").read_text())
    got = profile_of(entry, 19)
    assert got.by_operator == facts["macs_512_mmseg_counter_by_operator"]
    for counts, expected in ((got, facts), (profile_of(entry, 150), facts["num_classes_150"])):
        assert counts.paper_macs == expected["macs_512_mmseg_counter"]
        assert counts.macs == expected["macs_512_flopcounter"]
        assert counts.params == expected["params_total"]


class Tiny(nn.Module):
    """A network with one operator of each counted kind, small enough to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 4)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = torch.relu_(self.bn(self.conv(images)))
        scale = self.linear(self.pool(x).flatten(1))[:, :, None, None]
        return {"out": nn.functional.interpolate(x * scale, scale_factor=2.0, mode="bilinear")}


def test_counts_by_hand() -> None:
    got = profile(Tiny(), (8, 8))
    map_, image = 4 * 4 * 4, 4 * 8 * 8
    assert got.params == 3 * 4 * 9 + 4 + 8 + 20
    assert got.by_operator == {
        "conv": map_ * 27,
        "matmul": 16,
        "batch_norm": 2 * map_,
        "adaptive_avg_pool2d": map_,
        "upsample_bilinear2d": 2 * 4 * image,
    }
    assert (got.macs, got.flops) == (map_ * 27 + 16, 2 * (map_ * 27 + 16))
    assert got.activations == map_ + 4
    assert got.activation_bytes == 4 * (map_ + map_ + 4 + 4 + map_ + image)
    assert {"relu_", "mul", "upsample_bilinear2d", "mean"} < set(got.not_counted)
    assert not {"convolution", "addmm", "view"} & set(got.not_counted)


def test_attention_counts_its_two_products() -> None:
    class Attention(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            tokens = images.flatten(2).transpose(1, 2)[:, None].expand(1, 2, -1, 3)
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert profile(Attention(), (4, 4)).macs == 2 * 2 * 16 * 16 * 3


def test_the_model_is_not_changed() -> None:
    model = Tiny().train()
    model.bn.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    profile(model, (8, 8))
    assert model.training
    assert model.conv.training
    assert not model.bn.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_image_has_the_type_and_device_of_the_model() -> None:
    plain = profile(Tiny(), (8, 8))
    half = profile(Tiny().bfloat16(), (8, 8))
    assert half.activation_bytes * 2 == plain.activation_bytes
    assert profile(Tiny().to("meta"), (8, 8)) == plain


def test_a_network_without_logits_is_refused() -> None:
    with pytest.raises(TypeError, match="logits"):
        profile(nn.Sequential(nn.Flatten()), (8, 8))
    with pytest.raises(
        TypeError,
        match=r"Expected a torch module, as create_model.name, num_classes. builds .*, but got 'pspnet_r18'\.",
    ):
        profile("pspnet_r18")  # type: ignore[arg-type]
