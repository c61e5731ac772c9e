"""Networks of segmentation-models-pytorch, by names of the form ``smp/<Architecture>/<encoder>``."""

from __future__ import annotations

import functools
import inspect
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import timm
from huggingface_hub import try_to_load_from_cache
from torch import nn

from bpkd_sdk.errors import check_choice, did_you_mean
from bpkd_sdk.models import weights
from bpkd_sdk.models.imagenet import timm_origin
from bpkd_sdk.models.spec import set_provenance, set_spec
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.spec import IMAGENET_MEAN, IMAGENET_STD, NetworkSpec

HAS_AUX_HEADS, TAKES_OTHER_CHANNELS = False, True
_TIMM = "tu-"  # prefix of the library's names for encoders of timm

ARCHITECTURES: dict[str, type[nn.Module]] = {
    architecture.__name__: architecture for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values()
}


def list_models() -> list[str]:
    """Return ``smp/<Architecture>/<encoder>`` for all architectures and encoders that the library lists."""
    return [f"smp/{architecture}/{encoder}" for architecture in ARCHITECTURES for encoder in smp.encoders.encoders]


def check_weights(name: str, backbone_weights: str) -> None:
    """Raise ValueError for an unknown network, or for an encoder that cannot start from these weights.

    Args:
        name: ``smp/<Architecture>/<encoder>``.
        backbone_weights: "none", a name of the library's pretrained weights, or the path of a file.
    """
    _, encoder = _parse(name)
    if backbone_weights == weights.NONE or weights.is_file(backbone_weights):
        return
    timm_name = encoder.removeprefix(_TIMM)
    if timm_name == encoder:
        available = list(smp.encoders.encoders[encoder]["pretrained_settings"])
    else:
        available = [weights.IMAGENET] if timm.models.is_model_pretrained(timm_name) else []
    if backbone_weights not in available:
        raise ValueError(
            f"The encoder {encoder!r} of {name!r} has no pretrained weights {backbone_weights!r}. It has: "
            f"{', '.join(map(repr, available)) or 'none'}. Pass one of them as backbone_weights, "
            f"{weights.NONE!r} for random weights, or the path of a file with the encoder's weights."
        )


def _parse(name: str) -> tuple[str, str]:
    """Return architecture and encoder of a name; raise ValueError if the library does not have them."""
    parts = name.split("/", 2)
    if len(parts) != 3:
        raise ValueError(f"Expected a name like 'smp/DeepLabV3Plus/mobilenet_v2', but got {name!r}.")
    _, architecture, encoder = parts
    check_choice("architecture", architecture, ARCHITECTURES)
    if encoder not in smp.encoders.encoders and not encoder.startswith(_TIMM):
        raise ValueError(
            f"segmentation-models-pytorch has no encoder {encoder!r}.{did_you_mean(encoder, smp.encoders.encoders)} "
            f"Every timm model is available as '{_TIMM}<name>'."
        )
    if encoder.startswith(_TIMM) and not timm.is_model(encoder.removeprefix(_TIMM)):
        timm_name = encoder.removeprefix(_TIMM)
        raise ValueError(f"timm has no model {timm_name!r}.{did_you_mean(timm_name, timm.list_models())}")
    return architecture, encoder


def build_network(
    name: str,
    num_classes: int,
    *,
    backbone_weights: str = weights.NONE,
    in_channels: int = 3,
) -> nn.Module:
    """Build a network of the library with logits at the decoder's stride, in training mode.

    The last upsampling of the library is left out where it is an option: losses and metrics resize the logits
    themselves, and distilling at the decoder's stride needs a sixteenth of the work at full size.

    Args:
        name: For example ``smp/DeepLabV3Plus/mobilenet_v2``. The encoder is one of the library, or ``tu-<timm model>``.
        num_classes: C, the number of channels of the logits.
        backbone_weights: "none" for random weights, a name of the library's pretrained weights such as "imagenet"
            (downloaded), or the path of a file with the weights of the encoder.
        in_channels: Number of channels of the images; pretrained weights are adapted to it.

    Raises:
        ValueError: If the architecture or the encoder is unknown, or if the pretrained weights do not exist or do not
            fit.
        RuntimeError: If the pretrained weights cannot be downloaded.
    """
    check_weights(name, backbone_weights)
    architecture, encoder = _parse(name)
    cls = ARCHITECTURES[architecture]
    options: dict[str, Any] = {"upsampling": 1} if "upsampling" in inspect.signature(cls).parameters else {}
    build: Any = partial(cls, encoder_name=encoder, in_channels=in_channels, classes=num_classes, **options)
    mean, std = normalization(encoder, weights.NONE)
    origin: dict[str, Any] | None = None
    model: nn.Module
    if backbone_weights == weights.NONE:
        model = build(encoder_weights=None)
    elif weights.is_file(backbone_weights):
        model = build(encoder_weights=None)
        origin = weights.load_encoder_file(model.get_submodule("encoder"), backbone_weights)
        if encoder.startswith(_TIMM):  # timm contains the normalisation; the library would have to download it
            mean, std = normalization(encoder, weights.IMAGENET)
    else:
        with weights.explained_download(backbone_weights, name):
            # The library expects True for an encoder of timm, whose name states the weights.
            model = build(encoder_weights=True if encoder.startswith(_TIMM) else backbone_weights)
            mean, std = normalization(encoder, backbone_weights)
        origin = _origin(encoder, backbone_weights)
    spec = NetworkSpec(name=name, num_classes=num_classes, mean=mean, std=std, size_divisor=_size_divisor(model))
    set_spec(model, spec.for_images(PixelFormat(in_channels)))
    if origin is not None:
        set_provenance(model, {"backbone_weights": origin})
    return model


