"""Origin of the weights that student and teacher start with, for the first line of a run and for its records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bpkd_sdk.features import unwrap
from bpkd_sdk.models import check_name, get_spec
from bpkd_sdk.models.mask_classification import MaskClassificationNetwork
from bpkd_sdk.models.spec import get_provenance, is_of_library
from bpkd_sdk.models.weights import check_backbone_weights, is_file
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.training.teacher import NetworkSource, TeacherModel, is_name

# Facts of a network's provenance that are recorded in a run; the configuration and the scores of its training are not.
_BACKBONE = "backbone_weights"
_FACTS = ("title", "data", "step", _BACKBONE, "weights", "origin")


def check_names(sources: Mapping[str, NetworkSource | Runtime | None], backbone_weights: str) -> None:
    """Check the names of networks and the weights of their encoders, before data are read or anything is downloaded.

    Args:
        sources: Student and teacher, as they were passed, by role.
        backbone_weights: Value of `TrainingConfig.backbone_weights`.

    Raises:
        ValueError: If a name is unknown, the weights do not exist, or there is no encoder to load a file into.
    """
    backbone_weights = check_backbone_weights(backbone_weights)
    names = [str(source) for source in sources.values() if is_name(source)]
    for name in names:
        check_name(name, backbone_weights)
    if is_file(backbone_weights) and not names and not any(_has_file(s, backbone_weights) for s in sources.values()):
        given = ", ".join(f"{role} {_format_source(source)}" for role, source in sources.items())
        raise ValueError(
            f"backbone_weights={backbone_weights!r} is loaded only into a network that is given by its name, but got "
            f"{given}. Leave it out, or pass a name such as 'smp/FPN/mobilenet_v2'."
        )


def _has_file(source: NetworkSource | Runtime | None, path: str) -> bool:
    """Return whether a module was built with this file, as the students of a comparison are."""
    origin = get_provenance(unwrap(source)).get(_BACKBONE) if isinstance(source, nn.Module) else None
    return isinstance(origin, Mapping) and origin.get("file") == path


def _format_source(source: object) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else type(source).__name__


def describe_origin(source: NetworkSource | Runtime, network: TeacherModel) -> dict[str, Any]:
    """Return the origin of a network's weights as plain JSON values.

    Args:
        source: Network, as it was passed.
        network: Network that was opened.
    """
    if isinstance(network, Runtime):
        return {"network": network.spec.name, "file": network.name}
    module = unwrap(network)
    facts: dict[str, Any] = {"network": get_spec(network).name or type(module).__name__}
    if is_name(source):
        facts["built"] = "by name"
    elif isinstance(source, (str, Path)):
        facts["file"] = str(source)
    facts |= {key: value for key, value in get_provenance(module).items() if key in _FACTS}
    if not facts.keys() & {"file", *_FACTS} and (loaded := _library_origin(module)):
        facts["loaded"] = loaded
    return facts


def _library_origin(module: nn.Module) -> dict[str, Any]:
    """Return the folder or repository that an instance of transformers was loaded from; empty for other modules."""
    network = module.network if isinstance(module, MaskClassificationNetwork) else module
    if not is_of_library(network, "transformers"):
        return {}
    from bpkd_sdk.models import transformers

    return transformers.instance_origin(network)


def format_origin(facts: Mapping[str, Any]) -> str:
    """Format the result of `describe_origin` as a part of a sentence."""
    if "file" in facts:
        return f"{facts['network'] or 'network'} from {facts['file']}"
    if "weights" in facts:
        return f"{facts['network']} with the weights {_format_weights(facts['weights'])}"
    if "title" in facts:
        return f"{facts['network']} with the weights of the run {facts['title']!r}, step {facts.get('step')}"
    encoder = f"a pretrained encoder ({_format_weights(facts[_BACKBONE])})" if _BACKBONE in facts else ""
    if "built" in facts:
        return f"{facts['network']} with {f'{encoder} and a random decoder' if encoder else 'random weights'}"
    if "loaded" in facts:
        return f"{facts['network']} as given, loaded from {_format_weights(facts['loaded'])}"
    return f"{facts['network']} as given{f', built with {encoder}' if encoder else ''}"


def _format_weights(origin: Mapping[str, Any]) -> str:
    parts = [origin.get("source") or origin.get("file") or "of unknown origin"]
    parts += [f"{key} {origin[key]}" for key in ("revision", "license") if origin.get(key)]
    return ", ".join(map(str, parts))
