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

    def __post_init__(self) -> None:
        """Check that the facts fit together."""
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(
                    f"Expected `{name}` to have three values, one per RGB channel, but got {getattr(self, name)}."
                )
        if min(self.std) <= 0:
            raise ValueError(f"Expected `std` to be above 0 for each channel, but got {self.std}.")
        if max(*map(abs, self.mean), *self.std) > 10:
            raise ValueError(
                f"Expected `mean` and `std` of images in 0..1, but got {self.mean} and {self.std}. Divide them by 255."
            )
        allowed = (0, self.num_classes, 2 if self.num_classes == 1 else 0)  # one logit tells two classes apart
        for name in ("class_names", "palette"):
            count = len(getattr(self, name))
            if self.num_classes and count not in allowed:
                raise ValueError(f"Expected `{name}` to have one entry per class, {self.num_classes}, but got {count}.")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkSpec:
        """Build a spec from what `to_dict` returned.

        Raises:
            ValueError: For values that describe no network.
        """
        try:
            facts = dict(values)
            for key in ("class_names", "mean", "std"):
                facts[key] = tuple(facts.get(key, getattr(cls, key)))
            facts["palette"] = tuple((int(r), int(g), int(b)) for r, g, b in facts.get("palette", ()))
            return cls(**facts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the facts of the network are not readable ({error})") from error

    def normalize(self, images: Tensor) -> Tensor:
        """RGB (N, 3, H, W) in 0..255, of any type -> float32, normalised as this network expects."""
        mean = images.new_tensor(self.mean, dtype=torch.float32).view(1, 3, 1, 1)
        std = images.new_tensor(self.std, dtype=torch.float32).view(1, 3, 1, 1)
        return (images.to(torch.float32) / 255 - mean) / std


def get_spec(model: nn.Module) -> NetworkSpec:
    """Return the spec that a model carries as `model.spec`, or what a module of another library says of itself.

    Such a module is taken to have ImageNet's normalisation; its class names are those of a Hugging Face
    ``config.id2label``, and otherwise not known (0 classes). Set ``model.spec = NetworkSpec(...)`` on a network of your
    own to state its normalisation and classes.
    """
    spec = getattr(model, "spec", None)
    if isinstance(spec, NetworkSpec):
        return spec
    names = _hugging_face_names(model)
    return NetworkSpec(None, num_classes=len(names), class_names=names, size_divisor=smp_size_divisor(model))


def _hugging_face_names(model: nn.Module) -> tuple[str, ...]:
    """Class names of a Hugging Face configuration, in the order of the logits; empty without one."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, Mapping) or set(labels) != set(range(len(labels))):
        return ()
    return tuple(str(labels[index]) for index in range(len(labels)))


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
