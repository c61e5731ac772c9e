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

_UNNAMED = re.compile(r"((class|label)[ _-]?)?\d+", re.IGNORECASE)  # placeholders that libraries use for names


class ClassFacts(Protocol):
    """Class names and palette of a network or of a data set; each is empty where it is not known."""

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

    Names that differ only in case, spaces, hyphens and underscores count as equal. Where the network or the data do not
    name the classes, their order is taken to be the same, unless both have the same colours in another order.

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
    if len(own) == 1 and len(wanted) == 2:  # one logit, whose class is the data's second
        own = [wanted[0], *own]
    plain = list(map(_plain, own)), list(map(_plain, wanted))
    if order := _permutation(own, wanted) or _permutation(*plain):
        return order
    if own == wanted or plain[0] == plain[1]:
        return None
    if any(all(_UNNAMED.fullmatch(name) for name in names) for names in (own, wanted)):
        return _permutation(list(network.palette), list(data.palette))
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
    """Raise ValueError if the number of logits does not fit the data; one logit predicts two classes."""
    if max(channels, 2) == max(num_classes, 2):
        return
    raise ValueError(
        f"{network_name} predicts {max(channels, 2)} classes, but {data_name} has {num_classes}. "
        "Pass the data that the network was trained for, or a network of as many classes."
    )


def check_mask_classes(num_classes: int) -> None:
    """Raise ValueError for more classes than a uint8 mask can hold."""
    if num_classes > MOST_CLASSES:
        raise ValueError(
            f"Masks are uint8, for at most {MOST_CLASSES} classes, but this network has {num_classes}. Train a network "
            "of fewer classes, or merge classes."
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
    The auxiliary classifier is the last layer of as many channels whose path begins with "aux".

    Args:
        network: In eval mode; without wrappers, which would change the paths of its layers.
        order: For each class of the data the network's column.
        images: Any input (N, 3, H, W) that the network takes, on its device.

    Raises:
        ValueError: If neither one layer nor all layers of that width together prove to be the classifier. The network
            is then unchanged.
    """
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and len(module.weight) == len(order) and _groups(module) == 1
    }
    main = [module for name, module in layers.items() if not name.startswith("aux")]
    logits = as_output(network(images)).logits
    wanted = logits[:, list(order)]
    if torch.equal(logits, wanted):
        raise ValueError(
            f"{type(network).__name__} has the data's classes in another order, and its classes have equal logits, so "
            "that its classifier cannot be found. Load its weights, or order the classes of the data as it has them."
        )
    for candidate in (*([module] for module in reversed(main)), main):
        _permute(candidate, order)
        found = as_output(network(images)).logits
        if torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
            _permute([module for name, module in layers.items() if name.startswith("aux")][-1:], order)
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
