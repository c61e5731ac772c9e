"""Backbones that start from ImageNet: timm's weights, where they are the same layers under other names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from bpkd_sdk.models.checkpoint import load_state


def _same(key: str) -> str:
    return key


def _resnet_v1c(key: str) -> str:
    return re.sub(r"^bn1\.", "stem.7.", re.sub(r"^conv1\.", "stem.", key))


def _mobilenet_v2(key: str) -> str:
    found = re.match(r"blocks\.(\d)\.(\d)\.(conv|bn)(\w+)\.(\w+)$", key)
    if found is None:
        return re.sub(r"^bn1\.", "conv1.bn.", re.sub(r"^conv_stem\.", "conv1.conv.", key))
    stage, block, kind, which, parameter = found.groups()
    order = ("_dw", "_pw") if stage == "0" else ("_pw", "_dw", "_pwl")
    position = order.index(which) if kind == "conv" else int(which) - 1
    return f"layer{int(stage) + 1}.{block}.conv.{position}.{kind}.{parameter}"


@dataclass(frozen=True)
class Source:
    """How a timm network's parameters are named here, and the prefixes of its classifier, which is left out."""

    rename: Callable[[str], str]
    classifier: tuple[str, ...]


_HRNET = Source(_same, ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier."))

# There is none for ResNet-18 with the deep stem: timm's resnet18d has the same shapes, but pools in its shortcuts.
SOURCES: dict[str, Source] = {
    "resnet101c.gluon_in1k": Source(_resnet_v1c, ("fc.",)),
    "resnet18.tv_in1k": Source(_same, ("fc.",)),
    "mobilenetv2_100.ra_in1k": Source(_mobilenet_v2, ("conv_head.", "bn2.", "classifier.")),
    "hrnet_w48.ms_in1k": _HRNET,
    "hrnet_w18_small_v2.ms_in1k": _HRNET,
}


def load(backbone: nn.Module, network: str, source: str | None) -> None:
    """Load ImageNet weights into a backbone.

    Args:
        backbone: Changed in place.
        network: Name of the network it belongs to, for the error text.
        source: A key of `SOURCES`, or None where no weights fit.

    Raises:
        ValueError: If there are no weights for this backbone.
        RuntimeError: If timm cannot download them.
    """
    if source is None:
        raise ValueError(
            f"timm has no ImageNet weights that fit the backbone of {network!r}. Use backbone_weights=None, "
            "or weights=<an OpenMMLab checkpoint of this network>."
        )
    import timm

    try:
        state = timm.create_model(source, pretrained=True).state_dict()
    # The hub's client raises the errors of whichever HTTP library it was built on, with no common base.
    except Exception as error:
        raise RuntimeError(
            f"The ImageNet weights of {network!r} ({source!r}) could not be downloaded by timm: {error} "
            "Connect to the internet once (they are cached afterwards), or start from a file: weights=<path>."
        ) from error
    load_state(backbone, renamed(state, SOURCES[source]), source=f"timm's {source!r}")


def renamed(state: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """A timm state dict under this package's names, without the classifier."""
    return {source.rename(key): value for key, value in state.items() if not key.startswith(source.classifier)}
