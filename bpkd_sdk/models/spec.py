"""The facts about a network that travel with its weights: how to build it, its classes, its normalisation."""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Color = tuple[int, int, int]


@dataclass(frozen=True)
class NetworkSpec:
    """What a checkpoint or an exported file says about its network.

    Attributes:
        name: The name that `create_model` builds it by, or None for a network of the user's own.
        num_classes: Channels of the logits.
        aux_head: Whether the network has its auxiliary training head.
        class_names: One per class; empty when not known.
        palette: One RGB colour (0..255) per class; empty when not known.
        mean: Per RGB channel, subtracted from the image scaled to 0..1.
        std: Per RGB channel, divides what is left.
        size_divisor: Both sides of an input must be multiples of it; 1 where any size is taken.
    """

    name: str | None
    num_classes: int
    aux_head: bool = False
    class_names: tuple[str, ...] = ()
    palette: tuple[Color, ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size_divisor: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkSpec:
        """The inverse of `to_dict`; an unknown key raises TypeError."""
        facts = dict(values)
        for key in ("class_names", "mean", "std"):
            facts[key] = tuple(facts.get(key, getattr(cls, key)))
        facts["palette"] = tuple((int(r), int(g), int(b)) for r, g, b in facts.get("palette", ()))
        return cls(**facts)

    def normalize(self, images: Tensor) -> Tensor:
        """RGB (N, 3, H, W) in 0..255, of any type -> float32, normalised as this network expects."""
        mean = images.new_tensor(self.mean, dtype=torch.float32).view(1, 3, 1, 1)
        std = images.new_tensor(self.std, dtype=torch.float32).view(1, 3, 1, 1)
        return (images.to(torch.float32) / 255 - mean) / std


def get_spec(model: nn.Module) -> NetworkSpec:
    """The spec a model carries as `model.spec`; for a foreign module ImageNet normalisation and 0 (unknown) classes.

    Set ``model.spec = NetworkSpec(...)`` on a network of your own to state its normalisation and classes.
    """
    spec = getattr(model, "spec", None)
    if isinstance(spec, NetworkSpec):
        return spec
    return NetworkSpec(name=None, num_classes=0, size_divisor=smp_size_divisor(model))


def smp_size_divisor(model: nn.Module) -> int:
    """What segmentation-models-pytorch says of its own networks; 1 for all others."""
    if not getattr(model, "requires_divisible_input_shape", False):
        return 1
    return int(getattr(getattr(model, "encoder", None), "output_stride", 1))


def distinct_colors(count: int) -> tuple[Color, ...]:
    """RGB colours (0..255) for classes that have none: black, then hues a golden angle apart in three brightnesses."""
    hues = [
        colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), (0.95, 0.75, 0.55)[index % 3])
        for index in range(count - 1)
    ]
    return ((0, 0, 0), *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues))
