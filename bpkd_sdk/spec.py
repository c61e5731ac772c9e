"""`NetworkSpec`: the facts about a network that its checkpoints and exported files contain beside the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from bpkd_sdk.arrays import Array, array_namespace, per_channel, round_to
from bpkd_sdk.files import parse_record
from bpkd_sdk.pixels import PixelFormat

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Color = tuple[int, int, int]


@dataclass(frozen=True)
class NetworkSpec:
    """Name, classes, images and normalisation of a network.

    Attributes:
        name: Name that `create_model` builds the network by; None for a network of the user's own class.
        num_classes: C, the number of channels of the logits. 1 for a network that separates two classes by one logit,
            whose sigmoid is the probability of the second class.
        aux_head: Whether the network has its auxiliary training head.
        class_names: One name per class; empty where the names are unknown. For one logit: both names, or only that of
            the class that the logit stands for.
        palette: One RGB colour (0..255) per class; empty where the colours are unknown.
        mean: Mean of each channel, subtracted from the image after `value_range` is scaled to 0..1; () if it is not
            measured yet, as for a new network of other than three channels: training measures and sets it.
        std: Standard deviation of each channel, by which the difference is divided; () as for `mean`.
        size_divisor: Number that height and width of an input must be multiples of; 1 if any size is allowed.
        in_channels: Number of channels of the images.
        value_range: Lowest and highest value that a channel of the images can have.
        bands: Indices of the visible channels, see `bpkd_sdk.pixels.PixelFormat`.
        config: Arguments of the network's library that build it together with its name, as plain JSON values; None for
            a network that is built by its name alone.

    Raises:
        ValueError: If a value is out of its range, or the numbers of channels, names or colours differ.
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
    in_channels: int = 3
    value_range: tuple[float, float] = (0, 255)
    bands: tuple[int, ...] | None = None
    config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check that the facts are consistent."""
        object.__setattr__(self, "bands", self.pixels.bands)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != (self.in_channels if self.mean or self.std else 0):
                raise ValueError(
                    f"Expected `{name}` to have one value for each of {self.in_channels} channels, but got {values}. "
                    "If they are not measured yet, pass mean=() and std=()."
                )
        if min(self.std, default=1) <= 0:
            raise ValueError(f"Expected `std` to be above 0 for each channel, but got {self.std}.")
        if max((abs(value) for value in (*self.mean, *self.std)), default=0) > 10:
            raise ValueError(
                f"Expected `mean` and `std` of images in 0..1, but got {self.mean} and {self.std}. Divide them by "
                f"{self.value_range[1] - self.value_range[0]:g}."
            )
        allowed = (0, self.num_classes, 2 if self.num_classes == 1 else 0)  # one logit separates two classes
        for name in ("class_names", "palette"):
            count = len(getattr(self, name))
            if self.num_classes and count not in allowed:
                raise ValueError(f"Expected `{name}` to have one entry per class, {self.num_classes}, but got {count}.")

    @property
    def pixels(self) -> PixelFormat:
        """Format of the images that the network takes."""
        return PixelFormat(self.in_channels, self.value_range, self.bands)

    @property
    def mean_pixel(self) -> tuple[float, ...]:
        """Value of each channel that is 0 after normalisation; rounded if the images are bytes."""
        low, high = self.value_range
        values = [low + mean * (high - low) for mean in self.mean]
        return tuple(map(round, values) if self.pixels.is_uint8 else values)

    def for_images(self, pixels: PixelFormat) -> NetworkSpec:
        """Return the spec for a format of images; unless it is 8-bit RGB, mean and deviation are not measured yet."""
        if pixels.is_rgb8:
            return self
        return dataclasses.replace(
            self,
            in_channels=pixels.channels,
            value_range=pixels.value_range,
            bands=pixels.bands,
            mean=(),
            std=(),
        )

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Name of each class id in masks; for one logit with one name, class 0 is "background"."""
        is_single = self.num_classes == len(self.class_names) == 1
        return ("background", *self.class_names) if is_single else self.class_names

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
        if isinstance(values, dict) and all(
            name in _JSON_TYPES and _JSON_TYPES[name](value) for name, value in values.items()
        ):
            try:
                return cls(**{name: _to_tuples(value) if name != "config" else value for name, value in values.items()})
            except (TypeError, ValueError):
                pass  # a field is missing, or does not fit the others
        # pydantic states what is wrong. Its import would take a third of the time in which an ONNX file runs.
        return parse_record(cls, values, source)

    def normalize(self, images: Array) -> Array:
        """Normalise images as this network expects them.

        Args:
            images: (N, in_channels, H, W) with values in `value_range`, of any dtype; a numpy array or a torch tensor.

        Returns:
            (N, in_channels, H, W) float32, of the same kind and on the same device.

        Raises:
            ValueError: If mean and standard deviation are not measured yet.
        """
        self.check_measured()
        xp = array_namespace(images)
        mean, std = (per_channel(values, images, xp.float32) for values in (self.mean, self.std))
        low, high = self.value_range
        values = xp.astype(images, xp.float32)
        result: Array = ((values - low if low else values) / (high - low) - mean) / std
        return result

    def imitate(self, pictures: Array) -> Array:
        """Make images that this network can take from pictures, for tracing, comparing and timing without data.

        After normalisation they are the pictures normalised by ImageNet's mean and standard deviation, with the colour
        channels repeated, up to the ends of the range.

        Args:
            pictures: RGB uint8 (N, 3, H, W), a numpy array or a torch tensor.

        Returns:
            (N, in_channels, H, W): the pictures themselves for 8-bit RGB, uint8 for other bytes, otherwise float32.
        """
        if self.pixels.is_rgb8:
            return pictures
        self.check_measured()
        xp = array_namespace(pictures)
        normal = NetworkSpec(None, 0).normalize(pictures)[:, [channel % 3 for channel in range(self.in_channels)]]
        mean, std = (per_channel(values, pictures, xp.float32) for values in (self.mean, self.std))
        low, high = self.value_range
        values: Array = xp.clip(normal * std + mean, 0, 1) * (high - low) + low
        return round_to(values, xp.uint8 if self.pixels.is_uint8 else xp.float32)

    def check_measured(self) -> None:
        """Raise ValueError if mean and standard deviation are not measured yet."""
        if not self.mean:
            raise ValueError(
                f"The mean and the standard deviation of the network's {self.in_channels} channels are not known yet. "
                "Training measures them; or set them: set_spec(network, dataclasses.replace(get_spec(network), "
                "mean=..., std=..., value_range=...))."
            )


def _is_list(value: Any, *types: type, length: int | None = None) -> bool:
    return isinstance(value, list) and all(type(item) in types for item in value) and length in (None, len(value))


# Whether a value read from JSON has exactly the type of a field.
_JSON_TYPES: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: value is None or isinstance(value, str),
    "num_classes": lambda value: type(value) is int,
    "aux_head": lambda value: isinstance(value, bool),
    "class_names": lambda value: _is_list(value, str),
    "palette": lambda value: isinstance(value, list) and all(_is_list(color, int, length=3) for color in value),
    "mean": lambda value: _is_list(value, int, float),
    "std": lambda value: _is_list(value, int, float),
    "size_divisor": lambda value: type(value) is int,
    "in_channels": lambda value: type(value) is int,
    "value_range": lambda value: _is_list(value, int, float, length=2),
    "bands": lambda value: value is None or _is_list(value, int),
    "config": lambda value: value is None or isinstance(value, dict),
}


def _to_tuples(value: Any) -> Any:
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value
