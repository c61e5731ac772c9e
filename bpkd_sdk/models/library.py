"""Networks of other libraries: the module that builds those of a name, and specs that build an instance again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bpkd_sdk.errors import did_you_mean
from bpkd_sdk.features import eval_mode, unwrap
from bpkd_sdk.models import zoo
from bpkd_sdk.models.mask_classification import PREFIX, MaskClassificationNetwork, adapt_network
from bpkd_sdk.models.spec import get_spec, is_of_library
from bpkd_sdk.models.weights import NONE
from bpkd_sdk.output import as_output
from bpkd_sdk.spec import NetworkSpec

_PROBE_SIDES = (64, 224, 384, 512)  # pixels; the first that the network accepts is used
_PLAIN = (bool, int, float, str, tuple, type(None))
# The fields that build an instance again, or None, with the description of the instance that they were found for.
_identified = WeakKeyDictionary[nn.Module, tuple[str, dict[str, Any] | None]]()


def find_family(name: str) -> Any:
    """Return the module of this package that builds the networks of a name's library.

    Raises:
        ValueError: If the name is unknown; the error states the nearest.
    """
    if name in zoo.ZOO:
        return zoo
    if name.startswith("smp/"):
        from bpkd_sdk.models import smp

        return smp
    if name.startswith("torchvision/"):
        from bpkd_sdk.models import torchvision

        return torchvision
    if name.startswith("transformers/"):
        from bpkd_sdk.models import transformers

        return transformers
    folder = f" The folder {name} contains no network." if Path(name).is_dir() else ""
    raise ValueError(
        f"Unknown network {name!r}.{folder}{did_you_mean(name, list_models())} See bpkd_sdk.list_models()."
    )


def build_network(
    name: str, num_classes: int, *, aux_head: bool = False, backbone_weights: str = NONE, in_channels: int = 3
) -> nn.Module:
    """Build a network by its name, in training mode; the arguments are those of `create_model`.

    Raises:
        ValueError: If the name is unknown, or an argument does not fit the networks of its library.
        RuntimeError: If pretrained weights cannot be downloaded.
    """
    family = find_family(name)
    options: dict[str, Any] = {"backbone_weights": backbone_weights}
    if family.HAS_AUX_HEADS:
        options["aux_head"] = aux_head
    elif aux_head:
        raise ValueError(f"{name!r} has no auxiliary segmentation head; build it with aux_head=False.")
    if family.TAKES_OTHER_CHANNELS:
        options["in_channels"] = in_channels
    elif in_channels != 3:
        raise ValueError(
            f"{name!r} takes images of 3 channels, but got in_channels={in_channels}. Use a network of "
            "segmentation-models-pytorch, such as 'smp/DeepLabV3/resnet50'."
        )
    model: nn.Module = family.build_network(name, num_classes, **options)
    return model


def list_models() -> list[str]:
    """Return the names that `create_model` accepts.

    It also accepts ``smp/<Architecture>/tu-<timm model>`` and ``transformers/<folder or hub id>``.
    """
    from bpkd_sdk.models import smp, torchvision

    return [*zoo.ZOO, *smp.list_models(), *torchvision.list_models()]


def build_from_spec(spec: NetworkSpec) -> nn.Module | None:
    """Build the network of a spec with random weights, in training mode; None if the spec does not name one.

    Raises:
        ImportError: If the network's library is not installed.
        ValueError: If the name or the configuration is not one of this package.
    """
    if spec.name is None:
        return None
    # The name of a network of transformers is a place, and reading a checkpoint must not read other files.
    if spec.config is not None or spec.name.startswith(PREFIX):
        network: nn.Module = find_family(spec.name).rebuild(spec)
        return network
    return build_network(spec.name, spec.num_classes, aux_head=spec.aux_head, in_channels=spec.in_channels)


def identify(model: nn.Module) -> NetworkSpec:
    """Return the spec of a model; for an instance of a known library, with the fields that build it again.

    A network that was given as an instance is built again from its class and its configuration. The spec names it only
    if the new instance has the same layers, the same parameters and the same output; otherwise the spec is that of
    `get_spec`, and the network can be loaded into an instance only. An instance whose layers and configuration have not
    changed is not built a second time.
    """
    instance, spec = unwrap(model), get_spec(model)
    if spec.name is not None:
        return spec
    network = adapt_network(instance)
    try:
        fields = _recognize(network)
    except Exception:  # a changed instance of another library may lack anything
        fields = None
    if fields is None:
        return spec
    description = _describe(network, fields)
    if instance not in _identified or _identified[instance][0] != description:
        _identified[instance] = description, fields if _builds_again(network, replace(spec, **fields)) else None
    return replace(spec, **(_identified[instance][1] or {}))


def _describe(network: nn.Module, fields: dict[str, Any]) -> str:
    """Return a text that changes with the configuration, the layers, their settings, and their numbers of hooks."""
    settings = [
        sorted(
            (key, value if isinstance(value, _PLAIN) else len(value))
            for key, value in vars(module).items()
            if isinstance(value, (*_PLAIN, Mapping)) and key != "training"
        )
        for module in network.modules()
    ]
    return f"{fields} {network!r} {settings} {[value.shape for value in network.state_dict().values()]}"


def _builds_again(network: nn.Module, spec: NetworkSpec) -> bool:
    """Return whether a spec builds a network that is equal to an instance."""
    try:
        with torch.random.fork_rng(devices=[]):
            rebuilt = build_from_spec(spec)
        return rebuilt is not None and _are_equal(network, rebuilt, spec)
    except Exception:  # the constructors of other libraries raise anything
        return False


def _recognize(network: nn.Module) -> dict[str, Any] | None:
    """Return the fields of `NetworkSpec` that build an instance of a known library again, as plain JSON values."""
    family: Any
    if type(network).__module__.startswith("segmentation_models_pytorch."):
        from bpkd_sdk.models import smp as family
    elif type(network).__module__.startswith("torchvision."):
        from bpkd_sdk.models import torchvision as family
    elif type(network).__module__.startswith(("transformers.", "bpkd_sdk.models.mask_classification")):
        from bpkd_sdk.models import transformers as family
    else:
        return None
    fields = family.recognize(network)
    return fields if fields is None else json.loads(json.dumps(fields))


def _are_equal(network: nn.Module, rebuilt: nn.Module, spec: NetworkSpec) -> bool:
    """Return whether two networks have the same layers and parameters, and with the first's weights the same output."""
    state, other = network.state_dict(), rebuilt.state_dict()
    if type(network) is not type(rebuilt) or repr(network) != repr(rebuilt):
        return False
    if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in other.items()}:
        return False
    rebuilt.load_state_dict(state)
    parameter = next(network.parameters())
    rebuilt.to(parameter.device, parameter.dtype)
    for side in sorted({math.lcm(64, spec.size_divisor), *_PROBE_SIDES, spec.size_divisor}):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, spec.in_channels, side, side, generator=generator).to(parameter)
        try:
            expected = _logits(network, images)
        except Exception:  # noqa: S112  (a network may raise anything for a size that it does not accept)
            continue
        tolerance = 1e-5 * float(expected.abs().max())
        return torch.allclose(_logits(rebuilt, images), expected, rtol=1e-5, atol=tolerance)
    return False


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    with eval_mode(network), torch.no_grad():
        return as_output(network(images)).logits


def size_limit(model: nn.Module) -> str | None:
    """Return why a network cannot be traced for images of any size; None if no reason is known."""
    if isinstance(model, MaskClassificationNetwork):
        return "a trace of its windows, position embeddings and sampling points is for one size"
    if is_of_library(model, "transformers") and hasattr(model, "config"):
        from bpkd_sdk.models import transformers

        if side := transformers.fixed_side(model.config):
            return f"its position embeddings or its decoder are for square images of {side} x {side} pixels"
    return None
