"""Comparison of a network's classes with those of the data; equal names in another order are reordered.

An `Order` contains, for each class of the data, the column of the network's logits that predicts it. None means that
the order is the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bpkd_sdk.output import as_output

MAX_CLASSES = 256  # masks are uint8

Order = tuple[int, ...]

_UNNAMED = re.compile(r"((class|label)[ _-]?)?\d+", re.IGNORECASE)  # placeholders that libraries use for names


class ClassFacts(Protocol):
    """Class names and palette of a network or data set; each is empty where it is unknown."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One RGB colour (0..255) per class."""


def class_order(
    network: ClassFacts, data: ClassFacts, *, network_name: str, data_name: str, match_classes: bool = True
) -> Order | None:
    """Find the network's column of each class of the data, by name.

    Names that differ only in case, spaces, hyphens and underscores count as equal. If the network or the data have no
    class names, the order is assumed to be the same, unless both have the same colours in another order.

    Args:
        network: Class names and palette of the network.
        data: Class names and palette of the data, or of another network.
        network_name: Name of the network in error messages.
        data_name: Name of the data in error messages.
        match_classes: Whether to compare the names; False assumes the same order for any names.

    Returns:
        The order, or None if it is the same.

    Raises:
        ValueError: If the names differ; the error lists both.

    Example:
        >>> from bpkd_sdk import NetworkSpec
        >>> network = NetworkSpec(None, 3, class_names=("sky", "Car", "road"))
        >>> data = NetworkSpec(None, 3, class_names=("road", "sky", "car"))
        >>> class_order(network, data, network_name="teacher", data_name="data")
        (2, 0, 1)
    """
    if not match_classes:
        return None
    ours, theirs = list(network.class_names), list(data.class_names)
    unnamed = is_unnamed(ours) or is_unnamed(theirs)
    if len(ours) == 1 and len(theirs) == 2:  # one logit predicts the class of its name, or else the second class
        is_first = plain_name(ours[0]) == plain_name(theirs[0]) != plain_name(theirs[1])
        ours = [theirs[1 if is_first else 0], *ours]
    plain = list(map(plain_name, ours)), list(map(plain_name, theirs))
    if order := _permutation(ours, theirs) or _permutation(*plain):
        return order
    if ours == theirs or plain[0] == plain[1]:
        return None
    if unnamed:
        return _permutation(list(network.palette), list(data.palette))
    raise ValueError(
        f"{network_name} and {data_name} do not have the same classes.\n"
        f"  {network_name} has {len(network.class_names)}: {', '.join(network.class_names)}\n"
        f"  {data_name} has {len(theirs)}: {', '.join(theirs)}\n"
        "Use a network and data of the same classes (in any order). If only the names differ, and the order is the "
        "same, pass match_classes=False (--no-match-classes)."
    )


def _permutation(ours: Sequence[object], theirs: Sequence[object]) -> Order | None:
    """Return the positions of `theirs` in `ours`; None unless both have the same items in another order."""
    if ours == theirs or len(set(ours)) < len(ours) or len(ours) != len(theirs) or set(ours) != set(theirs):
        return None
    return tuple(map(ours.index, theirs))


def is_unnamed(class_names: Sequence[str]) -> bool:
    """Return whether there are no class names, or only placeholders such as "class 0" and "LABEL_0"."""
    return all(_UNNAMED.fullmatch(name) for name in class_names)


def plain_name(name: str) -> str:
    """Return a name without case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name)).casefold()


def check_class_count(channels: int, num_classes: int, *, network_name: str, data_name: str) -> None:
    """Raise ValueError if the number of logits does not fit the number of classes; one logit predicts two classes."""
    if max(channels, 2) == max(num_classes, 2):
        return
    raise ValueError(
        f"{network_name} predicts {max(channels, 2)} classes, but {data_name} has {num_classes}. "
        "Pass the data that the network was trained for, or a network with the same number of classes."
    )


def check_mask_classes(num_classes: int) -> None:
    """Raise ValueError for more classes than the 256 values of a uint8 mask."""
    if num_classes > MAX_CLASSES:
        raise ValueError(
            f"Expected at most {MAX_CLASSES} classes, but this network has {num_classes}. Masks are uint8: train a "
            "network with fewer classes, or merge classes."
        )


def reorder_logits(logits: Tensor, columns: Tensor) -> Tensor:
    """Put logits in the data's order.

    Args:
        logits: (N, C, h, w).
        columns: Order of the classes as a tensor on the device of the logits: (C,), or [1, 0] for one logit, whose
            class is the first of the data. The log odds of the second class are then the negative of the logit.
    """
    return -logits if logits.shape[1] == 1 else logits.index_select(1, columns)


def reorder_masks(masks: Tensor, order: Order | None) -> Tensor:
    """Convert the network's class ids to the data's.

    Args:
        masks: Class ids of any shape and integer dtype.
        order: Order of the classes, or None for the same order.
    """
    if order is None:
        return masks
    classes = torch.empty(len(order), dtype=masks.dtype, device=masks.device)
    classes[list(order)] = torch.arange(len(order), dtype=masks.dtype, device=masks.device)
    return classes[masks.long()]


def reorder_labels(labels: Tensor, order: Order | None, ignore_index: int) -> Tensor:
    """Convert the data's class ids to the network's columns; void stays void.

    Args:
        labels: Class ids of any shape and integer dtype.
        order: Order of the classes, or None for the same order.
        ignore_index: Label of void pixels.
    """
    if order is None:
        return labels
    columns = torch.tensor(order, device=labels.device)
    known = labels != ignore_index
    return torch.where(known, columns[torch.where(known, labels, 0).long()], ignore_index).to(labels.dtype)


@torch.no_grad()
def reorder_classifier(network: nn.Module, order: Order, images: Tensor) -> None:
    """Reorder the weights of the classifier to the data's order, in place; those of one logit are negated.

    The classifier is found by trial: if its output channels are reordered, the logits must be reordered and otherwise
    unchanged. The auxiliary classifier is the last layer with that number of channels whose path starts with "aux".

    Args:
        network: Network in eval mode, without wrappers, which would change the paths of its layers.
        order: Column of the network's logits for each class of the data.
        images: Any input (N, 3, H, W) that the network accepts, on its device.

    Raises:
        ValueError: If neither a single layer nor all layers of that width together are the classifier. The network is
            then unchanged.
    """
    logits = as_output(network(images)).logits
    expected = reorder_logits(logits, torch.tensor(order, device=logits.device))
    channels = logits.shape[1]
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and len(module.weight) == channels and _groups(module) == 1
    }
    main = [module for name, module in layers.items() if not name.startswith("aux")]
    if torch.equal(logits, expected):
        raise ValueError(
            f"{type(network).__name__} has the data's classes in another order, and the logits of its classes are "
            "equal, so that its classifier cannot be found. Load its weights, or reorder the classes of the data."
        )
    for candidate in (*([module] for module in reversed(main)), main):
        _permute(candidate, order)
        reordered = as_output(network(images)).logits
        if torch.allclose(reordered, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
            _permute([module for name, module in layers.items() if name.startswith("aux")][-1:], order)
            return
        _permute(candidate, tuple(order.index(column) for column in range(len(order))))
    raise ValueError(
        f"{type(network).__name__} has the data's classes in another order, and none of its layers with {channels} "
        "channels could be reordered to correct this. Change the order of the data's classes to the network's."
    )


def _groups(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _permute(layers: Sequence[nn.Module], order: Order) -> None:
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(-parameter if len(parameter) == 1 else parameter[list(order)])
