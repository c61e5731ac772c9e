"""`PixelFormat`: number, range and visible bands of the channels of images, compared wherever network and data meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MAX_CHANNELS = 16
# Pictures of images that are not 8-bit RGB show these percentiles of a band's values as black and white.
PERCENTILES = (2, 98)
# An image type of at most 8 bits holds 255 steps; images that use fewer steps of their range have a wrong range.
_STEPS = 255
_TYPES = ("uint8", "uint16", "int8", "int16", "float16", "float32", "float64")


@dataclass(frozen=True)
class PixelFormat:
    """The channels of images.

    Attributes:
        channels: Number of channels, 1 to 16.
        value_range: Lowest and highest value that a channel can have, for example (0, 255), (0, 4095) or (0.0, 1.0).
        bands: Indices of the channels that are visible: red, green and blue, or one for grey. () if none is visible:
            pictures then show the first channels, and colours are not augmented. None: (0, 1, 2) for three channels,
            (0,) for one, and () for other numbers.

    Raises:
        ValueError: If a value is out of its range.
    """

    channels: int = 3
    value_range: tuple[float, float] = (0, 255)
    bands: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the values, and choose the bands."""
        if type(self.channels) is not int or not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"Expected `channels` to be 1 to {MAX_CHANNELS}, but got {self.channels!r}.")
        low, high = self.value_range if len(self.value_range) == 2 else (0, 0)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"Expected `value_range` to be (lowest, highest) value of a pixel, but got {self.value_range}."
            )
        object.__setattr__(self, "value_range", (low, high))
        bands = {1: (0,), 3: (0, 1, 2)}.get(self.channels, ()) if self.bands is None else tuple(self.bands)
        if len(bands) not in (0, 1, 3) or not all(type(band) is int and 0 <= band < self.channels for band in bands):
            raise ValueError(
                f"Expected `bands` to be three indices of channels (red, green, blue), one (grey) or none, each 0 to "
                f"{self.channels - 1}, but got {bands}."
            )
        object.__setattr__(self, "bands", bands)

    @property
    def is_rgb8(self) -> bool:
        """Whether images are 8-bit RGB, which all readers of images convert to."""
        return self.channels == 3 and self.is_uint8

    @property
    def is_uint8(self) -> bool:
        """Whether the values are bytes; all other images are processed as float32."""
        return self.value_range == (0, 255)

    @property
    def shown(self) -> tuple[int, ...]:
        """Indices of the three channels, or of the one channel, that pictures show."""
        if self.bands:
            return self.bands
        return (0, 1, 2) if self.channels >= 3 else (0,)

    def __str__(self) -> str:
        low, high = self.value_range
        return f"{self.channels} channel{'s' if self.channels > 1 else ''} of {low:g} to {high:g}"

    @property
    def picture_rule(self) -> str:
        """Sentence that states how pictures show these images; empty for 8-bit RGB, which is shown as it is."""
        if self.is_rgb8 and self.bands == (0, 1, 2):
            return ""
        names = ", ".join(str(band) for band in self.shown)
        role = "red, green and blue" if len(self.shown) == 3 else "grey"
        word = "Channels" if len(self.shown) == 3 else "Channel"
        scale = (
            "" if self.is_uint8 else f", each scaled from its {PERCENTILES[0]}nd to its {PERCENTILES[1]}th percentile"
        )
        return f"{word} {names} of {self.channels} (counted from 0) as {role}{scale}."

    def problem(self, image: Tensor | np.ndarray) -> str | None:
        """Return the reason why the values of an image do not have this format, or None; shapes are not checked.

        Args:
            image: Pixels of any shape.
        """
        low, high = self.value_range
        kind = str(image.dtype).removeprefix("torch.")
        if self.is_uint8:
            if kind == "uint8":
                return None
            return f"the pixels are {kind}, but values of 0 to 255 are expected as uint8. {self._advice(image)}"
        if kind == "uint8" and high > _STEPS:
            return (
                f"the pixels are uint8, but values of {low:g} to {high:g} are expected. Pass the image with its "
                "original values, or state value_range=(0, 255)"
            )
        if kind not in _TYPES:
            return f"the pixels are {kind}, expected uint8, uint16 or float32"
        least, most = _limits(image)
        if not (math.isfinite(least) and math.isfinite(most)):
            return "the pixels contain NaN or infinity. Replace them, for example by 0"
        if least < low or most > high:
            return f"the pixels go from {least:g} to {most:g}, outside of {low:g} to {high:g}. {self._advice(image)}"
        return None

    def _advice(self, image: Tensor | np.ndarray) -> str:
        least, most = _limits(image)
        if self.is_uint8 and str(image.dtype).removeprefix("torch.") not in ("uint16", "int16", "int32", "int64"):
            return (
                f"They go from {least:.3g} to {most:.3g}: return the pixels as bytes of 0 to 255, since training and "
                "export scale and normalise them themselves, or state their range, for example value_range=(0.0, 1.0)"
            )
        bits = next((bits for bits in (10, 12, 14, 16) if most < 2**bits), None)
        example = f"(0, {2**bits - 1})" if bits and least >= 0 else f"({math.floor(least)}, {math.ceil(most)})"
        return f"The largest value is {most:g}: state the range of the data, for example value_range={example}"

    def canonical(self, image: Tensor) -> Tensor:
        """Return an image with values of this format as uint8 if `is_uint8`, otherwise as float32; no check is done."""
        return image if self.is_uint8 else image.float()

    def is_too_dark(self, brightest: float) -> bool:
        """Return whether images use no more than a 255th of the range, so that the range is that of another type.

        Args:
            brightest: Largest value of all images.
        """
        low, high = self.value_range
        return brightest - low <= (high - low) / _STEPS

    def picture(self, image: np.ndarray) -> np.ndarray:
        """Return a picture of an image for people, as `picture_rule` states.

        Args:
            image: Pixels (H, W, channels).

        Returns:
            uint8 (H, W, 3) RGB; the image itself if it is this already.
        """
        if self.is_rgb8 and self.bands == (0, 1, 2):
            return image
        planes = [image[..., band] for band in self.shown]
        if not self.is_uint8:
            planes = [_stretch(plane) for plane in planes]
        return np.ascontiguousarray(np.stack(planes * (3 // len(planes)), axis=-1))


def _limits(image: Tensor | np.ndarray) -> tuple[float, float]:
    array = image if isinstance(image, np.ndarray) else image.detach().cpu().numpy()  # torch compares no uint16
    return float(array.min()), float(array.max())


def _stretch(plane: np.ndarray) -> np.ndarray:
    """Scale one band linearly to uint8, from its percentiles."""
    values = plane.astype(np.float32)
    black, white = np.percentile(values, PERCENTILES)
    scaled = (values - black) / max(float(white - black), np.finfo(np.float32).tiny)
    return np.asarray((scaled.clip(0, 1) * 255).round().astype(np.uint8))


def check_pixels(network: PixelFormat, data: PixelFormat, *, network_name: str, data_name: str) -> None:
    """Raise ValueError unless a network takes the images of data.

    Args:
        network: Format of the images that the network takes.
        data: Format of the images of the data.
        network_name: Name of the network in the message, at the start of a sentence.
        data_name: Name of the data in the message.
    """
    if network.channels != data.channels:
        raise ValueError(
            f"{network_name} takes images of {network}, but {data_name} has {data}. Use a network that is built for "
            f"{data.channels} channels (create_model(..., in_channels={data.channels})), or data with "
            f"{network.channels}."
        )
    if network.value_range != data.value_range:
        raise ValueError(
            f"{network_name} takes images of {network}, but {data_name} has {data}, so that it would normalise them "
            "wrongly. State the range of the data as it is; if the network is right for it, set its spec: "
            "set_spec(network, dataclasses.replace(get_spec(network), value_range=..., mean=..., std=...))."
        )


def pixels_of(facts: Any) -> PixelFormat:
    """Return the format of a data set's images, from its attributes `channels`, `value_range` and `bands`."""
    return PixelFormat(facts.channels, tuple(facts.value_range), facts.bands)
