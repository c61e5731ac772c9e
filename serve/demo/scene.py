"""The image that a visitor opened, the predictions of the networks for it, and the pictures drawn from them.

Each network runs once per image, and all pictures are drawn from the cached predictions. The cache is small: it holds
the image as the uploaded file, masks as palette PNG files, and image and masks in the size of the page.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from bpkd_sdk.data.labels import read_label
from bpkd_sdk.evaluation.agreement import MaskAgreement, mask_agreement
from bpkd_sdk.images import read_pixels
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.serve.networks import ServedModel
from bpkd_sdk.serve.overlay import Difference, draw_difference, draw_overlay
from bpkd_sdk.serve.predictor import Prediction
from bpkd_sdk.serve.service.limits import Limits, read_bounded, read_untrusted_image
from bpkd_sdk.sizes import format_size, resize_label
from bpkd_sdk.spec import Color

# Maximum side of a picture on the page, in pixels. Larger images are reduced to it; smaller images are enlarged by
# the largest integer factor for which they fit.
PAGE_SIDE = 1280

_BOUNDARY_COLOR: Color = (255, 214, 10)


@dataclass(frozen=True)
class CachedPrediction:
    """The parts of a `Prediction` that the page needs.

    Attributes:
        png: Mask as a palette PNG file, in the size of the image.
        page_mask: Mask in the size of the page, uint8 (h, w).
        class_names: Name of each class.
        palette: RGB colour (0..255) of each class.
        confidence: Confidence as `mean_confidence` computes it, 0..1; None for a file of masks.
    """

    png: bytes
    page_mask: np.ndarray
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    confidence: float | None

    @classmethod
    def from_prediction(cls, prediction: Prediction) -> CachedPrediction:
        """Encode the mask of a prediction and resize it to the page."""
        return cls(
            prediction.mask_png(),
            resize_to_page(prediction.mask, cv2.INTER_NEAREST_EXACT),
            prediction.class_names,
            prediction.palette,
            mean_confidence(prediction),
        )

    @property
    def mask(self) -> np.ndarray:
        """Class ids in the size of the image, uint8 (H, W)."""
        return np.asarray(Image.open(io.BytesIO(self.png)))


def mean_confidence(prediction: Prediction) -> float | None:
    """Return the probability of the predicted class, averaged over the pixels of each class and then over the classes.

    Classes with less than 0.5 % of the pixels are left out. Without the average over classes, a large background of
    which a network is always sure would hide that it is unsure of everything else. None without probabilities.
    """
    if prediction.confidence is None:
        return None
    areas = np.bincount(prediction.mask.ravel(), minlength=256)
    sums = np.bincount(prediction.mask.ravel(), weights=prediction.confidence.ravel(), minlength=256)
    counted = areas >= min(0.005 * prediction.mask.size, areas.max())
    return float((sums[counted] / areas[counted]).mean())


@dataclass(frozen=True)
class Scene:
    """An image with its label and the predictions of networks.

    Attributes:
        name: Name of the image file without its suffix.
        content: Content of the image file.
        size: Height and width of the image in pixels.
        page_image: Picture of the image in the size of the page, uint8 (h, w, 3) RGB.
        label: Ground-truth class ids, uint8 (H, W), 255 for void; None without a label.
        predictions: Prediction of each network, by the name of the network.
        pixels: Format of the image.
        is_example: Whether the image is one of the examples.
    """

    name: str
    content: bytes
    size: tuple[int, int]
    page_image: np.ndarray
    label: np.ndarray | None = None
    predictions: Mapping[str, CachedPrediction] = field(default_factory=dict)
    pixels: PixelFormat = field(default_factory=PixelFormat)
    is_example: bool = False

    @classmethod
    def open(cls, source: Path, limits: Limits, pixels: PixelFormat = PixelFormat()) -> Scene:  # noqa: B008  (frozen)
        """Read an image file of a format that the networks take.

        Raises:
            ValueError: If the file is not an image, or exceeds the limits.
        """
        content = read_bounded(source, limits.max_upload_bytes)
        image = read_untrusted_image(content, limits, pixels)
        page_image = resize_to_page(pixels.picture(image))
        return cls(source.stem, content, (image.shape[0], image.shape[1]), page_image, pixels=pixels)

    def with_label(self, source: Path | None, num_classes: int | None = None) -> Scene:
        """Return the scene with the label of a PNG file, or without a label.

        Args:
            source: PNG file of class ids; None removes the label.
            num_classes: Number of classes. With two classes, a label that contains only 0 and 255 is read as 0 and 1.

        Raises:
            ValueError: If the file cannot be read, or if its size differs from the size of the image.
        """
        if source is None:
            return replace(self, label=None)
        width, height = _png_size(source)  # checked before any pixel is decoded
        if (height, width) != self.size:
            raise ValueError(
                f"The label is {height} x {width} pixels (height x width) and the image {format_size(self.size)}. "
                "Both must have the same size."
            )
        try:
            label = read_label(source)
        except ValueError as error:
            raise ValueError(str(error).replace(str(source), "The label")) from error
        if label.max() > 255:
            raise ValueError(f"Expected class ids of 0 to 255 in the label, but got {label.max()}.")
        label = label.astype(np.uint8)
        if num_classes == 2 and set(np.unique(label)) == {0, 255}:
            label //= 255
        return replace(self, label=label)

    def with_predictions(self, models: Sequence[ServedModel]) -> Scene:
        """Return the scene with the predictions of these networks. Only networks without a prediction are run."""
        missing = [model for model in models if model.name not in self.predictions]
        if not missing:
            return self
        image, predictions = self.image, dict(self.predictions)
        for model in missing:
            prediction = model.predictor(image, confidence=model.predictor.has_probabilities)
            predictions[model.name] = CachedPrediction.from_prediction(prediction)
        return replace(self, predictions=predictions)

    @property
    def image(self) -> np.ndarray:
        """Image in its own size, (H, W, channels)."""
        return read_pixels(self.content, self.pixels)

    @property
    def picture(self) -> np.ndarray:
        """Picture of the image in its own size, uint8 (H, W, 3) RGB."""
        return self.pixels.picture(self.image)

    def overlay(self, model: str | None, alpha: float, width: int) -> np.ndarray:
        """Draw the mask of a network over the image in the size of the page; None returns the image alone."""
        if model is None:
            return self.page_image
        prediction = self.predictions[model]
        return _draw(self.page_image, prediction.page_mask, prediction.palette, alpha, width)

    def boundaries(self, model: str | None, width: int) -> np.ndarray:
        """Draw the class boundaries of a network on the dimmed image; None returns the image alone."""
        if model is None:
            return self.page_image
        dimmed, prediction = cv2.convertScaleAbs(self.page_image, alpha=0.55), self.predictions[model]
        return _draw(np.asarray(dimmed), prediction.page_mask, prediction.palette, 0, max(width, 1), _BOUNDARY_COLOR)

    def full_size_overlay(self, model: str, alpha: float, width: int) -> np.ndarray:
        """Draw the mask of a network over the image in the size of the image."""
        prediction = self.predictions[model]
        return draw_full_size(self.picture, prediction.mask, prediction.palette, alpha, width)

    def agreement(self, teacher: str, student: str) -> MaskAgreement:
        """Return the shares of pixels in which two networks agree, in the size of the image."""
        return mask_agreement(*([self.predictions[name].mask] for name in (student, teacher)))

    def difference(self, teacher: str, student: str) -> tuple[np.ndarray, Difference]:
        """Draw the pixels where two networks differ, in the size of the page, and return the shares of these pixels."""
        masks = self.predictions[teacher].mask, self.predictions[student].mask
        picture, difference = draw_difference(self.picture, *masks, label=self.label)
        return resize_to_page(picture), difference

    def errors(self, model: str | None) -> np.ndarray:
        """Draw the pixels where a network differs from the label; None returns the image alone.

        Raises:
            ValueError: If the scene has no label.
        """
        if model is None:
            return self.page_image
        if self.label is None:
            raise ValueError("This scene has no label. Call with_label() first.")
        return resize_to_page(draw_difference(self.picture, self.label, self.predictions[model].mask)[0])


def _png_size(source: Path) -> tuple[int, int]:
    """Return width and height of an untrusted PNG file without decoding its pixels."""
    try:
        with Image.open(source, formats=("PNG",)) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise ValueError("The label is not a PNG file.") from error
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"The label cannot be read: {error}") from error


def draw_full_size(
    image: np.ndarray, mask: np.ndarray, palette: Sequence[Color], alpha: float, width: int
) -> np.ndarray:
    """Draw an overlay in the size of the image, whose lines have the same width relative to the image as on the page.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: Class ids, integers (H, W).
        palette: RGB colour (0..255) of each class.
        alpha: Opacity of the colours, 0..1.
        width: Width of boundaries in pixels of the page; 0 for none.
    """
    scale = _page_scale(image)
    return _draw(image, mask, palette, alpha, max(1, round(width / scale)) if width else 0)


def _draw(
    image: np.ndarray,
    mask: np.ndarray,
    palette: Sequence[Color],
    alpha: float,
    width: int,
    color: Color = (255, 255, 255),
) -> np.ndarray:
    return draw_overlay(
        image,
        mask,
        palette,
        alpha=alpha,
        boundaries=width > 0,
        boundary_width=max(width, 1),
        boundary_color=color,
        ignore_index=-1,  # masks of networks contain no void, and 255 may be a class
    )


def resize_to_page(picture: np.ndarray, interpolation: int = cv2.INTER_CUBIC) -> np.ndarray:
    """Resize a picture or a mask to the size of the page.

    Masks are resized by `resize_label`, so that they stay aligned with the picture. It differs from OpenCV only where
    two pixels are equally near.

    Args:
        picture: Picture (H, W, 3) or mask (H, W).
        interpolation: OpenCV's interpolation for enlarged pictures. cv2.INTER_NEAREST and cv2.INTER_NEAREST_EXACT
            both select `resize_label`, for masks.
    """
    scale = _page_scale(picture)
    if scale == 1:
        return picture
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    if interpolation in (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT):
        return resize_label(picture, (height, width))
    interpolation = cv2.INTER_AREA if scale < 1 else interpolation
    return np.asarray(cv2.resize(picture, (width, height), interpolation=interpolation))


def _page_scale(picture: np.ndarray) -> float:
    longer: int = max(picture.shape[:2])
    return PAGE_SIDE / longer if longer > PAGE_SIDE else PAGE_SIDE // longer
