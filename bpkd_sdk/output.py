"""`SegmentationOutput`, the output of a network for losses and distillation methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SegmentationOutput:
    """Output of one forward pass of a segmentation network.

    Attributes:
        logits: Logits (N, C, h, w), floating point, at the stride of the network.
        features: Feature maps (N, D, h', w') by module path; empty if the method does not need them.
        aux_logits: Logits (N, C, h', w') of the auxiliary head, or None.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    aux_logits: Tensor | None = None


def as_output(raw: object) -> SegmentationOutput:
    """Convert the return value of a network to a `SegmentationOutput`.

    Args:
        raw: A `SegmentationOutput`, a tensor of logits, torchvision's ``{"out": ..., "aux": ...}``, an object with
            ``.logits`` (Hugging Face), or a tuple or list whose first element is one of these.

    Raises:
        TypeError: If `raw` is none of these, or if the logits are not (N, C, h, w).

    Example:
        >>> import torch
        >>> as_output({"out": torch.zeros(1, 2, 4, 4)}).logits.shape
        torch.Size([1, 2, 4, 4])
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
