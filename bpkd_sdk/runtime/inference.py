"""Windows that slide over images of any size, logits in bands of rows, and masks; of numpy arrays or torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, product

import numpy as np
from array_api_compat import device

from bpkd_sdk.arrays import Array, array_namespace, class_ids, lerp, resize_bilinear
from bpkd_sdk.classes import check_mask_classes
from bpkd_sdk.errors import warn


def sliding_bands(
    logits_of: Callable[[Array], Array],
    images: Array,
    crop_size: tuple[int, int],
    stride: tuple[int, int] | None,
    batch_size: int = 1,
) -> Iterator[Array]:
    """Average logits over overlapping windows, and yield them in bands of rows from top to bottom.

    Windows start at multiples of the stride. The last window of a row or column is shifted back into the image; if the
    image is smaller than the window, the window is the image. A band is yielded as soon as no further window overlaps
    it. So memory holds only a few bands of a window's height and one batch of windows, for images of any height.

    Args:
        logits_of: Function from the images of some windows to their logits, (n, C, h, w) at the windows' size.
        images: (N, channels, H, W).
        crop_size: (height, width) of the window.
        stride: (vertical, horizontal) step in pixels; None: two thirds of the window.
        batch_size: Largest number of windows per batch.

    Yields:
        (N, C, rows, W) float32; the sum of the rows of all bands is H.
    """
    stride = stride or _two_thirds(crop_size)
    height, width = images.shape[2:]
    window_height, window_width = min(crop_size[0], height), min(crop_size[1], width)
    tops: list[int] = _window_starts(height, window_height, stride[0])
    lefts = _window_starts(width, window_width, stride[1])
    overlaps = _count_windows(height, window_height, tops)[:, None] * _count_windows(width, window_width, lefts)
    windows = list(product(lefts, range(len(images))))
    carried: Array | None = None
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        row = images[:, :, top : top + window_height]
        band: Array | None = None
        for batch in (windows[i : i + batch_size] for i in range(0, len(windows), batch_size)):
            parts = [row[index, :, :, left : left + window_width] for left, index in batch]
            logits = logits_of(array_namespace(row).stack(parts))
            xp = array_namespace(logits)
            if band is None:
                shape = (len(images), logits.shape[1], window_height, width)
                band = xp.zeros(shape, dtype=logits.dtype, device=device(logits))
            for (left, index), window in zip(batch, logits, strict=True):
                band[index, :, :, left : left + window_width] += window
        assert band is not None  # noqa: S101  (an image has at least one window)
        if carried is not None:
            band[:, :, : carried.shape[2]] += carried
        done = following - top
        carried = xp.asarray(band[:, :, done:], copy=True)
        finished = band[:, :, :done]
        finished /= xp.asarray(overlaps[top:following], device=device(band))
        yield finished


def resized_bands(bands: Iterable[Array], height: int, size: tuple[int, int]) -> Iterator[Array]:
    """Resize images that come in bands of rows, bilinearly (align_corners False), without joining the bands.

    Args:
        bands: (N, C, rows, W) from top to bottom.
        height: Number of rows of all bands together.
        size: (height, width) to resize to.

    Yields:
        (N, C, rows, width), as soon as all bands that the rows depend on have come.
    """
    positions = np.clip((np.arange(size[0]) + 0.5) * (height / size[0]) - 0.5, 0, height - 1)
    above = positions.astype(np.int64)
    below = np.minimum(above + 1, height - 1)
    shares = (positions - above).astype(np.float32)
    buffer: Array | None = None  # rows from `first` on, already of the new width
    first = done = 0
    for band in bands:
        xp, place = array_namespace(band), device(band)
        wide = resize_bilinear(band, (band.shape[2], size[1]))
        buffer = wide if buffer is None else xp.concat([buffer, wide], axis=2)
        end = first + buffer.shape[2]
        ready = int((below < end).sum())
        if ready > done:
            upper, lower = (
                xp.take(buffer, xp.asarray(rows[done:ready] - first, device=place), axis=2) for rows in (above, below)
            )
            yield lerp(upper, lower, xp.asarray(shares[done:ready, None], device=place))
            done = ready
        needed = min(end, int(above[done])) if done < size[0] else end
        buffer, first = xp.asarray(buffer[:, :, needed - first :], copy=True), needed


def sliding_masks(
    masks_of: Callable[[Array], Array],
    images: Array,
    crop_size: tuple[int, int],
    stride: tuple[int, int] | None,
    batch_size: int = 1,
) -> Array:
    """Compute masks from overlapping windows: each pixel comes from the window whose centre is nearest.

    Args:
        masks_of: Function from the images of some windows to their masks, (n, h, w).
        images: (N, channels, H, W).
        crop_size: (height, width) of the window.
        stride: (vertical, horizontal) step in pixels; None: two thirds of the window.
        batch_size: Largest number of windows per batch.

    Returns:
        (N, H, W) of the masks' type.
    """
    stride = stride or _two_thirds(crop_size)
    height, width = crop_size
    shares = [_window_shares(*sizes) for sizes in zip(images.shape[2:], crop_size, stride, strict=True)]
    windows = [
        (index, top, rows, left, columns)
        for (top, rows), (left, columns) in product(*shares)
        for index in range(len(images))
    ]
    result: Array | None = None
    for batch in (windows[i : i + batch_size] for i in range(0, len(windows), batch_size)):
        parts = [images[i, :, top : top + height, left : left + width] for i, top, _, left, _ in batch]
        masks = masks_of(array_namespace(images).stack(parts))
        if result is None:
            shape = (len(images), *images.shape[2:])
            result = array_namespace(masks).zeros(shape, dtype=masks.dtype, device=device(masks))
        for (index, top, rows, left, columns), mask in zip(batch, masks, strict=True):
            result[index, rows, columns] = mask[
                rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
            ]
    assert result is not None  # noqa: S101  (an image has at least one window)
    return result


def window_corners(
    size: tuple[int, int], crop_size: tuple[int, int], stride: tuple[int, int] | None = None
) -> list[tuple[int, int]]:
    """Return (top, left) of each window over an image of a size, as `sliding_bands` and `sliding_masks` place them.

    Examples:
        >>> window_corners((4, 9), (6, 6))
        [(0, 0), (0, 3)]
    """
    tops, lefts = map(_window_starts, size, crop_size, stride or _two_thirds(crop_size))
    return list(product(tops, lefts))


def _window_shares(length: int, window: int, stride: int) -> list[tuple[int, slice]]:
    """Return the start of each window along one axis, and the part of the axis that is taken from it."""
    starts = _window_starts(length, window, stride)
    cuts = [0, *((first + window + second) // 2 for first, second in pairwise(starts)), length]
    return [(start, slice(*cut)) for start, cut in zip(starts, pairwise(cuts), strict=True)]


def _two_thirds(crop_size: tuple[int, int]) -> tuple[int, int]:
    return max(1, crop_size[0] * 2 // 3), max(1, crop_size[1] * 2 // 3)


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    count = max(-(-(length - window) // stride), 0) + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def _count_windows(length: int, window: int, starts: list[int]) -> np.ndarray:
    """Return the number of windows that overlap each position of an axis, float32 (length,)."""
    counts = np.zeros(length, np.float32)
    for start in starts:
        counts[start : start + window] += 1
    return counts


def check_logits(logits: Array, name: str) -> None:
    """Warn about logits that are not finite, and about a single channel that is never below 0.

    Args:
        logits: (N, C, H, W).
        name: Name of the network in the warning.
    """
    xp = array_namespace(logits)
    if not xp.all(xp.isfinite(logits)):
        warn(
            f"The logits of {name} are not finite (NaN or infinity), so its masks have no meaning. Check its weights "
            "and normalisation."
        )
    if logits.shape[1] == 1 and logits.min() >= 0 and logits.max() <= 1:
        warn(
            f"The one channel of {name} lies in 0..1, so every pixel gets its class: the class is where the channel is "
            "above 0. If the network ends with a sigmoid, return the logit before it."
        )


def to_mask(logits: Array) -> Array:
    """Turn logits (N, C, H, W) into class ids (N, H, W) uint8: the largest logit, or for one channel, logit > 0.

    Raises:
        ValueError: If there are more classes than a uint8 mask can hold.
    """
    check_mask_classes(logits.shape[1])
    return class_ids(logits)
