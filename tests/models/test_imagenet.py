"""Tests of ImageNet weights: with timm's weights, the encoders compute timm's feature maps."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from bpkd_sdk.models import imagenet
from bpkd_sdk.models.zoo import ZOO, build_network

IMAGES = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
BY_SOURCE = {entry.imagenet: entry for entry in ZOO.values() if entry.imagenet}


def features_of_timm(source: str, state: dict[str, Tensor]) -> list[Tensor]:
    """Compute timm's feature maps whose strides and dilations equal this package's: all, or those before stride 8."""
    if source.startswith("hrnet"):
        model: Any = timm.create_model(source).eval()
        model.load_state_dict(state)
        for module in model.modules():
            if isinstance(module, nn.Upsample):
                module.mode, module.align_corners = "bilinear", False
        x = model.act1(model.bn1(model.conv1(IMAGES)))
        return list(model.stages(model.act2(model.bn2(model.conv2(x)))))
    options = {"output_stride": 8, "out_indices": (1, 2, 3, 4)} if "101" in source else {"out_indices": (1, 2)}
    model = timm.create_model(source, features_only=True, **options).eval()
    model.load_state_dict(state, strict=False)
    return list(model(IMAGES))


@pytest.mark.parametrize("source", imagenet.SOURCES)
def test_renamed_weights_compute_the_same(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    untrained = timm.create_model(source).eval()
    for module in untrained.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.8, 1.2)
    with torch.no_grad():
        expected = features_of_timm(source, untrained.state_dict())
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained, in_chans: untrained)
        backbone = build_network(BY_SOURCE[source].name, 2, backbone_weights="imagenet").backbone.eval()
        got = backbone(IMAGES)[: len(expected)]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_every_source_belongs_to_a_network() -> None:
    assert set(BY_SOURCE) == set(imagenet.SOURCES)


def test_no_weights_exist_for_resnet18_with_the_deep_stem() -> None:
    with pytest.raises(ValueError, match=r"'isanet_r18'.*backbone_weights='none'.*weights="):
        build_network("isanet_r18", 2, backbone_weights="imagenet")


def test_the_error_without_a_connection_states_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host.")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(RuntimeError, match=r"'deeplabv3plus_mv2'.*no route to host(.*\n)*.*backbone_weights="):
        build_network("deeplabv3plus_mv2", 2, backbone_weights="imagenet")
