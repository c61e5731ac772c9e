"""`SegmentationOutput`, the output of a network, and the check that it ends with logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bpkd_sdk.classes import two_class_logits

# Names of torch's autograd nodes, without "Backward", of the operations that may follow the last activation.
_SHAPE_OPERATIONS = {
    "Alias",
    "Clone",
    "ConstantPadNd",
    "Permute",
    "ReshapeAlias",
    "Slice",
    "Squeeze",
    "ToCopy",
    "Transpose",
    "UnsafeView",
    "Unsqueeze",
    "UpsampleBicubic2D",
    "UpsampleBilinear2D",
    "UpsampleNearest2D",
    "View",
}


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

    Examples:
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
    if hasattr(raw, "masks_queries_logits"):
        raise TypeError(
            f"The network returned {type(raw).__name__}, classes of masks instead of logits per pixel. Put it into a "
            "bpkd_sdk.models.mask_classification.MaskClassificationNetwork."
        )
    if not isinstance(logits, Tensor):
        raise TypeError(
            "Expected the network to return a tensor, a dict with 'out' or an object with `.logits`, "
            f"but got {type(raw).__name__}. Wrap the network in a module that returns its logits (N, C, h, w)."
        )
    if logits.ndim != 4:
        raise TypeError(f"Expected logits of shape (N, C, h, w), but the network returned {tuple(logits.shape)}.")
    return SegmentationOutput(logits, aux_logits=aux_logits)


def comparable_outputs(
    student: SegmentationOutput, teacher: SegmentationOutput
) -> tuple[SegmentationOutput, SegmentationOutput]:
    """Return both outputs with two logits [0, z] if one of the networks has one logit; otherwise return them unchanged.

    Two logits become [0, z] too where the other network has one logit, so that all methods compare the same quantity.
    """
    counts = {student.logits.shape[1], teacher.logits.shape[1]}
    if counts not in ({1}, {1, 2}):
        return student, teacher
    student, teacher = (replace(output, logits=two_class_logits(output.logits)) for output in (student, teacher))
    return student, teacher


def final_activation(network: nn.Module, images: Tensor, logits: Tensor) -> Literal["sigmoid", "softmax"] | None:
    """Return the activation that a network ends with, found in the graph of torch's autograd.

    Resizing, cropping and casting after the activation are allowed. The result is None if there is no such activation,
    if the network cannot run with gradients, or if its outputs do not lie in 0..1.

    Args:
        network: Network in eval mode; its gradients are not changed.
        images: Normalised images (N, channels, H, W) that it accepts.
        logits: Its logits (N, C, h, w) for these images.
    """
    if logits.min() < 0 or logits.max() > 1:
        return None
    # The clone is no leaf, so that the network may change it in place. No tensors are saved for a backward pass.
    images = images.detach().requires_grad_().clone()
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: images):
            node = as_output(network(images)).logits.grad_fn
    except RuntimeError:
        return None
    while node is not None:
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if name in ("Sigmoid", "Softmax"):
            return "sigmoid" if name == "Sigmoid" else "softmax"
        if name not in _SHAPE_OPERATIONS:
            return None
        node = node.next_functions[0][0]
    return None


def check_final_activation(
    name: str, network: nn.Module, images: Tensor, logits: Tensor, *, allow_softmax: bool = False
) -> None:
    """Raise ValueError for a network that ends with a sigmoid or a softmax.

    Args:
        name: Name of the network at the start of the error message.
        network: Network in eval mode.
        images: Normalised images (N, channels, H, W) that it accepts.
        logits: Its logits (N, C, h, w) for these images.
        allow_softmax: Whether a softmax over several classes is accepted, because only masks are used: the largest
            probability is that of the largest logit.
    """
    activation = final_activation(network, images, logits)
    if activation is None or (activation == "softmax" and allow_softmax and logits.shape[1] > 1):
        return
    reason = "Losses, masks and confidences are computed from logits."
    if activation == "sigmoid" and logits.shape[1] > 1:
        reason = (
            f"{logits.shape[1]} independent sigmoids (several classes per pixel) are not supported: each pixel has one "
            "class, that of the largest logit."
        )
    inverse = "x.logit(eps=1e-6)" if activation == "sigmoid" else "x.clamp(min=1e-6).log()"
    raise ValueError(
        f"{name} ends with a {activation}, so it returns probabilities. {reason} Remove the {activation} "
        f"(segmentation-models-pytorch: activation=None), or pass a module that returns {inverse} of its output x."
    )
