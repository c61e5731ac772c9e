"""`NetworkSpec`: the facts about a network that its checkpoints and exported files contain beside the weights."""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bpkd_sdk.files import parse_record

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Color = tuple[int, int, int]


@dataclass(frozen=True)
class NetworkSpec:
    """Name, classes and normalisation of a network.

    Attributes:
        name: Name that `create_model` builds the network by; None for a network of the user's own class.
        num_classes: C, the number of channels of the logits.
        aux_head: Whether the network has its auxiliary training head.
        class_names: One name per class; empty where the names are unknown.
        palette: One RGB colour (0..255) per class; empty where the colours are unknown.
        mean: Mean of each RGB channel, subtracted from the image scaled to 0..1.
        std: Standard deviation of each RGB channel, by which the difference is divided.
        size_divisor: Number that height and width of an input must be multiples of; 1 if any size is allowed.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # pydantic then refuses unknown fields

    name: str | None
    num_classes: int
    aux_head: bool = False
    class_names: tuple[str, ...] = ()
    palette: tuple[Color, ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size_divisor: int = 1

    def __post_init__(self) -> None:
        """Check that the facts are consistent."""
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
        allowed = (0, self.num_classes, 2 if self.num_classes == 1 else 0)  # one logit separates two classes
        for name in ("class_names", "palette"):
            count = len(getattr(self, name))
            if self.num_classes and count not in allowed:
                raise ValueError(f"Expected `{name}` to have one entry per class, {self.num_classes}, but got {count}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: object, source: str = "'network'") -> NetworkSpec:
        """Build a spec from the values that `to_dict` returned; fields that an older file lacks get their defaults.

        Args:
            values: Plain JSON values by field name.
            source: File or header that the values come from, for the error message.

        Raises:
            ValueError: If a field is unknown, missing, of another type, or inconsistent with the others.
        """
        return parse_record(cls, values, source)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images as this network expects them.

        Args:
            images: RGB (N, 3, H, W) in 0..255, of any dtype.

        Returns:
            (N, 3, H, W) float32.
        """
        mean = images.new_tensor(self.mean, dtype=torch.float32).view(1, 3, 1, 1)
        std = images.new_tensor(self.std, dtype=torch.float32).view(1, 3, 1, 1)
        return (images.to(torch.float32) / 255 - mean) / std


def get_spec(model: nn.Module) -> NetworkSpec:
    """Return the spec that a model carries as `model.spec`, or one derived from the attributes of other libraries.

    A derived spec has ImageNet's normalisation. Its class names are those of a Hugging Face ``config.id2label``;
    without one they are unknown and `num_classes` is 0. To state the normalisation and the classes of a network of
    your own, call ``set_spec(model, NetworkSpec(...))``.
    """
    spec = getattr(model, "spec", None)
    if isinstance(spec, NetworkSpec):
        return spec
    names = _hugging_face_names(model)
    return NetworkSpec(None, num_classes=len(names), class_names=names, size_divisor=smp_size_divisor(model))


def set_spec(model: nn.Module, spec: NetworkSpec) -> None:
    """Set `model.spec`, which `get_spec`, `save_model` and the exporters read."""
    model.spec = spec  # type: ignore[assignment]  # torch declares attributes of modules as tensors or modules


def _hugging_face_names(model: nn.Module) -> tuple[str, ...]:
    """Return the class names of a Hugging Face configuration, in the order of the logits; empty without one."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, Mapping) or set(labels) != set(range(len(labels))):
        return ()
    return tuple(str(labels[index]) for index in range(len(labels)))


def smp_size_divisor(model: nn.Module) -> int:
    """Return the size divisor that a network of segmentation-models-pytorch requires; 1 for all other networks."""
    if not getattr(model, "requires_divisible_input_shape", False):
        return 1
    return int(getattr(getattr(model, "encoder", None), "output_stride", 1))


def distinct_colors(count: int) -> tuple[Color, ...]:
    """Return RGB colours (0..255) for classes without a palette.

    The first is black; the others have hues a golden angle apart, in three brightnesses.
    """
    hues = [
        colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), (0.95, 0.75, 0.55)[index % 3])
        for index in range(count - 1)
    ]
    return ((0, 0, 0), *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues))
