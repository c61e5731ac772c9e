"""Sizes of images: their check, and the resizing of images and label maps. It imports no torchvision, which is slow."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from array_api_compat import device

from bpkd_sdk.arrays import Array, array_namespace, resize_antialiased, round_to

Size = tuple[int, int]


def check_size(argument: str, value: object) -> Size:
    """Return a size as (height, width), two ints; raise ValueError unless it is two whole numbers of at least 1.

    Args:
        argument: Name of the argument in the message.
        value: Value that was passed.

    Examples:
        >>> check_size("input_size", [512, 1024])
        (512, 1024)
    """
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        height, width = value
        whole = all(isinstance(side, Integral) and not isinstance(side, bool) for side in value)
        if whole and height >= 1 and width >= 1:
            return int(height), int(width)
    is_side = isinstance(value, Integral) and not isinstance(value, bool)
    advice = f" For a square, pass ({value}, {value})." if is_side else ""
    raise ValueError(
        f"Expected `{argument}` to be (height, width), two whole numbers of at least 1, but got {value!r}.{advice}"
    )


def format_size(size: Sequence[int]) -> str:
    """Return a size as "512 x 1024", height first."""
    return " x ".join(map(str, size))


def scaled_size(size: Size, scale: float, base_size: Size | None = None) -> Size:
    """Return the size of a scaled image with the same aspect ratio.

    Args:
        size: (height, width) of the image.
        scale: Factor on `base_size`; without `base_size`, factor on `size`.
        base_size: (longer side, shorter side) of a rectangle that the image is fitted into; OpenMMLab's `img_scale`
            with `keep_ratio`.

    Returns:
        (height, width), each at least 1; halves are rounded up.

    Examples:
        >>> scaled_size((300, 400), 1.0, (2048, 512))
        (512, 683)
        >>> scaled_size((300, 400), 0.5)
        (150, 200)
    """
    factor = scale if base_size is None else scale * min(base_size[0] / max(size), base_size[1] / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def resize_images(images: Array, size: Sequence[int]) -> Array:
    """Resize images bilinearly about pixel centres, with antialiasing where they shrink, as in training.

    Args:
        images: (N, C, H, W) of any number type, a numpy array or a torch tensor.
        size: (h, w) of the result.

    Returns:
        (N, C, h, w) of the same kind and type; integers are rounded. Numpy arrays and tensors have the same values. On
        a GPU, bytes differ by at most 1, and only where a value lies halfway between two up to the rounding of float32.
    """
    return (
        images if tuple(images.shape[2:]) == tuple(size) else round_to(resize_antialiased(images, size), images.dtype)
    )


def resize_label(label: Array, size: Sequence[int], rows: slice = slice(None), columns: slice = slice(None)) -> Array:
    """Resize a label map: each output pixel takes the label pixel whose centre is nearest to its own centre.

    The centre of output row i lies at (i + 0.5) H / h rows of the label, as in bilinear resizing of images. This is the
    rule of torch's "nearest-exact" unless the centre lies exactly between two pixels, which happens everywhere at half
    the size. In this case "nearest-exact" takes the later pixel, which moves all labels by a quarter of an output
    pixel. This function takes the later pixel for even output pixels and the earlier one for odd output pixels, so that
    the mean offset is 0.

    Args:
        label: Class ids, integers (..., H, W), a numpy array or a torch tensor.
        size: (h, w) of the resized label map.
        rows: Rows of it that are returned.
        columns: Columns of it that are returned.

    Returns:
        Class ids (..., h, w) of the same kind and dtype, or a part of them.

    Examples:
        >>> import numpy as np
        >>> resize_label(np.array([[0, 1, 2, 3, 4, 5, 6, 7]]), (1, 4)).tolist()
        [[1, 2, 5, 6]]
        >>> resize_label(np.array([[0, 1, 2, 3]]), (1, 8)).tolist()
        [[0, 0, 1, 1, 2, 2, 3, 3]]
    """
    xp = array_namespace(label)
    row_pixels, column_pixels = (
        _nearest_pixels(*lengths, label) for lengths in zip(label.shape[-2:], size, strict=True)
    )
    result: Array = xp.take(xp.take(label, row_pixels[rows], axis=-2), column_pixels[columns], axis=-1)
    return result


def _nearest_pixels(length: int, cells: int, like: Array) -> Array:
    """Return the index of the nearest of `length` pixels for each of `cells` output pixels, in integer arithmetic."""
    xp = array_namespace(like)
    cell = xp.arange(cells, device=device(like))
    centre = (2 * cell + 1) * length  # in units of 1 / (2 cells) pixels
    pixel = centre // (2 * cells)
    is_tie = centre % (2 * cells) == 0
    result: Array = pixel - xp.astype(is_tie & (cell % 2 == 1), pixel.dtype)
    return result
