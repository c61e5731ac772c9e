"""From an image of any kind and size to a mask of the same size, whatever runs the network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor, nn

from bpkd_sdk.classes import MOST_CLASSES, check_mask_classes
from bpkd_sdk.images import ImageSource, read_image
from bpkd_sdk.models.spec import Color, NetworkSpec, distinct_colors
from bpkd_sdk.runtime import Runtime, open_runtime
from bpkd_sdk.runtime.base import Range
from bpkd_sdk.runtime.inference import sliding_bands, sliding_masks, to_mask


@dataclass(frozen=True)
class Timings:
    """Milliseconds for one image; of a batch each image has its share.

    Attributes:
        pre: Reading, checking, resizing, moving to the device.
        inference: The network.
        post: From what it returned to the mask on the host.
    """

    pre: float
    inference: float
    post: float

    @property
    def total(self) -> float:
        """All three."""
        return self.pre + self.inference + self.post


@dataclass(frozen=True)
class Prediction:
    """What a `Predictor` makes of one image.

    Attributes:
        mask: uint8 (H, W), class ids, at the image's own size.
        class_names: One per class.
        palette: One RGB colour (0..255) per class.
        timings: Where the time went.
        confidence: float32 (H, W), the probability (0..1) of the class in the mask; None unless asked for.
        entropy: float32 (H, W), of the probabilities of all classes: 0 where one is certain, 1 where all are alike;
            None unless asked for.
    """

    mask: np.ndarray
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    timings: Timings
    confidence: np.ndarray | None = None
    entropy: np.ndarray | None = None

    @property
    def latency_ms(self) -> float:
        """From image to mask."""
        return self.timings.total


def names_and_colors(spec: NetworkSpec) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Names and colours of the ids in the masks."""
    check_mask_classes(spec.num_classes)
    ids = max(spec.num_classes, 2) if spec.num_classes else MOST_CLASSES
    names, palette = spec.class_names, spec.palette
    if spec.num_classes == 1:
        names = ("background", *names) if len(names) == 1 else names
        palette = ((0, 0, 0), *palette) if len(palette) == 1 else palette
    return names or tuple(str(index) for index in range(ids)), palette or distinct_colors(ids)


