"""The two networks of a row: the teacher from its checkpoint, the student from an ImageNet backbone."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from bpkd_sdk.models import ZOO, create_model, get_spec, open_checkpoint
from bpkd_sdk.models.checkpoint import load_state
from bpkd_sdk.recipes.table import Recipe


def open_teacher(recipe: Recipe, teacher: nn.Module | str | Path | None) -> nn.Module:
    """The teacher of a row, in eval mode.

    Args:
        recipe: The row.
        teacher: A checkpoint, ours or OpenMMLab's, or a network in eval mode.

    Raises:
        ValueError: If there is none, or it is another network; with where to get the right one.
        FileNotFoundError: If there is no such file.
    """
    get_it = f"Get {recipe.teacher_source}"
    if teacher is None:
        raise ValueError(f"The row {recipe.name!r} needs its teacher, a {recipe.teacher}. {get_it}")
    network = teacher if isinstance(teacher, nn.Module) else open_checkpoint(teacher)
    name = get_spec(network).name
    if name != recipe.teacher:
        raise ValueError(f"The row {recipe.name!r} has a {recipe.teacher} as teacher, but got a {name}. {get_it}")
    return network


def create_student(recipe: Recipe, num_classes: int, backbone: str | Path | None) -> nn.Module:
    """The student of a row, with the auxiliary head if its network has one.

    Args:
        recipe: The row.
        num_classes: Of the data set.
        backbone: File of an ImageNet backbone as OpenMMLab has them; "imagenet" for timm's, where those fit; or None
            for random weights, with a warning, since the paper's students do not start from those.

    Raises:
        ValueError: If the file does not fit, or timm has no weights that do.
    """
    from_timm = "imagenet" if backbone == "imagenet" else None
    student = create_model(
        recipe.student, num_classes, aux_head=ZOO[recipe.student].has_aux_head, backbone_weights=from_timm
    )
    if backbone is None:
        warnings.warn(
            f"The student's backbone has random weights; the paper's start from ImageNet. Get {recipe.backbone_source}",
            stacklevel=3,
        )
    elif from_timm is None:
        load_backbone(student.get_submodule("backbone"), backbone)
    return student


def load_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Load an OpenMMLab classifier's weights into a backbone; what belongs to the classifier is left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint, or lacks weights of the backbone.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no backbone at {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle makes torch's reader fail in any way.
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable PyTorch checkpoint ({type(error).__name__}). Fetch it again."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    found = {str(key).removeprefix("backbone."): value for key, value in state.items()}
    own = backbone.state_dict()
    # Old files lack the count of batches, which nothing is computed from.
    fitting = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    load_state(backbone, fitting | {key: found[key] for key in own.keys() & found.keys()}, source=str(path))
