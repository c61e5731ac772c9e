"""Tests of ImageNet weights: with timm's weights, the encoders compute timm's feature maps."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from torch import Tensor, nn

import bpkd_sdk
from bpkd_sdk import hub
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


@pytest.mark.parametrize("is_silent", [False, True], ids=["refused", "silent"])
def test_without_a_connection_one_attempt_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_silent: bool
) -> None:
    def wait(_: float) -> None:
        raise AssertionError("the client tries again")

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not is_silent:
            server.close()
        for name, value in {"ENDPOINT": address, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path)}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr(hub, "CONNECTION_SECONDS", 0.1)
        monkeypatch.setattr(time, "sleep", wait)
        for name in ("deeplabv3plus_mv2", "smp/FPN/resnet18", "smp/FPN/tu-mobilenetv3_small_050"):
            with pytest.raises(RuntimeError, match=rf"{name}'.* {address} cannot be reached(.*\n)*.*weights='none'"):
                bpkd_sdk.create_model(name, 2, backbone_weights="imagenet")
        with pytest.raises(RuntimeError, match="not in the cache .* and the Hub cannot be reached"):
            bpkd_sdk.load_model("hf://user/net")
    assert constants.HF_HUB_OFFLINE is False
    assert caplog.records == []
