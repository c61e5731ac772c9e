"""What passes from a network to a distillation method, whatever the network returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SegmentationOutput:
    """One forward pass of a segmentation network.

    Attributes:
        logits: (N, C, h, w), floating point, at the network's own stride.
        features: Intermediate feature maps (N, D, h', w') by module path; empty unless a method asked for them.
        aux_logits: (N, C, h', w') of an auxiliary head, or None.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    aux_logits: Tensor | None = None


def as_output(raw: object) -> SegmentationOutput:
    """Read what a network returned as a `SegmentationOutput`.

    Understood are a tensor, torchvision's ``{"out": ..., "aux": ...}``, an object with ``.logits`` (Hugging Face) and
    a tuple whose first element is one of these.

    Raises:
        TypeError: For anything else, or for logits that are not (N, C, h, w).
    """
    if isinstance(raw, SegmentationOutput):
        return raw
    if isinstance(raw, (tuple, list)) and raw:
        return as_output(raw[0])
    aux_logits = None
    if isinstance(raw, Mapping) and "out" in raw:
        logits, aux_logits = raw["out"], raw.get("aux")
    elif isinstance(raw, Tensor):
        logits = raw
    else:
        logits = getattr(raw, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "Expected the network to return a tensor, a dict with 'out' or an object with `.logits`, "
            f"but got {type(raw).__name__}. Wrap the network in a module that returns its logits (N, C, h, w)."
        )
    if logits.ndim != 4:
        raise TypeError(f"Expected logits of shape (N, C, h, w), but the network returned {tuple(logits.shape)}.")
    return SegmentationOutput(logits, aux_logits=aux_logits)
