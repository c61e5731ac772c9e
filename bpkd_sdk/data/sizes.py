"""The size that an image is brought to before it is cropped or segmented."""

from __future__ import annotations


def scaled_size(size: tuple[int, int], scale: float, base_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of a scaled image, the ratio of its sides kept.

    Args:
        size: (height, width) of the image.
        scale: Factor on `base_size`, or where there is none on the image's own size.
        base_size: (longer side, shorter side) that the image is fitted into; OpenMMLab's `img_scale` with `keep_ratio`.

    Returns:
        (height, width), each at least 1, a half rounded up.

    Example:
        >>> scaled_size((300, 400), 1.0, (2048, 512))
        (512, 683)
        >>> scaled_size((300, 400), 0.5)
        (150, 200)
    """
    factor = scale if base_size is None else scale * min(base_size[0] / max(size), base_size[1] / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width