class Clock:
    """Adds up the time in each stage; what is neither pre nor inference is post."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.spent = {"pre": 0.0, "inference": 0.0}

    @contextmanager
    def stage(self, name: Literal["pre", "inference"]) -> Iterator[None]:
        """Count what happens inside to this stage."""
        start = time.perf_counter()
        yield
        self.spent[name] += time.perf_counter() - start

    def stop(self, images: int, reading: float) -> Timings:
        """Milliseconds an image; `reading` is the time to read one."""
        total = 1000 * (time.perf_counter() - self.start) / images
        pre, inference = (1000 * spent / images for spent in self.spent.values())
        return Timings(reading + pre, inference, total - pre - inference)


Images: TypeAlias = list[ImageSource] | tuple[ImageSource, ...]

TOGETHER = 2048 * 2048  # most pixels that go through a network of any size at once
WINDOW = 1024  # side of the window over larger images, in pixels
BATCH = 8  # most images at once
_THINNEST = 32  # what a side counts for at least: networks pad thinner images to about this


class Predictor:
    """Segments images. Calls from several threads at once are safe.

    Over an image of a size that the network does not take, or of more than 2048x2048 pixels, a window slides.

    Args:
        model: A path or URL of one of the `bpkd_sdk.runtime.FORMATS` (checkpoint, ONNX file, engine, Triton server), a
            module in eval mode (it is moved to the device), or a runtime.
        device: "auto" (a CUDA GPU if there is one, otherwise the CPU), "cpu", "cuda", "cuda:1", "mps".

    Attributes:
        runtime: What runs the network.
        class_names: One per class; numbers where the network does not say. A network of one class has two: what is
            not of the class comes first, as in its masks.
        palette: One RGB colour (0..255) per class.

    Raises:
        ValueError: For a module in training mode, or a network of more than 256 classes.
        FileNotFoundError, ImportError, RuntimeError: As `bpkd_sdk.runtime.open_runtime`.
    """

    def __init__(self, model: str | Path | nn.Module | Runtime, device: str | torch.device = "auto") -> None:
        if isinstance(model, nn.Module) and any(part.training for part in model.modules()):
            raise ValueError("The network is in training mode. Call model.eval() first.")
        self.runtime = open_runtime(model, device)
        self.class_names, self.palette = names_and_colors(self.runtime.spec)

    @property
    def has_probabilities(self) -> bool:
        """Whether confidence and entropy can be asked for; an artifact that returns masks has none."""
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
        """Segment one image, a batch, or a stream.

        Args:
            image: One image as `bpkd_sdk.images.read_image` takes it; a list or tuple of them, or an array
                (N, H, W, 3), for a list of predictions; or an iterator of them (a video), for an iterator that makes
                each prediction when it is asked for.
            confidence: Also the probability of the class, for every pixel.
            entropy: Also the entropy of the probabilities, for every pixel.

        Raises:
            ValueError: For what is no image, or if probabilities are asked of an artifact that returns masks.
        """
        if (confidence or entropy) and not self.has_probabilities:
            raise ValueError(
                f"{self.runtime.name} returns masks, so it has neither confidence nor entropy. "
                "Use the checkpoint, or export it with argmax=False."
            )
        if isinstance(image, Iterator):
            return (self._predict([frame], confidence, entropy)[0] for frame in image)
        if isinstance(image, np.ndarray) and image.ndim == 4:
            image = list(image)
        if isinstance(image, (list, tuple)):
            return self._predict(image, confidence, entropy)
        return self._predict([image], confidence, entropy)[0]

    def _predict(self, sources: Images, confidence: bool, entropy: bool) -> list[Prediction]:
        predictions: list[Prediction] = []
        start = time.perf_counter()
        images = [read_image(source) for source in sources]
        reading = 1000 * (time.perf_counter() - start) / max(len(images), 1)
        for (height, width, _), group in groupby(images, key=lambda image: image.shape):
            alike, most = list(group), self._together(height, width)
            for first in range(0, len(alike), most):
                batch = np.stack(alike[first : first + most])
                predictions += self._predict_batch(batch, reading, confidence, entropy)
        return predictions

    def _together(self, height: int, width: int) -> int:
        """How many images of one size go through the network at once."""
        most = self.runtime.accepts.batch[1] or BATCH
        return max(1, min(BATCH, most, TOGETHER // _pixels(height, width)))

    def _predict_batch(self, images: np.ndarray, reading: float, confidence: bool, entropy: bool) -> list[Prediction]:
        """uint8 (N, H, W, 3) -> one prediction for each."""
        clock = Clock()
        bands = [_on_host(band, confidence, entropy) for band in self._outputs(images, clock)]
        masks, certain, unsure = (
            None if parts[0] is None else np.concatenate(parts, axis=1) for parts in zip(*bands, strict=True)
        )
        assert masks is not None  # noqa: S101  (only the other two may be left out)
        timings = clock.stop(len(images), reading)
        return [
            Prediction(
                mask,
                self.class_names,
                self.palette,
                timings,
                None if certain is None else certain[index],
                None if unsure is None else unsure[index],
            )
            for index, mask in enumerate(masks)
        ]

    def _outputs(self, images: np.ndarray, clock: Clock) -> Iterator[Tensor]:
        """Logits (N, C, h, W) or masks (N, h, W), whichever the artifact returns, in bands from top to bottom."""
        height, width = images.shape[1:3]
        accepts = self.runtime.accepts
        if accepts.takes_size(height, width) and _pixels(height, width) <= TOGETHER:
            yield self._run(torch.from_numpy(images), clock)
        else:
            yield from self._slide(images, (_window(height, accepts.height), _window(width, accepts.width)), clock)

    def _slide(self, images: np.ndarray, window: tuple[int, int], clock: Clock) -> Iterator[Tensor]:
        height, width = images.shape[1:3]
        below, beside = max(window[0] - height, 0), max(window[1] - width, 0)
        with clock.stage("pre"):
            padded = np.pad(images, ((0, 0), (0, below), (0, beside), (0, 0)), mode="edge")
        inputs = torch.from_numpy(padded).permute(0, 3, 1, 2)

        def outputs_of(part: Tensor) -> Tensor:
            return self._run(part.permute(0, 2, 3, 1), clock)

        if self.has_probabilities:
            bands = sliding_bands(outputs_of, inputs, window, None, self._together(*window))
        else:
            bands = iter([sliding_masks(outputs_of, inputs, window, None)])
        for band in bands:
            yield band[..., :height, :width]

    def _run(self, images: Tensor, clock: Clock) -> Tensor:
        """What the artifact returns for images that it takes, (N, H, W, 3)."""
        with clock.stage("pre"):
            missing = max(self.runtime.accepts.batch[0] - len(images), 0)
            if missing:
                images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
            inputs = self.runtime.prepare(images)
            self.runtime.synchronize()
        with clock.stage("inference"):
            outputs = self.runtime.infer(inputs)
            self.runtime.synchronize()
        return outputs[: len(outputs) - missing]


def _pixels(height: int, width: int) -> int:
    return max(height, _THINNEST) * max(width, _THINNEST)


def _window(side: int, allowed: Range) -> int:
    least, most = allowed
    return max(least, min(side, WINDOW if most is None else most))


def _on_host(
    outputs: Tensor, confidence: bool, entropy: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Masks of logits or masks; of logits confidence and entropy too, as far as they are asked for."""
    if outputs.ndim == 3:
        return outputs.cpu().numpy(), None, None
    certain, unsure = _certainty(outputs) if confidence or entropy else (None, None)
    masks = to_mask(outputs).to(torch.uint8).cpu().numpy()
    return masks, certain if confidence else None, unsure if entropy else None


@torch.inference_mode()
def _certainty(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and entropy, each (N, H, W) float32, of logits (N, C, H, W); one class stands against its absence."""
    if logits.shape[1] == 1:
        logits = torch.cat([-logits / 2, logits / 2], 1)
    log_p = logits.float().log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1) / np.log(logits.shape[1])
    return p.amax(1).cpu().numpy(), entropy.clamp(0, 1).cpu().numpy()
