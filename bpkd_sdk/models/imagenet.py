"""ImageNet weights for the encoders of the zoo: timm's weights, under the parameter names of this package."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bpkd_sdk.models.checkpoint import load_state
from bpkd_sdk.models.weights import IMAGENET, NONE, explained_download


@dataclass(frozen=True)
class Source:
    """How to convert the state dict of a timm network.

    Attributes:
        rename: Function from timm's name of a parameter to the name in this package.
        classifier: Prefixes of timm's names for the classifier, which is left out.
    """

    rename: Callable[[str], str]
    classifier: tuple[str, ...]


def _same_name(key: str) -> str:
    return key


def _resnet_v1c(key: str) -> str:
    return re.sub(r"^bn1\.", "stem.7.", re.sub(r"^conv1\.", "stem.", key))


def _mobilenet_v2(key: str) -> str:
    match = re.match(r"blocks\.(\d)\.(\d)\.(conv|bn)(\w+)\.(\w+)$", key)
    if match is None:
        return re.sub(r"^bn1\.", "conv1.bn.", re.sub(r"^conv_stem\.", "conv1.conv.", key))
    stage, block, kind, suffix, parameter = match.groups()
    order = ("_dw", "_pw") if stage == "0" else ("_pw", "_dw", "_pwl")
    position = order.index(suffix) if kind == "conv" else int(suffix) - 1
    return f"layer{int(stage) + 1}.{block}.conv.{position}.{kind}.{parameter}"


_HRNET = Source(_same_name, ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier."))

# ResNet-18 with the deep stem has no source: timm's resnet18d has the same shapes, but its shortcuts pool.
SOURCES: dict[str, Source] = {
    "resnet101c.gluon_in1k": Source(_resnet_v1c, ("fc.",)),
    "resnet18.tv_in1k": Source(_same_name, ("fc.",)),
    "mobilenetv2_100.ra_in1k": Source(_mobilenet_v2, ("conv_head.", "bn2.", "classifier.")),
    "hrnet_w48.ms_in1k": _HRNET,
    "hrnet_w18_small_v2.ms_in1k": _HRNET,
}


def check(network: str, source: str | None) -> None:
    """Raise ValueError if no ImageNet weights exist for the encoder of a network.

    Args:
        network: Name of the network.
        source: Key of `SOURCES`; None if no weights fit.
    """
    if source is None:
        raise ValueError(
            f"timm has no ImageNet weights that fit the encoder of {network!r}. Pass backbone_weights={NONE!r} for "
            "random weights, backbone_weights=<file with OpenMMLab's ImageNet weights of this encoder>, or "
            "weights=<an OpenMMLab checkpoint of this network>."
        )


def load(backbone: nn.Module, network: str, source: str, in_channels: int = 3) -> dict[str, Any]:
    """Load ImageNet weights into an encoder, in place.

    Args:
        backbone: Encoder of the zoo.
        network: Name of the network that the encoder belongs to, for the error message.
        source: Key of `SOURCES`.
        in_channels: Number of channels of the images, to which timm adapts the first layer.

    Returns:
        The origin of the weights.

    Raises:
        RuntimeError: If timm cannot download the weights.
    """
    import timm

    with explained_download(IMAGENET, network):
        state = timm.create_model(source, pretrained=True, in_chans=in_channels).state_dict()
    load_state(backbone, rename_parameters(state, SOURCES[source]), source=f"timm's {source!r}")
    return timm_origin(source)


def timm_origin(name: str) -> dict[str, Any]:
    """Return the origin of timm's pretrained weights of a network: the repository on the hub, and the licence."""
    import timm

    facts = timm.models.get_pretrained_cfg(name)
    return {} if facts is None else {"source": facts.hf_hub_id or facts.url, "license": facts.license}


def rename_parameters(state: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Return a timm state dict under the names of this package, without the classifier."""
    return {source.rename(key): value for key, value in state.items() if not key.startswith(source.classifier)}
