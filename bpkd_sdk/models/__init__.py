"""Networks: the zoo, segmentation-models-pytorch, and checkpoints; `create_model` and `load_model` build them."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path

import torch
from torch import nn

from bpkd_sdk.errors import no_network
from bpkd_sdk.files import CHECKPOINT_SUFFIX, OPENMMLAB_SUFFIXES, SHAPES_TEACHER, find_network, is_pretrained_name
from bpkd_sdk.hub import CHECKPOINT_FILE, find_file, is_model_folder, read_origin
from bpkd_sdk.models.checkpoint import load_checkpoint, load_state, read_tensors, save_model
from bpkd_sdk.models.library import build_network, find_family, identify, list_models
from bpkd_sdk.models.openmmlab import load_openmmlab
from bpkd_sdk.models.spec import get_provenance, get_spec, set_provenance, set_spec
from bpkd_sdk.models.weights import NONE, check_backbone_weights
from bpkd_sdk.models.zoo import ZOO
from bpkd_sdk.pixels import PixelFormat

__all__ = [
    "CHECKPOINT_SUFFIXES",
    "ZOO",
    "create_model",
    "get_spec",
    "identify",
    "list_models",
    "load_model",
    "save_model",
    "set_spec",
]

CHECKPOINT_SUFFIXES = (CHECKPOINT_SUFFIX, *OPENMMLAB_SUFFIXES)
_SHAPES_TEACHER_FILE = Path(__file__).parents[1] / "data/shapes_teacher.safetensors"


def create_model(
    name: str,
    num_classes: int,
    *,
    weights: str | Path | None = None,
    aux_head: bool = False,
    backbone_weights: str | Path = NONE,
    in_channels: int = 3,
) -> nn.Module:
    """Build a segmentation network, in training mode.

    The network maps normalised images (N, in_channels, H, W) to logits (N, C, h, w) at its own stride.

    Args:
        name: Name in `list_models`: a network of the paper such as ``pspnet_r18``, one of segmentation-models-pytorch
            such as ``smp/DeepLabV3Plus/mobilenet_v2`` (every encoder of timm as ``smp/Unet/tu-<timm model>``), one of
            torchvision such as ``torchvision/deeplabv3_resnet50``; or ``transformers/<folder or hub id>``.
        num_classes: C, the number of channels of the logits, at least 1.
        weights: Checkpoint with the weights of the whole network: a ``.safetensors`` file of this package, the folder
            of a run, or for a network of the paper an OpenMMLab ``.pth``. If the ``.pth`` is for a variant of `name`,
            that variant is built, and `model.spec.name` is its name.
        aux_head: Whether to add the auxiliary training head.
        backbone_weights: Weights of the encoder: "none" for random ones, "imagenet" (downloaded by the library of the
            network), or the path of a file with a state dict of the encoder (``.safetensors``, or a ``.pth`` of plain
            tensors).
        in_channels: Number of channels of the images, 1 to 16. For other than 3, `model.spec` has no mean and standard
            deviation until training measures them.

    Raises:
        ValueError: If the name is unknown (the error states the nearest), the number of classes is below 1, or the
            weights do not exist or do not fit.
        FileNotFoundError: If a file with weights does not exist.
        RuntimeError: If the weights of the encoder cannot be downloaded; the message names the cache to fill.
    """
    if not isinstance(name, str):
        raise TypeError(f"Expected `name` to be the name of a network, such as 'pspnet_r18', but got {name!r:.80}.")
    PixelFormat(in_channels)  # checks the number
    weights = find_network(weights)
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or num_classes < 1:
        raise ValueError(f"Expected `num_classes` to be a whole number of at least 1, but got {num_classes!r}.")
    suffix = "" if weights is None else Path(weights).suffix.lower()
    if weights is not None and suffix in OPENMMLAB_SUFFIXES and name in ZOO:
        if in_channels != 3:
            raise ValueError(f"{weights} is a network of 3 channels, but got in_channels={in_channels}.")
        return load_openmmlab(weights, name, num_classes, aux_head=aux_head).train()
    model = build_network(
        name,
        num_classes,
        aux_head=aux_head,
        backbone_weights=check_backbone_weights(backbone_weights),
        in_channels=in_channels,
    )
    if weights is not None:
        if suffix != CHECKPOINT_SUFFIX:
            raise ValueError(
                f"Expected `weights` of {name!r} to end in {CHECKPOINT_SUFFIX!r}, but got {str(weights)!r}."
            )
        load_state(model, read_tensors(weights)[1], source=str(weights))
    return model


def check_name(name: str, backbone_weights: str | Path) -> None:
    """Check that `create_model` accepts a name with these weights of the encoder, without building the network.

    Raises:
        ValueError: If the name is unknown, or the encoder has no such weights.
        FileNotFoundError: If the file with the weights does not exist.
    """
    find_family(name).check_weights(name, check_backbone_weights(backbone_weights))


def load_model(path: str | Path, device: str | torch.device = "cpu", *, model: nn.Module | None = None) -> nn.Module:
    """Load a network from a checkpoint, or from its library with all weights, in eval mode.

    `model.provenance` then contains the settings of the training run (plain JSON values); `to_onnx` writes them to the
    exported file.

    Args:
        path: Checkpoint of this package (``.safetensors``, written by `save_model`, `train` or `distill`); the folder
            of a run, of which the last checkpoint is loaded; a checkpoint of OpenMMLab (``.pth``) for a network of the
            paper; a folder of `bpkd_sdk.save_pretrained`, or its address ``hf://user/name[@<revision>]`` on the Hugging
            Face Hub, of which only the checkpoint is downloaded; or a name: ``torchvision/<network>[@<weights>]``,
            ``transformers/<folder or hub id>[@<revision>]``, or ``shapes-teacher``, a teacher for the data set "shapes"
            that this package contains.
        device: Device that the network is moved to.
        model: Instance to load a ``.safetensors`` file into, for a network class that `create_model` cannot build.

    Raises:
        TypeError: If the path is a network itself, or the result of a training run.
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a checkpoint, has been altered, or does not fit the network; or if the weights of
            a named network are incomplete.
        RuntimeError: If the weights of a named network cannot be downloaded.
    """
    path = find_network(path)
    if not isinstance(path, (str, Path)):
        raise no_network(path, "the path or the name of a network")
    if is_model_folder(path):
        return _load_model_folder(path, device, model)
    if is_pretrained_name(path):
        if model is not None:
            raise ValueError(f"{path} is built by load_model. Omit `model`.")
        if str(path) == SHAPES_TEACHER:
            return load_checkpoint(_SHAPES_TEACHER_FILE, device)
        named: nn.Module = find_family(str(path)).load_pretrained(str(path))
        return named.to(device)
    if Path(path).suffix.lower() in OPENMMLAB_SUFFIXES:
        if model is not None:
            raise ValueError(f"{path} is an OpenMMLab checkpoint, whose network is built by load_model. Omit `model`.")
        return load_openmmlab(path).to(device)
    return load_checkpoint(path, device, model=model)


def _load_model_folder(folder: str | Path, device: str | torch.device, model: nn.Module | None) -> nn.Module:
    """Load the checkpoint of a model folder, and add its origin to the network's provenance."""
    file = find_file(folder, CHECKPOINT_FILE)
    try:
        network = load_checkpoint(file, device, model=model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    set_provenance(network, get_provenance(network) | {"weights": read_origin(folder, file)})
    return network
