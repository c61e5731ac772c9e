"""What one visitor looks at: an image, the masks of the networks, and the pictures made of them.

Networks run once for each image; every picture is drawn from what is kept here. That is little: the image stays the
file that was sent, masks are palette PNGs, and only what a moved control draws again lies ready at the page's size.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from bpkd_sdk.data.labels import read_label
from bpkd_sdk.data.transforms import resize_label
from bpkd_sdk.images import read_image
from bpkd_sdk.models.spec import Color
from bpkd_sdk.serve.networks import Network
from bpkd_sdk.serve.overlay import Difference, draw_difference, draw_overlay
from bpkd_sdk.serve.predictor import Prediction, Timings
from bpkd_sdk.serve.service.limits import Limits, read_bounded, read_untrusted_image
from bpkd_sdk.serve.service.responses import mask_png

SIDE = 1280  # most pixels of a side of a picture on the page; smaller images are enlarged by a whole factor up to it

_LINE: Color = (255, 214, 10)


@dataclass(frozen=True)
class CachedPrediction:
    """What one network made of the image.

    Attributes:
        png: The mask as a palette PNG, at the image's own size.
        shown: The mask at the page's size, uint8.
        class_names: One per class.
        palette: One RGB colour per class.
        timings: Of this prediction.
    """

    png: bytes
    shown: np.ndarray
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    timings: Timings

    @classmethod
    def keep(cls, prediction: Prediction) -> CachedPrediction:
        """Keep what the page needs of a prediction."""
        return cls(
            mask_png(prediction),
            to_page(prediction.mask, cv2.INTER_NEAREST_EXACT),
            prediction.class_names,
            prediction.palette,
            prediction.timings,
        )

    @property
    def mask(self) -> np.ndarray:
        """Class ids, uint8 (H, W), at the image's own size."""
        return np.asarray(Image.open(io.BytesIO(self.png)))


@dataclass(frozen=True)
class Scene:
    """An image on show.

    Attributes:
        name: Of its file, without the suffix.
        content: The file.
        size: (height, width) of the image.
        shown: The image at the page's size, uint8 (h, w, 3) RGB.
        label: The right classes, uint8 (H, W), 255 where not known; None without a label.
        seen: What each network made of it, by the network's name.
    """

    name: str
    content: bytes
    size: tuple[int, int]
    shown: np.ndarray
    label: np.ndarray | None = None
    seen: Mapping[str, CachedPrediction] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, limits: Limits) -> Scene:
        """Read an image file; ValueError if it is none, or too large."""
        content = read_bounded(path, limits.body)
        image = read_untrusted_image(content, limits)
        return cls(path.stem, content, (image.shape[0], image.shape[1]), to_page(image))

    def with_label(self, path: Path | None, num_classes: int | None = None) -> Scene:
        """Return the same scene with the label of a file, or without; ValueError if it does not fit the image.

        With two classes a label that holds only 0 and 255 is read as 0 and 1.
        """
        if path is None:
            return replace(self, label=None)
        width, height = _png_size(path)  # before a single pixel is decoded
        if (height, width) != self.size:
            raise ValueError(
                f"The label is {width} x {height} pixels and the image {self.size[1]} x {self.size[0]}. "
                "Both must have the same size."
            )
        try:
            label = read_label(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), "The label")) from error
        if label.max() > 255:
            raise ValueError(f"Expected class ids of 0 to 255 in the label, but got {label.max()}.")
        label = label.astype(np.uint8)
        if num_classes == 2 and set(np.unique(label)) == {0, 255}:
            label //= 255
        return replace(self, label=label)

    def seen_by(self, networks: Sequence[Network]) -> Scene:
        """The same scene with the masks of these networks; those that have seen it are not run again."""
        seen, image = dict(self.seen), self.image
        for network in networks:
            if network.name not in seen:
                assert network.predictor is not None  # noqa: S101  (only open networks are on offer)
                seen[network.name] = CachedPrediction.keep(network.predictor(image))
        return replace(self, seen=seen)

    @property
    def image(self) -> np.ndarray:
        """uint8 (H, W, 3) RGB, at its own size."""
        return read_image(self.content)

    def overlay(self, network: str | None, alpha: float, width: int) -> np.ndarray:
        """The classes of a network over the image, at the page's size; None shows the image alone."""
        if network is None:
            return self.shown
        seen = self.seen[network]
        return _draw(self.shown, seen.shown, seen.palette, alpha, width)

    def boundaries(self, network: str | None, width: int) -> np.ndarray:
        """Where the classes of a network meet, on the dimmed image, at the page's size; None shows the image alone."""
        if network is None:
            return self.shown
        dim, seen = cv2.convertScaleAbs(self.shown, alpha=0.55), self.seen[network]
        return _draw(np.asarray(dim), seen.shown, seen.palette, 0, max(width, 1), _LINE)

    def full_overlay(self, network: str, alpha: float, width: int) -> np.ndarray:
        """The overlay at the image's own size."""
        seen = self.seen[network]
        return full_overlay(self.image, seen.mask, seen.palette, alpha, width)

    def difference(self, one: str, other: str) -> tuple[np.ndarray, Difference]:
        """Where two networks disagree, at the page's size, and how much."""
        picture, difference = draw_difference(self.image, self.seen[one].mask, self.seen[other].mask, label=self.label)
        return to_page(picture), difference

    def errors(self, network: str | None) -> np.ndarray:
        """Where a network is not of the label's opinion, at the page's size; None shows the image alone."""
        if network is None:
            return self.shown
        assert self.label is not None  # noqa: S101  (asked for with a label only)
        return to_page(draw_difference(self.image, self.label, self.seen[network].mask)[0])


def _png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG that a stranger sent."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise ValueError("The label is no PNG.") from error
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"The label cannot be read: {error}") from error


def full_overlay(image: np.ndarray, mask: np.ndarray, palette: Sequence[Color], alpha: float, width: int) -> np.ndarray:
    """An overlay at the image's own size, whose lines are as wide for their image as they are on the page."""
    scale = _scale(image)
    return _draw(image, mask, palette, alpha, max(1, round(width / scale)) if width else 0)


def _draw(
    image: np.ndarray,
    mask: np.ndarray,
    palette: Sequence[Color],
    alpha: float,
    width: int,
    color: Color = (255, 255, 255),
) -> np.ndarray:
    # No id is void: networks are sure of every pixel, and 255 may be a class.
    return draw_overlay(
        image,
        mask,
        palette,
        alpha=alpha,
        boundaries=width > 0,
        boundary_width=max(width, 1),
        boundary_color=color,
        ignore_index=-1,
    )


def to_page(picture: np.ndarray, way: int = cv2.INTER_CUBIC) -> np.ndarray:
    """Resizes a picture (H, W, 3), or with `way` cv2.INTER_NEAREST_EXACT a mask (H, W), to the size of the page.

    Masks are resized by `resize_label`, so that they lie where the picture does. OpenCV's own way differs from it only
    where two pixels are equally near; cv2.INTER_NEAREST means the same here.
    """
    scale = _scale(picture)
    if scale == 1:
        return picture
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    if way in (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT):
        return np.asarray(resize_label(torch.tensor(picture), (height, width)).numpy())
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else way))


def _scale(picture: np.ndarray) -> float:
    longest: int = max(picture.shape[:2])
    return SIDE / longest if longest > SIDE else SIDE // longest
