"""Segments images of any format and size with a network in any format, and returns masks of the images' own size."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, overload

import numpy as np
from PIL import Image

from bpkd_sdk.arrays import Array, array_namespace, logsumexp, to_numpy
from bpkd_sdk.classes import names_and_colors, two_class_logits
from bpkd_sdk.images import ImageSource, read_pixels
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.runtime import Runtime, open_runtime
from bpkd_sdk.runtime.fit import Fit, StageTimer, check_fit, fitted_bands, largest_batch
from bpkd_sdk.runtime.inference import check_logits, to_mask
from bpkd_sdk.serve.overlay import draw_overlay, encode_png
from bpkd_sdk.spec import Color

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Timings:
    """Time for one image in milliseconds. The time of a batch is divided equally among its images.

    Attributes:
        pre: Time to read, check and resize the image, and for a network in torch to move it to the device.
        inference: Time of the network, for an ONNX file with the copies to the GPU and back.
        post: Time from the output of the network to the mask in host memory.
    """

    pre: float
    inference: float
    post: float

    @property
    def total(self) -> float:
        """Sum of the three stages in milliseconds."""
        return self.pre + self.inference + self.post


@dataclass(frozen=True)
class Prediction:
    """The result of a `Predictor` for one image.

    Attributes:
        image: Image that was segmented: uint8 (H, W, 3) RGB, or (H, W, channels) in the format of the network. It is
            the array that was passed to the predictor, if that array already had this form; it is not copied.
        mask: Class ids in the size of the image, uint8 (H, W).
        class_names: Name of each class.
        palette: RGB colour (0..255) of each class.
        timings: Time of each stage.
        confidence: Probability (0..1) of the class in the mask, float32 (H, W); None unless requested.
        entropy: Normalised entropy of the class probabilities, float32 (H, W): 0 if one class has probability 1, and 1
            if all classes have the same probability; None unless requested.
        pixels: Format of the image.
    """

    image: np.ndarray = field(repr=False)
    mask: np.ndarray
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    timings: Timings
    confidence: np.ndarray | None = None
    entropy: np.ndarray | None = None
    pixels: PixelFormat = field(default_factory=PixelFormat)

    @cached_property
    def picture(self) -> np.ndarray:
        """Picture of the image, uint8 (H, W, 3) RGB: the image itself, or as `pixels.picture_rule` states."""
        return self.pixels.picture(self.image)

    @property
    def latency_ms(self) -> float:
        """Time from the image to its mask in milliseconds."""
        return self.timings.total

    def overlay(
        self,
        *,
        boundaries: bool = True,
        boundary_width: int = 1,
        boundary_color: Color = (255, 255, 255),
        alpha: float = 0.5,
        legend: bool = False,
    ) -> np.ndarray:
        """Draw the mask over the picture of the image, using `bpkd_sdk.serve.draw_overlay`.

        The mask of a network contains no void, so all ids are drawn, including 255.

        Args:
            boundaries: Whether to draw a line between two classes.
            boundary_width: Width of the lines in pixels, at least 1.
            boundary_color: RGB colour (0..255) of the lines.
            alpha: Opacity of the class colours, 0..1. With 0, the result shows the image alone; with 1, the colours.
            legend: Whether to append a strip below the image with the names of the classes present.

        Returns:
            uint8 (H, W, 3) RGB, a new array. With a legend the height is larger than H, and the first H rows are the
            overlay.

        Raises:
            ValueError: If `alpha` or `boundary_width` is out of range.

        Examples:
            >>> image, mask = np.full((1, 2, 3), 100, np.uint8), np.array([[0, 1]], np.uint8)
            >>> prediction = Prediction(image, mask, ("sky", "road"), ((0, 0, 0), (200, 100, 0)), Timings(1, 2, 1))
            >>> prediction.overlay(boundaries=False)[0].tolist()
            [[102, 102, 102], [150, 100, 50]]
        """
        return draw_overlay(
            self.picture,
            self.mask,
            self.palette,
            class_names=self.class_names,
            boundaries=boundaries,
            boundary_width=boundary_width,
            boundary_color=boundary_color,
            alpha=alpha,
            ignore_index=-1,
            legend=legend,
        )

    def mask_png(self) -> bytes:
        """Return the mask as a PNG file with the palette, whose pixel values are the class ids."""
        image = Image.fromarray(self.mask)
        image.putpalette([channel for color in self.palette for channel in color])
        return encode_png(image)


Images: TypeAlias = list[ImageSource] | tuple[ImageSource, ...]


class Predictor:
    """A predictor of masks. It can be called from several threads at once.

    A network gets whole images where it accepts their size. A file that was exported for one size gets other images by
    the rule `fit`; so does a network of any size if an image has more than 2048x2048 pixels.

    Args:
        source: Path or URL in one of the `bpkd_sdk.runtime.FORMATS` (checkpoint, ONNX file, engine, Triton server), a
            module in eval mode (it is moved to the device), or a runtime.
        device: Device that runs the network: "auto" (a GPU if there is one that the format supports, otherwise the
            CPU), "cpu", "cuda", "cuda:1" or "mps".
        fit: "slide" (overlapping windows at the image's own scale), "resize" (the image resized to the file's size), or
            "pad" (the image shrunk with its aspect ratio, and padded). The last two run the network once for each
            image. See `bpkd_sdk.runtime.fit`.

    Attributes:
        runtime: Runtime of the network.
        fit: Rule for images that the network does not get at their own size.
        class_names: Name of each class id in the masks; its number if the network has no names. A network with one
            class has two ids in its masks: the background and the class.
        palette: RGB colour (0..255) of each class id.

    Raises:
        ValueError: If a module is in training mode, the network has more than 256 classes, the format of the source is
            unknown, or the format does not run on the device.
        FileNotFoundError: If the file does not exist.
        ImportError: If a package that this format needs is not installed.
        RuntimeError: If the network cannot run on this machine. See `bpkd_sdk.runtime.open_runtime`.
    """

    def __init__(
        self, source: str | Path | nn.Module | Runtime, device: str | torch.device = "auto", *, fit: Fit = "slide"
    ) -> None:
        check_fit(fit)
        self.runtime = open_runtime(source, device)
        self.runtime.spec.check_measured()
        self.fit = fit
        self.class_names, self.palette = names_and_colors(self.runtime.spec)
        self._is_checked = False

    @property
    def pixels(self) -> PixelFormat:
        """Format of the images that the network takes."""
        return self.runtime.spec.pixels

    @property
    def has_probabilities(self) -> bool:
        """Whether confidence and entropy can be requested; False for a file that was exported with argmax=True."""
        return not self.runtime.metadata["argmax"]

    @overload
    def __call__(self, image: ImageSource, *, confidence: bool = False, entropy: bool = False) -> Prediction: ...
    @overload
    def __call__(self, image: Images, *, confidence: bool = False, entropy: bool = False) -> list[Prediction]: ...
    @overload
    def __call__(
        self, image: Iterator[ImageSource], *, confidence: bool = False, entropy: bool = False
    ) -> Iterator[Prediction]: ...
    def __call__(
        self,
        image: ImageSource | Images | Iterator[ImageSource],
        *,
        confidence: bool = False,
        entropy: bool = False,
    ) -> Prediction | list[Prediction] | Iterator[Prediction]:
        """Segment one image, a batch or a stream.

        Args:
            image: One image as `bpkd_sdk.images.read_image` takes it, or for a network of other images as
                `bpkd_sdk.images.read_pixels` does; or a list or tuple of images, or an array (N, H, W, channels); or an
                iterator of images, for example the frames of a video.
            confidence: Whether to return the probability of the predicted class for every pixel.
            entropy: Whether to return the entropy of the class probabilities for every pixel.

        Returns:
            One prediction for one image, a list for a batch, and for an iterator an iterator that reads and segments
            each image when its prediction is requested.

        Raises:
            ValueError: If a source is not an image, or if probabilities are requested from a network that returns
                masks.
        """
        if (confidence or entropy) and not self.has_probabilities:
            raise ValueError(
                f"{self.runtime.name} returns masks, so it has neither confidence nor entropy. "
                "Use the checkpoint, or export it with argmax=False."
            )
        if isinstance(image, Iterator):
            # A copy, because readers of videos often fill one array again and again.
            frames = (frame.copy() if isinstance(frame, np.ndarray) else frame for frame in image)
            return (self._predict([frame], confidence, entropy)[0] for frame in frames)
        if isinstance(image, np.ndarray) and image.ndim == 4:
            image = list(image)
        if isinstance(image, (list, tuple)):
            return self._predict(image, confidence, entropy)
        return self._predict([image], confidence, entropy)[0]

    def _predict(self, sources: Images, confidence: bool, entropy: bool) -> list[Prediction]:
        predictions: list[Prediction] = []
        start = time.perf_counter()
        images = [self._read(source) for source in sources]
        reading_ms = 1000 * (time.perf_counter() - start) / max(len(images), 1)
        for (height, width, _), group in groupby(images, key=lambda image: image.shape):
            same_size, batch_size = list(group), largest_batch(self.runtime.accepts, (height, width))
            for first in range(0, len(same_size), batch_size):
                batch = same_size[first : first + batch_size]
                predictions += self._predict_batch(batch, reading_ms, confidence, entropy)
        return predictions

    def _read(self, source: ImageSource) -> np.ndarray:
        pixels = self.pixels
        if pixels.is_rgb8 and isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[2] == 4:
            raise ValueError(
                f"The network takes images of {pixels}, but got an array of 4 channels, {source.shape}. If the fourth "
                "is transparency, pass image[..., :3], or the PIL image, which is shown over white. If all four are "
                "data, use a network that is built for them: create_model(..., in_channels=4)."
            )
        return read_pixels(source, pixels)

    def _predict_batch(
        self, images: list[np.ndarray], reading_ms: float, confidence: bool, entropy: bool
    ) -> list[Prediction]:
        """Segment a batch of images, each (H, W, channels) of the same size."""
        batch, timer = np.stack(images), StageTimer()
        outputs = fitted_bands(self.runtime, batch.transpose(0, 3, 1, 2), self.fit, timer=timer)
        bands = [_to_host(self._checked(band), confidence, entropy) for band in outputs]
        masks = np.concatenate([mask for mask, _, _ in bands], axis=1)
        confidences, entropies = (
            None if parts[0] is None else np.concatenate(parts, axis=1) for parts in list(zip(*bands, strict=True))[1:]
        )
        pre, inference, post = (1000 * seconds / len(images) for seconds in timer.stop())
        timings = Timings(reading_ms + pre, inference, post)
        return [
            Prediction(
                image,
                mask,
                self.class_names,
                self.palette,
                timings,
                None if confidences is None else confidences[index],
                None if entropies is None else entropies[index],
                self.pixels,
            )
            for index, (image, mask) in enumerate(zip(images, masks, strict=True))
        ]

    def _checked(self, outputs: Array) -> Array:
        """Return the outputs of the network; warn if its first logits have no meaning."""
        if self.has_probabilities and not self._is_checked:  # only once, because the check waits for the device
            check_logits(outputs, self.runtime.name)
            self._is_checked = True
        return outputs


def _to_host(
    outputs: Array, confidence: bool, entropy: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return masks, confidence and entropy in host memory.

    Args:
        outputs: Logits (N, C, H, W), or masks (N, H, W), for which confidence and entropy are None.
        confidence: Whether to compute the confidence.
        entropy: Whether to compute the entropy.
    """
    if outputs.ndim == 3:
        return to_numpy(outputs), None, None
    confidences, entropies = _confidence_and_entropy(outputs) if confidence or entropy else (None, None)
    masks = to_numpy(to_mask(outputs))
    return masks, confidences if confidence else None, entropies if entropy else None


def _confidence_and_entropy(logits: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return confidence and entropy, each float32 (N, H, W).

    Args:
        logits: Logits (N, C, H, W). The logit of a network with one class is the log odds of the class
            against the background.
    """
    xp = array_namespace(logits)
    if logits.shape[1] == 1:
        logits = two_class_logits(logits)
    log_p = xp.astype(logits, xp.float32, copy=False)
    log_p = log_p - logsumexp(log_p, 1, keepdims=True)
    p = xp.exp(log_p)
    entropy = -xp.sum(p * log_p, axis=1) / math.log(logits.shape[1])
    return to_numpy(xp.max(p, axis=1)), to_numpy(xp.clip(entropy, 0, 1))
