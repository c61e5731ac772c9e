"""The classes of a network, held against those of the data: equal names in another order are put in order.

An *order* names, for each class of the data, the network's column that predicts it; None stands for the same order.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from bpkd_sdk.output import SegmentationOutput, as_output

MOST_CLASSES = 256  # masks are uint8

Order = tuple[int, ...]

_UNNAMED = re.compile(r"((class|label)[ _-]?)?\d+", re.IGNORECASE)  # what libraries call classes that nobody named


class ClassFacts(Protocol):
    """What is known of the classes of a network or of a data set; both sequences are empty when not known."""

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

    Names that differ only in case, spaces, hyphens and underscores count as equal. A network that does not name its
    classes is taken to have them in the data's order, unless its palette has the data's colours in another order.

    Args:
        network: Class names and palette of the network.
        data: Class names and palette of the data, or of another network.
        network_name: What errors call the network.
        data_name: What errors call the data.
        match_classes: False takes the network's columns by position, whatever their names are.

    Returns:
        The order, or None where it is the same.

    Raises:
        ValueError: If the names are not the same names; both lists are in the message.

    Example:
        >>> from bpkd_sdk import NetworkSpec
        >>> network = NetworkSpec(None, 3, class_names=("sky", "Car", "road"))
        >>> data = NetworkSpec(None, 3, class_names=("road", "sky", "car"))
        >>> class_order(network, data, network_name="teacher", data_name="data")
        (2, 0, 1)
    """
    if not match_classes:
        return None
    own, wanted = list(network.class_names), list(data.class_names)
    if all(_UNNAMED.fullmatch(name) for name in own):
        return _permutation(list(network.palette), list(data.palette))
    if len(own) == 1 and len(wanted) == 2:  # one logit, whose class is the data's second
        own = [wanted[0], *own]
    order = _permutation(own, wanted) or _permutation(list(map(_plain, own)), list(map(_plain, wanted)))
    if order is not None or own == wanted or list(map(_plain, own)) == list(map(_plain, wanted)):
        return order
    raise ValueError(
        f"{network_name} and {data_name} do not have the same classes.\n"
        f"  {network_name} has {len(network.class_names)}: {', '.join(network.class_names)}\n"
        f"  {data_name} has {len(wanted)}: {', '.join(wanted)}\n"
        "Use a network and data of the same classes (in any order). If the classes are the same and in the same order "
        "under other names, pass match_classes=False (--no-match-classes)."
    )


def _permutation(own: Sequence[object], wanted: Sequence[object]) -> Order | None:
    """Positions in `own` of the items in `wanted`; None unless both hold the same items, once each, in other orders."""
    if own == wanted or len(set(own)) < len(own) or len(own) != len(wanted) or set(own) != set(wanted):
        return None
    return tuple(map(own.index, wanted))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name)).casefold()


def check_class_count(channels: int, num_classes: int, *, network_name: str, data_name: str) -> None:
    """Raise ValueError unless a network of so many channels predicts so many classes; one channel predicts two."""
    if max(channels, 2) == max(num_classes, 2):
        return
    raise ValueError(
        f"{network_name} predicts {channels} classes, but {data_name} has {num_classes}. "
        "Pass the data that the network was trained for, or a network of as many classes."
    )


def check_mask_classes(num_classes: int) -> None:
    """Raise ValueError for more classes than a mask can tell apart."""
    if num_classes > MOST_CLASSES:
        raise ValueError(
            f"Masks are uint8, for at most {MOST_CLASSES} classes, but this network has {num_classes}. Train one of "
            f"fewer classes, or merge classes that need not be told apart."
        )


def reorder_masks(masks: Tensor, order: Order | None) -> Tensor:
    """Turn the network's class ids, of any shape and integer type, into the data's."""
    if order is None:
        return masks
    classes = torch.empty(len(order), dtype=masks.dtype, device=masks.device)
    classes[list(order)] = torch.arange(len(order), dtype=masks.dtype, device=masks.device)
    return classes[masks.long()]


def reorder_labels(labels: Tensor, order: Order | None, ignore_index: int) -> Tensor:
    """Turn the data's class ids into the network's columns; void stays void."""
    if order is None:
        return labels
    columns = torch.tensor(order, device=labels.device)
    known = labels != ignore_index
    return torch.where(known, columns[torch.where(known, labels, 0).long()], ignore_index).to(labels.dtype)


class ReorderedNetwork(nn.Module):
    """A network whose logits are put in the data's order; the network itself stays as it is.

    Args:
        network: Any segmentation network.
        order: For each class of the data the network's column.
    """

    def __init__(self, network: nn.Module, order: Order) -> None:
        super().__init__()
        self.network = network
        self.columns: Tensor
        self.register_buffer("columns", torch.tensor(order), persistent=False)
        self.train(network.training)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Run the network on normalised images (N, 3, H, W)."""
        output = as_output(self.network(images))
        aux = None if output.aux_logits is None else output.aux_logits.index_select(1, self.columns)
        return replace(output, logits=output.logits.index_select(1, self.columns), aux_logits=aux)


@torch.no_grad()
def reorder_classifier(network: nn.Module, order: Order, images: Tensor) -> None:
    """Put the classifier's weights in the data's order, in place.

    The classifier is found by trial: reordering its output channels must reorder the logits and change nothing else.
    Auxiliary classifiers are those of as many channels whose path begins with "aux".

    Args:
        network: In eval mode.
        order: For each class of the data the network's column.
        images: Any input (N, 3, H, W) that the network takes, on its device.

    Raises:
        ValueError: If no layer, and not all layers of that width together, proves to be the classifier. The network is
            then unchanged.
    """
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and len(module.weight) == len(order) and _groups(module) == 1
    }
    main = [module for name, module in layers.items() if not name.startswith("aux")]
    wanted = as_output(network(images)).logits[:, list(order)]
    for candidate in (*([module] for module in reversed(main)), main):
        _permute(candidate, order)
        found = as_output(network(images)).logits
        if torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
            _permute([module for name, module in layers.items() if name.startswith("aux")], order)
            return
        _permute(candidate, tuple(order.index(column) for column in range(len(order))))
    raise ValueError(
        f"{type(network).__name__} has the data's classes in another order, and no layer of {len(order)} channels was "
        "found in it whose channels could be put in order. Order the classes of the data as the network has them."
    )


def _groups(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _permute(layers: Sequence[nn.Module], order: Order) -> None:
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(parameter[list(order)])
