"""Networks: by name, from segmentation-models-pytorch, from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bpkd_sdk.errors import did_you_mean
from bpkd_sdk.models.checkpoint import SUFFIX, load_model, load_state, read_tensors, save_model
from bpkd_sdk.models.spec import NetworkSpec, get_spec

__all__ = ["NetworkSpec", "create_model", "get_spec", "list_models", "load_model", "save_model"]


def list_models() -> list[str]:
    """Every name `create_model` takes as it stands; ``smp/<Architecture>/tu-<timm model>`` works besides."""
    import segmentation_models_pytorch

    from bpkd_sdk.models import smp

    encoders = segmentation_models_pytorch.encoders.encoders
    return [f"smp/{architecture}/{encoder}" for architecture in smp.ARCHITECTURES for encoder in encoders]


def create_model(
    name: str,
    num_classes: int,
    *,
    weights: str | Path | None = None,
    aux_head: bool = False,
    backbone_weights: str | None = None,
) -> nn.Module:
    """Build a segmentation network.

    Its ``forward(image (N, 3, H, W) float, normalised)`` returns logits (N, C, h, w) at the network's own stride.

    Args:
        name: One of `list_models`, for example ``smp/DeepLabV3Plus/mobilenet_v2``.
        num_classes: Channels of the logits, at least 1.
        weights: A checkpoint of ours for the whole network, or None.
        aux_head: Add the auxiliary training head.
        backbone_weights: None for random weights, or "imagenet" (downloaded by the library that owns them).

    Raises:
        ValueError: For an unknown name (the nearest is named), a bad class count, or weights that do not fit.
    """
    if num_classes < 1:
        raise ValueError(f"Expected `num_classes` to be at least 1, but got {num_classes}.")
    if not name.startswith("smp/"):
        raise ValueError(f"Unknown network {name!r}.{did_you_mean(name, list_models())} See bpkd_sdk.list_models().")
    from bpkd_sdk.models import smp

    model = smp.build(name, num_classes, aux_head=aux_head, backbone_weights=backbone_weights)
    if weights is not None:
        if Path(weights).suffix != SUFFIX:
            raise ValueError(f"Expected `weights` to be a checkpoint ending in {SUFFIX!r}, but got {str(weights)!r}.")
        load_state(model, read_tensors(weights)[1], source=str(weights))
    return model
