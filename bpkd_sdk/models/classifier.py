"""The classifier of a network: its layer is found by trial, and its classes are reordered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bpkd_sdk.classes import Order, reorder_logits
from bpkd_sdk.output import as_output


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
    expected = reorder_logits(logits, order)
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
