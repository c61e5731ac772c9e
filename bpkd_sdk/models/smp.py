"""Networks of segmentation-models-pytorch, by names of the form ``smp/<Architecture>/<encoder>``."""

from __future__ import annotations

import inspect
from typing import Any

import segmentation_models_pytorch as smp
from torch import nn

from bpkd_sdk.errors import check_choice, did_you_mean
from bpkd_sdk.models.spec import IMAGENET_MEAN, IMAGENET_STD, NetworkSpec, set_spec, smp_size_divisor

ARCHITECTURES: dict[str, type[nn.Module]] = {
    architecture.__name__: architecture for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values()
}


def list_models() -> list[str]:
    """Return ``smp/<Architecture>/<encoder>`` for all architectures and encoders that the library lists."""
    return [f"smp/{architecture}/{encoder}" for architecture in ARCHITECTURES for encoder in smp.encoders.encoders]


def build_network(
    name: str, num_classes: int, *, aux_head: bool, backbone_weights: str | None, in_channels: int = 3
) -> nn.Module:
    """Build a network of the library with logits at the decoder's stride, in training mode.

    The last upsampling of the library is left out where it is an option: losses and metrics resize the logits
    themselves, and distilling at the decoder's stride needs a sixteenth of the work at full size.

    Args:
        name: For example ``smp/DeepLabV3Plus/mobilenet_v2``. The encoder is one of the library, or ``tu-<timm model>``.
        num_classes: C, the number of channels of the logits.
        aux_head: Must be False, because the library has no auxiliary segmentation heads.
        backbone_weights: None, or a name of the library's pretrained weights such as "imagenet" (downloaded).
        in_channels: Number of channels of the images; the library adapts pretrained weights to it.

    Raises:
        ValueError: If the architecture or the encoder is unknown, or if `aux_head` is True.
        RuntimeError: If the pretrained weights do not exist or cannot be downloaded.
    """
    parts = name.split("/", 2)
    if len(parts) != 3:
        raise ValueError(f"Expected a name like 'smp/DeepLabV3Plus/mobilenet_v2', but got {name!r}.")
    _, architecture, encoder = parts
    check_choice("architecture", architecture, ARCHITECTURES)
    if encoder not in smp.encoders.encoders and not encoder.startswith("tu-"):
        raise ValueError(
            f"segmentation-models-pytorch has no encoder {encoder!r}.{did_you_mean(encoder, smp.encoders.encoders)} "
            "Every timm model is available as 'tu-<name>'."
        )
    if aux_head:
        raise ValueError(f"{name!r} has no auxiliary segmentation head; build it with aux_head=False.")
    cls = ARCHITECTURES[architecture]
    options: dict[str, Any] = {"upsampling": 1} if "upsampling" in inspect.signature(cls).parameters else {}
    try:
        model = cls(
            encoder_name=encoder,
            encoder_weights=backbone_weights,
            in_channels=in_channels,
            classes=num_classes,
            **options,
        )
        mean, std = normalization(encoder, backbone_weights)
    # The hub's client raises the errors of its HTTP library, which have no common base class.
    except Exception as error:
        if backbone_weights is None:
            raise
        raise RuntimeError(
            f"The {backbone_weights!r} weights of encoder {encoder!r} could not be downloaded: {error} "
            "Connect to the internet once (they are cached afterwards), or use backbone_weights=None."
        ) from error
    spec = NetworkSpec(name=name, num_classes=num_classes, mean=mean, std=std, size_divisor=smp_size_divisor(model))
    set_spec(model, spec.with_channels(in_channels))
    return model


def normalization(encoder: str, weights: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation (for images in 0..1) that the pretrained weights expect.

    Args:
        encoder: Name of the encoder in the library.
        weights: Name of the pretrained weights; None for random weights, for which ImageNet's values are returned.
    """
    if weights is None:
        return IMAGENET_MEAN, IMAGENET_STD
    facts = smp.encoders.get_preprocessing_params(encoder, pretrained=weights)
    scale = facts.get("input_range", [0, 1])[1]
    return tuple(value / scale for value in facts["mean"]), tuple(value / scale for value in facts["std"])
