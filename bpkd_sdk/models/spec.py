"""The spec and the provenance of a network: attributes of a module, or derived from those of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bpkd_sdk.spec import NetworkSpec


def get_spec(model: nn.Module) -> NetworkSpec:
    """Return the spec that a model carries as `model.spec`, or one derived from the attributes of other libraries.

    A derived spec has ImageNet's normalisation; for a network of segmentation-models-pytorch that of its encoder's
    pretrained weights, and with other than three channels none; for a network of Hugging Face transformers that of its
    image processor. Its class names are those of a Hugging Face ``config.id2label``; without one they are unknown and
    `num_classes` is 0. To state the normalisation and the classes of a network of your own, call
    ``set_spec(model, NetworkSpec(...))``.
    """
    spec = getattr(model, "spec", None)
    if isinstance(spec, NetworkSpec):
        return spec
    if is_of_library(model, "transformers") and hasattr(model, "config"):
        from bpkd_sdk.models import transformers

        return transformers.derive_spec(model)
    if is_of_library(model, "segmentation_models_pytorch") and hasattr(model, "encoder"):
        from bpkd_sdk.models import smp

        return smp.derive_spec(model)
    names = class_names_of_config(model)
    return NetworkSpec(None, num_classes=len(names), class_names=names)


def is_of_library(model: nn.Module, library: str) -> bool:
    """Return whether a module's class, or a class that it is derived from, is of a library, without importing it."""
    return any(base.__module__.partition(".")[0] == library for base in type(model).__mro__)


def set_spec(model: nn.Module, spec: NetworkSpec) -> None:
    """Set `model.spec`, which `get_spec`, `save_model` and the exporters read."""
    model.spec = spec  # type: ignore[assignment]  # torch declares attributes of modules as tensors or modules


def get_provenance(model: nn.Module) -> dict[str, Any]:
    """Return `model.provenance`: plain JSON values about the origin of a network's weights; empty if unknown.

    It contains the settings of the training run that the weights are from. In a network that has not been trained here,
    ``"backbone_weights"`` is the origin of the pretrained encoder.
    """
    provenance = getattr(model, "provenance", None)
    return dict(provenance) if isinstance(provenance, Mapping) else {}


def set_provenance(model: nn.Module, provenance: Mapping[str, Any]) -> None:
    """Set `model.provenance`, which `get_provenance` returns and the exporters write to their files."""
    model.provenance = dict(provenance)  # type: ignore[assignment]  # torch declares attributes as tensors or modules


def class_names_of_config(model: nn.Module) -> tuple[str, ...]:
    """Return the class names of a Hugging Face configuration, in the order of the logits; empty without one."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, Mapping) or set(labels) != set(range(len(labels))):
        return ()
    return tuple(str(labels[index]) for index in range(len(labels)))
