"""Operations on arrays of numpy or torch: functions take both and return the kind that they get.

Algorithms are written once, over the array API (https://data-apis.org/array-api): `array_namespace(x)` has its
functions for the kind of x. This file contains the operations that the array API lacks, or for which each library has a
much faster one. torch is imported only for tensors, which exist only where it is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import array_api_compat
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")
"""A numpy array or a torch tensor."""


def array_namespace(*arrays: Any) -> Any:
    """Return the module with the functions of the array API for these arrays.

    numpy is such a module itself since version 2. array-api-compat would import numpy's rarely used parts too, which
    takes half as long as all other imports of a program that runs an ONNX file.
    """
    if all(isinstance(array, np.ndarray) for array in arrays):
        return np
    return array_api_compat.array_namespace(*arrays)


def to_numpy(array: Any) -> np.ndarray:
    """Return an array or a tensor on any device as an array in host memory; host memory is shared."""
    return array if isinstance(array, np.ndarray) else np.asarray(array.detach().cpu().numpy())


def as_tensor(array: Any) -> Tensor:
    """Return an array or a tensor as a tensor; memory is shared."""
    import torch

    if not isinstance(array, np.ndarray):
        return cast("Tensor", array)
    return torch.from_numpy(np.ascontiguousarray(array))


def to_device(array: Array, name: str) -> Array:
    """Return a tensor on the device of this name; numpy arrays stay in host memory.

    The function waits for a copy to host memory, which would otherwise be read too early. It does not wait for a copy
    to a GPU, because later work on the GPU does.
    """
    return array if isinstance(array, np.ndarray) else array.to(name, non_blocking=name != "cpu")


def contiguous(array: Array) -> Array:
    """Return an array whose memory is in the order of its axes; itself if it is already."""
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array.contiguous()


def per_channel(values: Sequence[float], images: Array, dtype: Any) -> Array:
    """Return one value per channel as an array (1, C, 1, 1) of the kind and on the device of images.

    Args:
        values: C values.
        images: Array that the result is combined with.
        dtype: Data type of the result, from the namespace of `images`.
    """
    if isinstance(images, np.ndarray):
        return np.asarray(values, dtype=dtype).reshape(1, -1, 1, 1)
    return _constant(tuple(values), images, dtype).view(1, -1, 1, 1)


def round_to(values: Array, dtype: Any) -> Array:
    """Return values of floating point as a data type; halves are rounded to even if it is an integer."""
    xp = array_namespace(values)
    is_integer = xp.isdtype(dtype, "integral")
    result: Array = xp.astype(xp.round(values) if is_integer else values, dtype, copy=False)
    return result


def at_least_float32(logits: Array) -> Array:
    """Return logits as float64 if they are float64, otherwise as float32."""
    xp = array_namespace(logits)
    result: Array = xp.astype(logits, xp.result_type(logits.dtype, xp.float32), copy=False)
    return result


def logsumexp(logits: Array, axis: int, *, keepdims: bool = False) -> Array:
    """Return log(sum(exp(logits))) along an axis, without overflow."""
    if not isinstance(logits, np.ndarray):
        return logits.logsumexp(axis, keepdim=keepdims)
    largest = logits.max(axis, keepdims=True)
    result: np.ndarray = largest + np.log(np.exp(logits - largest).sum(axis, keepdims=True))
    return result if keepdims else result.squeeze(axis)


def lerp(start: Array, end: Array, weights: Array) -> Array:
    """Return start + weights * (end - start)."""
    if not isinstance(start, np.ndarray):
        return start.lerp(end, weights)
    result: np.ndarray = end - start
    result *= weights
    result += start
    return result


def select_channels(array: Array, columns: tuple[int, ...]) -> Array:
    """Return the channels (N, len(columns), ...) with these indices from an array (N, C, ...)."""
    if isinstance(array, np.ndarray):
        return array[:, list(columns)]
    return array.index_select(1, _constant(columns, array, None))


def _constant(values: tuple[float, ...], like: Tensor, dtype: Any) -> Tensor:
    """Return values as a tensor on the device of another tensor, kept because each copy would wait for a GPU."""
    import torch

    if type(like) is torch.Tensor:
        return _kept_constant(values, str(like.device), dtype)
    return torch.tensor(values, device=like.device, dtype=dtype)  # while torch.export traces, it belongs to the trace


@lru_cache(maxsize=1024)
def _kept_constant(values: tuple[float, ...], device_name: str, dtype: Any) -> Tensor:
    import torch

    with torch.inference_mode(False):
        return torch.tensor(values, device=device_name, dtype=dtype)


def class_ids(logits: Array) -> Array:
    """Return class ids uint8 (N, H, W) from logits (N, C, H, W) of at most 256 classes.

    The class is the first of the largest logits, or for one channel, 1 where the logit is above 0.
    """
    if not isinstance(logits, np.ndarray):
        return (logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)).byte()
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).astype(np.uint8)
    # numpy's argmax is slow along any axis but the last.
    largest = logits[:, 0].copy()
    ids = np.zeros(largest.shape, np.uint8)
    for channel in range(1, logits.shape[1]):
        np.copyto(ids, channel, where=logits[:, channel] > largest)
        np.maximum(largest, logits[:, channel], out=largest)
    return ids


def take(array: Array, positions: Array, axis: int) -> Array:
    """Return the elements at some positions, (k,) integers of 0 or above, along an axis of 0 or above.

    The function of array-api-compat also accepts negative positions, which takes four operations in torch.
    """
    if isinstance(array, np.ndarray):
        return np.take(array, positions, axis)
    return array.index_select(axis, positions)


def distinct_values(array: Array) -> list[int]:
    """Return the different values of an integer array, in ascending order. An accelerator is waited for.

    They are counted instead of sorted, because there are few different labels.
    """
    xp = array_namespace(array)
    if 0 in array.shape:
        return []
    lowest, highest = int(xp.min(array)), int(xp.max(array))
    if highest - lowest >= 1 << 16:
        return list(np.unique(to_numpy(array)).tolist())
    first = 0
    if lowest < 0 or highest >= 1 << 16:
        first, array = lowest, xp.astype(array, xp.int64) - lowest
    counts = to_numpy(xp.bincount(xp.reshape(array, (-1,))))
    return list((np.flatnonzero(counts) + first).tolist())


def resize_bilinear(maps: Array, size: Sequence[int]) -> Array:
    """Resize maps (N, C, h, w) of floating point bilinearly about pixel centres (align_corners False).

    Args:
        maps: Logits or feature maps; of numpy float32.
        size: (H, W) of the result.

    Returns:
        (N, C, H, W) of the same type. Both libraries compute positions in float32, so that results for N pixels differ
        by up to about N times 1e-7 of the difference between neighbours.
    """
    if not isinstance(maps, np.ndarray):
        import torch.nn.functional as F

        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
    import cv2

    height, width = size
    resized = np.empty((*maps.shape[:2], height, width), maps.dtype)
    for index in np.ndindex(*maps.shape[:2]):
        cv2.resize(maps[index], (width, height), dst=resized[index], interpolation=cv2.INTER_LINEAR)
    return resized


def resize_antialiased(images: Array, size: Sequence[int]) -> Array:
    """Resize images bilinearly about pixel centres, with antialiasing (a wider triangle) where they shrink.

    Pillow resizes all images in host memory, so that numpy arrays and tensors have the same values. On other devices
    torch does it, whose kernel is a port of Pillow's with equal values up to rounding.

    Args:
        images: (N, C, H, W) of any number type.
        size: (h, w) of the result.

    Returns:
        (N, C, h, w) float32.
    """
    if not isinstance(images, np.ndarray):
        if images.device.type == "cpu":
            pixels = images.detach().float() if images.is_floating_point() else images
            return as_tensor(resize_antialiased(pixels.numpy(), size))
        import torch.nn.functional as F

        return F.interpolate(images.float(), size=tuple(size), mode="bilinear", align_corners=False, antialias=True)
    from PIL import Image

    height, width = size
    resized = np.empty((*images.shape[:2], height, width), np.float32)
    for index in np.ndindex(*images.shape[:2]):
        plane = Image.fromarray(np.ascontiguousarray(images[index], np.float32))
        resized[index] = plane.resize((width, height), Image.Resampling.BILINEAR)
    return resized
