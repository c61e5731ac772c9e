"""Networks of other libraries: the module that builds those of a name, and specs that build an instance again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from bpkd_sdk.errors import did_you_mean
from bpkd_sdk.features import eval_mode, unwrap
from bpkd_sdk.models import zoo
from bpkd_sdk.models.mask_classification import PREFIX, adapt_network
from bpkd_sdk.models.spec import get_spec
from bpkd_sdk.output import as_output
from bpkd_sdk.spec import NetworkSpec

_PROBE_SIDES = (64, 224, 384, 512)  # pixels; the first that the network accepts is used
_unknown = WeakSet[nn.Module]()  # instances that cannot be built again, so that no checkpoint of a run tries once more


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
    raise ValueError(f"Unknown network {name!r}.{did_you_mean(name, list_models())} See bpkd_sdk.list_models().")


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
    family = find_family(spec.name)
    network: nn.Module
    # The name of a network of transformers is a place, and reading a checkpoint must not read other files.
    if spec.config is not None or spec.name.startswith(PREFIX):
        network = family.rebuild(spec)
    else:
        network = family.build_network(
            spec.name, spec.num_classes, aux_head=spec.aux_head, in_channels=spec.in_channels
        )
    return network


def identify(model: nn.Module) -> NetworkSpec:
    """Return the spec of a model; for an instance of a known library, with the fields that build it again.

    A network that was given as an instance is built again from its class and its configuration. The spec names it only
    if the new instance has the same layers, the same parameters and the same output; otherwise the spec is that of
    `get_spec`, and the network can be loaded into an instance only.
    """
    network, spec = adapt_network(unwrap(model)), get_spec(model)
    if spec.name is not None or network in _unknown:
        return spec
    try:
        fields = _recognize(network)
        if fields is not None:
            named = replace(spec, **fields)
            with torch.random.fork_rng(devices=[]):
                rebuilt = build_from_spec(named)
            if rebuilt is not None and _are_equal(network, rebuilt, named):
                return named
    except Exception:  # noqa: S110  (the constructors of other libraries raise anything; the instance is then unknown)
        pass
    _unknown.add(network)
    return spec


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
