"""Networks of torchvision, by names of the form ``torchvision/<network>``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.segmentation import FCN, DeepLabV3

from bpkd_sdk.errors import did_you_mean
from bpkd_sdk.models import weights
from bpkd_sdk.models.spec import set_provenance, set_spec
from bpkd_sdk.spec import NetworkSpec

PREFIX = "torchvision/"
HAS_AUX_HEADS, TAKES_OTHER_CHANNELS = True, False


def list_models() -> list[str]:
    """Return ``torchvision/<network>`` for all segmentation networks of the library."""
    return [PREFIX + name for name in torchvision.models.list_models(module=torchvision.models.segmentation)]


def check_weights(name: str, backbone_weights: str) -> None:
    """Raise ValueError for an unknown network, or for an encoder that cannot start from these weights.

    Args:
        name: ``torchvision/<network>``.
        backbone_weights: "none", "imagenet", or the path of a file.
    """
    _parse(name)
    weights.check_known_weights(backbone_weights)


def _parse(name: str) -> tuple[str, str | None]:
    """Return the library's name of a network, and the name of complete weights after an ``@``."""
    network, _, version = name.removeprefix(PREFIX).partition("@")
    if PREFIX + network not in list_models():
        raise ValueError(f"torchvision has no network {network!r}.{did_you_mean(PREFIX + network, list_models())}")
    return network, version or None


def build_network(
    name: str,
    num_classes: int,
    *,
    aux_head: bool = False,
    backbone_weights: str = weights.NONE,
) -> nn.Module:
    """Build a network of the library, in training mode.

    Args:
        name: For example ``torchvision/deeplabv3_resnet50``.
        num_classes: C, the number of channels of the logits.
        aux_head: Whether to add the library's auxiliary head.
        backbone_weights: "none" for random weights, "imagenet" (the weights that the library chooses for the encoder,
            downloaded), or the path of a file with the weights of the encoder.

    Raises:
        ValueError: If the name is unknown, the network has no auxiliary head, or an argument does not fit it.
        RuntimeError: If the pretrained weights cannot be downloaded.
    """
    check_weights(name, backbone_weights)
    network, version = _parse(name)
    if version is not None:
        raise ValueError(f"{name!r} names complete weights. Open them with load_model({name!r}).")
    build: Any = partial(
        torchvision.models.get_model, network, weights=None, num_classes=num_classes, aux_loss=aux_head
    )
    origin: dict[str, Any] | None = None
    try:
        if backbone_weights == weights.IMAGENET:
            with weights.explained_download(backbone_weights, name, _cache()):
                model: nn.Module = build()  # the library's own choice of weights for the encoder
            origin = {"source": "torchvision, ImageNet"}
        else:
            model = build(weights_backbone=None)
    except NotImplementedError as error:
        raise ValueError(f"{name!r} has no auxiliary segmentation head; build it with aux_head=False.") from error
    if weights.is_file(backbone_weights):
        origin = weights.load_encoder_file(model.get_submodule("backbone"), backbone_weights)
    set_spec(model, NetworkSpec(name, num_classes, aux_head=aux_head))
    if origin is not None:
        set_provenance(model, {"backbone_weights": origin})
    return model


def load_pretrained(name: str) -> nn.Module:
    """Build a network with the library's complete weights, in eval mode.

    Args:
        name: ``torchvision/<network>``, or ``torchvision/<network>@<name of weights>``; without a name the library's
            default.

    Raises:
        ValueError: If the network or the weights are unknown.
        RuntimeError: If the weights cannot be downloaded.
    """
    network, version = _parse(name)
    choices = torchvision.models.get_model_weights(network)
    if version is not None and version not in choices.__members__:
        raise ValueError(
            f"{PREFIX + network!r} has no weights {version!r}.{did_you_mean(version, choices.__members__)} "
            f"It has: {', '.join(choices.__members__)}."
        )
    chosen: Any = choices[version or "DEFAULT"]
    with weights.explained_download(chosen.name, name, _cache()):
        model: nn.Module = torchvision.models.get_model(network, weights=chosen)
    preset, names = chosen.transforms(), tuple(chosen.meta["categories"])
    set_spec(
        model,
        NetworkSpec(
            PREFIX + network,
            len(names),
            aux_head=getattr(model, "aux_classifier", None) is not None,
            class_names=names,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        ),
    )
    set_provenance(model, {"weights": {"source": f"torchvision, {chosen.name}", "url": chosen.url}})
    return model.eval()


def _cache() -> str:
    return f"{torch.hub.get_dir()}/checkpoints"


def recognize(model: nn.Module) -> dict[str, Any] | None:
    """Return the fields of `NetworkSpec` that build a module again; None if it is not a network of the library."""
    if not type(model).__module__.startswith("torchvision.models.segmentation"):
        return None
    classes, aux_classes = (_count_classes(getattr(model, head, None)) for head in ("classifier", "aux_classifier"))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for name in list_models():
        fields: dict[str, Any] = {"name": name, "num_classes": classes, "aux_head": aux_classes > 0}
        if aux_classes not in (0, classes):
            fields["config"] = {"aux_classes": aux_classes}
        try:
            with torch.device("meta"):
                candidate = rebuild(NetworkSpec(**fields))
        except ValueError:  # the network has no auxiliary head
            continue
        if {key: value.shape for key, value in candidate.state_dict().items()} == shapes:
            return fields
    return None


def _count_classes(head: Any) -> int:
    """Return the number of channels of a head's logits; 0 without a head."""
    layers = [part for part in head.modules() if isinstance(part, nn.Conv2d)] if isinstance(head, nn.Module) else []
    return layers[-1].out_channels if layers else 0


def rebuild(spec: NetworkSpec) -> nn.Module:
    """Build the network of a spec that `recognize` returned, with random weights."""
    model = build_network(str(spec.name), spec.num_classes, aux_head=spec.aux_head)
    aux_classes = (spec.config or {}).get("aux_classes")
    if aux_classes is not None and isinstance(model, (DeepLabV3, FCN)) and model.aux_classifier is not None:
        last = model.aux_classifier[-1]
        model.aux_classifier[-1] = nn.Conv2d(last.in_channels, int(aux_classes), 1)
    return model
