"""Rules for the sizes of images and for the resizing of labels.

They are apart from the transforms because those import torchvision, which takes several seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scaled_size(size: tuple[int, int], scale: float, base_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the size of a scaled image with the same aspect ratio.

    Args:
        size: (height, width) of the image.
        scale: Factor on `base_size`; without `base_size`, factor on `size`.
        base_size: (longer side, shorter side) of a rectangle that the image is fitted into; OpenMMLab's `img_scale`
            with `keep_ratio`.

    Returns:
        (height, width), each at least 1; halves are rounded up.

    Example:
        >>> scaled_size((300, 400), 1.0, (2048, 512))
        (512, 683)
        >>> scaled_size((300, 400), 0.5)
        (150, 200)
    """
    factor = scale if base_size is None else scale * min(base_size[0] / max(size), base_size[1] / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def resize_label(label: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a label map: each output pixel takes the label pixel whose centre is nearest to its own centre.

    The centre of output row i lies at (i + 0.5) H / h rows of the label, as in bilinear resizing of images. This is the
    rule of torch's "nearest-exact" unless the centre lies exactly between two pixels, which happens everywhere at half
    the size. In this case "nearest-exact" takes the later pixel, which moves all labels by a quarter of an output
    pixel. This function takes the later pixel for even output pixels and the earlier one for odd output pixels, so that
    the mean offset is 0.

    Args:
        label: Class ids, integers (..., H, W).
        size: (h, w) of the result.

    Returns:
        Class ids (..., h, w) of the same dtype.

    Example:
        >>> resize_label(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]]), (1, 4)).tolist()
        [[1, 2, 5, 6]]
        >>> resize_label(torch.tensor([[0, 1, 2, 3]]), (1, 8)).tolist()
        [[0, 0, 1, 1, 2, 2, 3, 3]]
    """
    rows, columns = (
        _nearest_pixels(length, cells, label.device) for length, cells in zip(label.shape[-2:], size, strict=True)
    )
    return label.index_select(-1, columns).index_select(-2, rows)


def _nearest_pixels(length: int, cells: int, device: torch.device) -> Tensor:
    """Return the index of the nearest of `length` pixels for each of `cells` output pixels, in integer arithmetic."""
    cell = torch.arange(cells, device=device)
    centre = (2 * cell + 1) * length  # in units of 1 / (2 cells) pixels
    pixel = centre // (2 * cells)
    is_tie = centre % (2 * cells) == 0
    return pixel - (is_tie & (cell % 2 == 1)).long()
