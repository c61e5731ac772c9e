"""Images of any size for an artifact that accepts certain sizes only: the rule `fit`.

An artifact gets an image at the image's own size if it accepts that size. Otherwise `fit` determines what it gets:

    slide    Windows of an accepted size, which overlap, at the image's own scale. A smaller image is padded. Logits are
             averaged where windows overlap; of masks, each pixel comes from the window whose centre is nearest.
    resize   The image, resized to an accepted size; without its aspect ratio if the artifact accepts one size only.
    pad      The image with its aspect ratio, shrunk until it fits into an accepted size, and then padded.

All three are one sequence with other sizes: the image is resized to `FittedSize.inner`, padded at the right and bottom
with the network's mean colour to at least `FittedSize.window`, and covered with windows. The outputs are cropped to
`inner` and resized to the image's size: logits bilinearly, masks by `resize_label`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args
from weakref import WeakSet

from bpkd_sdk.arrays import Array, array_namespace, per_channel
from bpkd_sdk.errors import check_choice, warn
from bpkd_sdk.runtime.base import AcceptedImages, Range, Runtime
from bpkd_sdk.runtime.inference import resized_bands, sliding_bands, sliding_masks, window_corners
from bpkd_sdk.sizes import Size, format_size, resize_images, resize_label, scaled_size
from bpkd_sdk.spec import NetworkSpec

Fit = Literal["slide", "resize", "pad"]

MAX_PIXELS = 2048 * 2048  # pixels that a network of any size gets at once
WINDOW_SIDE = 1024  # side in pixels of the windows over a larger image
MAX_BATCH = 8  # images in a batch
MANY_WINDOWS = 4  # a warning reports more windows for one image
BAND_ROWS = 64  # rows of a whole image's logits that are resized at once
_MIN_SIDE = 32  # a shorter side counts as this many pixels, because networks pad images to about this size

_reported: WeakSet[Runtime] = WeakSet()  # runtimes for which a warning was given


def check_fit(fit: str) -> None:
    """Raise ValueError unless `fit` is one of the rules."""
    check_choice("fit", fit, get_args(Fit))


@dataclass(frozen=True)
class FittedSize:
    """The sizes by which images are given to an artifact; each is (height, width).

    Attributes:
        inner: Size that the images are resized to.
        window: Size of what the artifact gets: the image, padded if it is smaller, or a window that slides over it.
    """

    inner: Size
    window: Size

    def corners(self, stride: Size | None = None) -> list[tuple[int, int]]:
        """Return (top, left) of each window.

        Args:
            stride: (vertical, horizontal) step in pixels; None: two thirds of the window.
        """
        return window_corners(self.inner, self.window, stride)


def fit_size(size: Size, accepts: AcceptedImages, fit: Fit = "slide", crop_size: Size | None = None) -> FittedSize:
    """Return the sizes by which images of one size are given to an artifact.

    Args:
        size: (height, width) of the images.
        accepts: Images that the artifact accepts.
        fit: Rule for images that the artifact does not get at their own size.
        crop_size: (height, width) of what the artifact gets; a window that slides is cut to a smaller image, if the
            artifact accepts that. None: an image keeps its size if the artifact accepts it. If the artifact accepts
            any size, an image of more than `MAX_PIXELS` gets windows of `WINDOW_SIDE`, or is shrunk to `MAX_PIXELS`.

    Examples:
        >>> accepts = AcceptedImages(height=(512, 512), width=(1024, 1024))
        >>> fit_size((3000, 4000), accepts, "pad")
        FittedSize(inner=(512, 683), window=(512, 1024))
        >>> len(fit_size((3000, 4000), accepts, "slide").corners())
        54
    """
    ranges: Sequence[Range] = (accepts.height, accepts.width)
    is_bounded = crop_size is not None or all(most is not None for _, most in ranges)
    if crop_size is None and accepts.takes_size(*size) and (is_bounded or count_pixels(size) <= MAX_PIXELS):
        return FittedSize(size, size)
    if fit == "slide":
        largest = crop_size or [most or WINDOW_SIDE for _, most in ranges]
        return FittedSize(size, _clamp(size, [(least, most) for (least, _), most in zip(ranges, largest, strict=True)]))
    if crop_size is not None:
        ranges = [(side, side) for side in crop_size]
    factors = [most / side for side, (_, most) in zip(size, ranges, strict=True) if most is not None]
    factors += [] if is_bounded else [math.sqrt(MAX_PIXELS / math.prod(size))]
    inner = scaled_size(size, min(1.0, *factors))
    window = _clamp(inner, ranges)
    return FittedSize(window if fit == "resize" else inner, window)


def _clamp(size: Size, ranges: Sequence[Range]) -> Size:
    height, width = (
        max(least, side if most is None else min(side, most)) for side, (least, most) in zip(size, ranges, strict=True)
    )
    return height, width


def count_pixels(size: Size) -> int:
    """Return the number of pixels that a network computes for an image of this size."""
    return max(size[0], _MIN_SIDE) * max(size[1], _MIN_SIDE)


def largest_batch(accepts: AcceptedImages, size: Size) -> int:
    """Return the number of images or windows of one size that are run together, at most `MAX_BATCH`."""
    return max(1, min(MAX_BATCH, accepts.batch_sizes[1] or MAX_BATCH, MAX_PIXELS // count_pixels(size)))


def fit_images(images: Array, fitted: FittedSize, spec: NetworkSpec) -> Array:
    """Resize images to `fitted.inner`, and pad them at the right and bottom to at least `fitted.window`.

    Args:
        images: (N, C, H, W) in the range of the network's images.
        fitted: Result of `fit_size` for their size.
        spec: Facts of the network. Its mean colour is the padding, which is therefore 0 after normalisation.
    """
    images = resize_images(images, fitted.inner)
    height, width = (max(sides) for sides in zip(fitted.inner, fitted.window, strict=True))
    if tuple(images.shape[2:]) == (height, width):
        return images
    fill = per_channel(spec.mean_pixel, images, images.dtype)
    padded: Array = array_namespace(images).tile(fill, (len(images), 1, height, width))
    padded[:, :, : fitted.inner[0], : fitted.inner[1]] = images
    return padded


class StageTimer:
    """A timer that adds up the time of each stage. Time outside of "pre" and "inference" counts as "post"."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds = {"pre": 0.0, "inference": 0.0}

    @contextmanager
    def stage(self, name: Literal["pre", "inference"]) -> Iterator[None]:
        """Add the time inside the context to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def stop(self) -> tuple[float, float, float]:
        """Return the seconds of the stages before, in and after the network."""
        total = time.perf_counter() - self.start
        pre, inference = self.seconds.values()
        return pre, inference, total - pre - inference


def fitted_bands(
    runtime: Runtime,
    images: Array,
    fit: Fit = "slide",
    *,
    crop_size: Size | None = None,
    stride: Size | None = None,
    batch_size: int | None = None,
    timer: StageTimer | None = None,
) -> Iterator[Array]:
    """Run a runtime on images of any size, and yield its outputs at that size in bands of rows, from top to bottom.

    Args:
        runtime: Runtime to run.
        images: Images of one size, (N, channels, H, W), in the range of the network's images; a numpy array or a torch
            tensor.
        fit: Rule for images that the runtime does not get at their own size.
        crop_size: (height, width) of what the runtime gets, as for `fit_size`; None: what it accepts.
        stride: (vertical, horizontal) step of windows in pixels; None: two thirds of the window.
        batch_size: Largest number of images or windows per forward pass; None: all images, and windows as
            `largest_batch` states.
        timer: Timer of the stages; each stage then waits for the device.

    Yields:
        Logits (N, C, rows, W), or masks (N, rows, W) if the runtime returns masks, as the stages of the runtime return
        them: a module returns tensors for numpy arrays too.

    Raises:
        ValueError: If the runtime does not accept `crop_size`.
    """
    size = (images.shape[2], images.shape[3])
    if crop_size is not None and not runtime.accepts.takes_size(*crop_size):
        raise ValueError(
            f"Expected `crop_size` to be a size that {runtime.name} accepts, {runtime.accepts.describe_size()} (height "
            f"x width), but got {format_size(crop_size)}. Leave it out: the size is then that of the file."
        )
    fitted = fit_size(size, runtime.accepts, fit, crop_size)
    if crop_size is None:
        _report(runtime, size, fitted)
    with timer.stage("pre") if timer else nullcontext():
        inputs = fit_images(images, fitted, runtime.spec)
    is_whole = tuple(inputs.shape[2:]) == fitted.window
    wanted = batch_size or (len(images) if is_whole else largest_batch(runtime.accepts, fitted.window))
    batch_size = min(wanted, runtime.accepts.batch_sizes[1] or wanted)

    def run(part: Array) -> Array:
        return _run(runtime, part, timer)

    bands: Iterator[Array]
    height, width = fitted.inner
    if is_whole:
        batches = [run(inputs[first : first + batch_size]) for first in range(0, len(inputs), batch_size)]
        outputs = join(batches, axis=0)[..., :height, :width]
        rows = height if outputs.ndim == 3 or fitted.inner == size else BAND_ROWS
        bands = (outputs[..., top : top + rows, :] for top in range(0, height, rows))
    elif runtime.metadata["argmax"]:
        bands = iter([sliding_masks(run, inputs, fitted.window, stride, batch_size)[:, :height, :width]])
    else:  # a side that was padded has one window, so that no band lies in the padding
        windows = sliding_bands(run, inputs, fitted.window, stride, batch_size)
        bands = (band[..., :height, :width] for band in windows)
    yield from resize_outputs(runtime, bands, fitted.inner, size)


def _run(runtime: Runtime, images: Array, timer: StageTimer | None) -> Array:
    """Return the outputs of a runtime for images (N, channels, H, W), repeated if it requires more of them."""
    missing: int = max(runtime.accepts.batch_sizes[0] - len(images), 0)
    with timer.stage("pre") if timer else nullcontext():
        xp = array_namespace(images)
        if missing:
            images = xp.concat([images, *[images[-1:]] * missing])
        inputs = runtime.prepare(xp.permute_dims(images, (0, 2, 3, 1)))
        if timer:
            runtime.synchronize()
    with timer.stage("inference") if timer else nullcontext():
        outputs = runtime.infer(inputs)
        if timer:
            runtime.synchronize()
    kept: Array = outputs[: len(outputs) - missing]
    return kept


def resize_outputs(runtime: Runtime, bands: Iterator[Array], before: Size, after: Size) -> Iterator[Array]:
    """Resize the outputs of a runtime: logits bilinearly, masks by `resize_label`.

    Args:
        runtime: Runtime that computed the outputs.
        bands: Logits (N, C, rows, w) or masks (N, rows, w), from top to bottom.
        before: (h, w) of all bands together.
        after: (height, width) of the result.
    """
    if before == after:
        return bands
    if runtime.metadata["argmax"]:
        return iter([resize_label(join(list(bands), axis=1), after)])
    return resized_bands(bands, before[0], after)


def fitted_masks(runtime: Runtime, images: Array, fit: Fit = "slide", *, timer: StageTimer | None = None) -> Array:
    """Return masks (N, H, W) uint8 of images (N, channels, H, W) of any size; arguments as for `fitted_bands`."""
    masks: list[Array] = [runtime.masks(band) for band in fitted_bands(runtime, images, fit, timer=timer)]
    return join(masks, axis=1)


def join(parts: Sequence[Array], axis: int) -> Array:
    """Join arrays along an axis; a single one is not copied."""
    result: Array = parts[0] if len(parts) == 1 else array_namespace(*parts).concat(parts, axis=axis)
    return result


def _report(runtime: Runtime, size: Size, fitted: FittedSize) -> None:
    """Warn once for each runtime about many windows for one image, and about a height and width that are exchanged."""
    count = len(fitted.corners())
    is_turned = fitted.window == size[::-1] and size[0] != size[1]
    if runtime in _reported or (count <= MANY_WINDOWS and not is_turned):
        return
    _reported.add(runtime)
    image, window = format_size(size), format_size(fitted.window)
    if is_turned:
        message = (
            f"{runtime.name} takes images of {window} (height x width), but an image is {image}. If most images are "
            f"like this one, export with input_size={size}."
        )
    else:
        message = (
            f"{runtime.name} runs on {count} windows of {window} for an image of {image}. fit='resize' or fit='pad' "
            "runs it once, on the shrunk image: faster, with less detail."
        )
    warn(message)