def normalization(encoder: str, backbone_weights: str) -> tuple[Any, Any]:
    """Return the mean and standard deviation (for images in 0..1) that the weights of an encoder expect.

    Args:
        encoder: Name of the encoder in the library.
        backbone_weights: Name of its pretrained weights, whose configuration is downloaded unless they are timm's; or
            "none", for which ImageNet's values are returned.
    """
    is_unknown = encoder.startswith(_TIMM) and not timm.models.is_model_pretrained(encoder.removeprefix(_TIMM))
    if is_unknown or backbone_weights == weights.NONE:
        return IMAGENET_MEAN, IMAGENET_STD
    facts = smp.encoders.get_preprocessing_params(encoder, pretrained=backbone_weights)
    scale = facts["input_range"][1]
    return tuple(value / scale for value in facts["mean"]), tuple(value / scale for value in facts["std"])


@functools.cache
def _local_normalization(encoder: str, backbone_weights: str) -> tuple[Any, Any]:
    """Return `normalization` without a download; ImageNet's values if the configuration is not in the hub's cache."""
    if encoder.startswith(_TIMM):
        return normalization(encoder, weights.IMAGENET)
    settings = smp.encoders.encoders[encoder]["pretrained_settings"].get(backbone_weights, {})
    if not settings or not isinstance(try_to_load_from_cache(filename="config.json", **settings), str):
        return IMAGENET_MEAN, IMAGENET_STD
    return normalization(encoder, backbone_weights)


def derive_spec(model: Any) -> NetworkSpec:
    """Return the spec of a module of the library that was given as an instance.

    Its normalisation is that of the pretrained weights that its encoder was built with, also if all weights have been
    replaced since: the library's `get_preprocessing_fn` returns it for this encoder. The class names are not known.
    """
    config = getattr(model, "config", None) or {}
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if config.get("encoder_weights") is not None:
        mean, std = _local_normalization(config["encoder_name"], str(config["encoder_weights"]))
    spec = NetworkSpec(None, num_classes=0, mean=mean, std=std, size_divisor=_size_divisor(model))
    return spec.for_images(PixelFormat(int(getattr(model.encoder, "_in_channels", 3))))


def _size_divisor(model: Any) -> int:
    """Return the number that both sides of an image must be multiples of."""
    return int(model.encoder.output_stride) if model.requires_divisible_input_shape else 1


def _origin(encoder: str, pretrained: str) -> dict[str, Any]:
    if encoder.startswith(_TIMM):
        return timm_origin(encoder.removeprefix(_TIMM))
    settings = smp.encoders.encoders[encoder]["pretrained_settings"][pretrained]
    return {"source": settings["repo_id"], "revision": settings["revision"]}


def recognize(model: nn.Module) -> dict[str, Any] | None:
    """Return the fields of `NetworkSpec` that build a module again; None if it is not a network of the library.

    The library keeps the arguments of the constructor in `model.config`, as far as they are plain values.
    """
    if ARCHITECTURES.get(type(model).__name__) is not type(model):
        return None
    config = {**(getattr(model, "config", None) or {})}
    encoder, classes = config.pop("encoder_name"), config["classes"]
    del config["encoder_weights"]  # the weights come from the checkpoint
    return {"name": f"smp/{type(model).__name__}/{encoder}", "num_classes": classes, "config": config}


def rebuild(spec: NetworkSpec) -> nn.Module:
    """Build the network of a spec that `recognize` returned, with random weights.

    Raises:
        ValueError: If the configuration names files, which the library would load, or has arguments that the installed
            version does not accept.
    """
    architecture, encoder = _parse(str(spec.name))
    config = spec.config or {}
    if unsafe := [key for key in config if key.startswith(("pretrained", "checkpoint", "cache"))]:
        raise ValueError(f"The configuration of {spec.name!r} contains {unsafe[0]!r}, which could load other files.")
    try:
        return ARCHITECTURES[architecture](**{**config, "encoder_name": encoder, "encoder_weights": None})
    except TypeError as error:
        raise ValueError(
            f"segmentation-models-pytorch {smp.__version__} cannot build {spec.name!r} from its configuration: "
            f"{error}. Install the version that wrote it, or pass an instance: load_model(path, model=...)."
        ) from error
