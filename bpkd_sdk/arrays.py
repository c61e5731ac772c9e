"""Arrays of numpy or torch: functions take both and return the kind that they get.

Algorithms are written once, over the namespace of the array API (`array_api_compat.array_namespace`). This file has the
few operations that the array API lacks. It imports torch only for tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from array_api_compat import array_namespace, device

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")
"""A numpy array or a torch tensor."""


def per_channel(values: Sequence[float], images: Array, dtype: Any) -> Array:
    """Return one value per channel as an array (1, C, 1, 1) of the kind and on the device of images.

    Args:
        values: C values.
        images: Array that the result is combined with.
        dtype: Data type of the result, from the namespace of `images`.
    """
    xp = array_namespace(images)
    result: Array = xp.reshape(xp.asarray(values, dtype=dtype, device=device(images)), (1, -1, 1, 1))
    return result


def round_to(values: Array, dtype: Any) -> Array:
    """Return values of floating point as a data type; halves are rounded to even if it is an integer."""
    xp = array_namespace(values)
    is_integer = xp.isdtype(dtype, "integral")
    result: Array = xp.astype(xp.round(values) if is_integer else values, dtype)
    return result
