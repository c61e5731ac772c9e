"""Reader of label files: class ids from grey values, from palette indices, or from colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bpkd_sdk.spec import Color

LABEL_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # Pillow's names of lossless formats

_GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow scales grey values of 2 and 4 bits to 0..255 by these factors


def read_label(path: Path) -> np.ndarray:
    """Read the values (H, W) of a label file: grey values, or the indices of a palette.

    A file with three equal channels is grey. A file whose palette gives each used index a different grey is grey too.
    Grey values of 2 and 4 bits are read as they are stored.

    Args:
        path: Path of a PNG, TIFF, BMP or GIF file.

    Returns:
        bool for a file with 1 bit per pixel; otherwise uint8 if the values fit, or int64.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be decoded, has another format, or contains colours or fractions.
    """
    image, raw_mode = _load_label(path)
    if image.mode in ("RGB", "RGBA", "LA"):
        pixels = _opaque_rgb(path, image)
        if (pixels != pixels[..., :1]).any():
            raise ValueError(
                f"{path}: contains colours {_hex_list(pixels)}, expected one class id per pixel (grey or palette PNG). "
                'For a folder, name the colours of the classes: "palette" in classes.json, one per class'
            )
        return np.ascontiguousarray(pixels[..., 0])
    label = np.array(image)
    if label.ndim != 2 or image.mode == "F":
        raise ValueError(
            f"{path}: contains pixels of the kind {image.mode!r}, expected one class id per pixel, as a "
            "whole number of 8, 16 or 32 bits"
        )
    if image.mode == "P":
        return _greys_or_indices(image, label)
    if raw_mode in _GREY_STEPS:
        label //= _GREY_STEPS[raw_mode]
    return label if label.dtype == np.bool_ else narrow(label)


def read_class_ids(
    path: Path, ids: Mapping[int, int] | None, colors: Mapping[Color, int] | None, ignore_index: int, data_name: str
) -> np.ndarray:
    """Read a label file as class ids (H, W), by the meaning of its values or colours.

    Args:
        path: Path of a PNG, TIFF, BMP or GIF file.
        ids: Class id, or `ignore_index`, of each value; None if the values are the class ids.
        colors: Class id, or `ignore_index`, of each RGB colour, by which the file is then read; None: by its values.
        ignore_index: Label value of void pixels.
        data_name: Name of the data set in error messages.

    Returns:
        uint8 if the class ids fit, otherwise int64.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be decoded, or contains a value or colour that is not mapped.
    """
    if colors is not None:
        return read_colors(path, colors, ignore_index)
    values = read_label(path)
    if values.dtype == np.bool_:
        # White is 255 if `ids` maps it to a class and does not map 1.
        is_255 = ids and 1 not in ids and ids.get(255, ignore_index) != ignore_index
        values = values.astype(np.uint8) * np.uint8(255 if is_255 else 1)
    if ids is None:
        return values
    unmapped = np.iinfo(np.int64).min  # no class, and no void label, which may be negative
    class_of_value = np.full(max(ids) + 2, unmapped, np.int64)  # the last entry serves all larger values
    class_of_value[list(ids)] = list(ids.values())
    classes = class_of_value.take(values, mode="clip")
    if classes.min() == unmapped or values.min() < 0:
        unknown = sorted(set(np.unique(values).tolist()) - ids.keys())
        raise ValueError(f"{path}: contains the ids {unknown[:10]}, which are not mapped to classes of {data_name}")
    return narrow(classes)


def read_colors(path: Path, colors: Mapping[Color, int], ignore_index: int) -> np.ndarray:
    """Read the class ids (H, W) of a label file by the colours of its pixels: RGB, palette or grey.

    The palette index `ignore_index` is void, regardless of its colour.

    Args:
        path: Path of a PNG, TIFF, BMP or GIF file.
        colors: Class id, or `ignore_index`, of each RGB colour.
        ignore_index: Label value of void pixels.

    Returns:
        uint8 if the class ids fit, otherwise int64.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be decoded, or contains a colour that is not mapped; the colours are named.
    """
    keys = np.array([_packed(np.array(color)) for color in colors])
    order = np.argsort(keys)
    keys, classes = keys[order], narrow(np.array([*colors.values(), ignore_index]))[order]
    image, _ = _load_label(path)
    if image.mode == "P":
        palette, indices = palette_of(image), np.array(image)
        used = np.unique(indices)
        used = used[used != ignore_index]
        if used.size and used[-1] >= len(palette):
            raise ValueError(f"{path}: uses the palette index {used[-1]}, but its palette has {len(palette)} colours")
        _check_colors(path, palette[used], keys)
        class_of_index = np.full(256, ignore_index, classes.dtype)
        class_of_index[used] = classes[np.searchsorted(keys, _packed(palette[used]))]
        return np.asarray(class_of_index[indices])
    if image.mode in ("RGB", "RGBA", "LA"):
        pixels = _opaque_rgb(path, image)
    elif image.mode in ("L", "1"):
        pixels = np.array(image.convert("RGB"))
    else:
        raise ValueError(f"{path}: contains pixels of the kind {image.mode!r}, expected colours of 8 bits a channel")
    packed = _packed(pixels)
    positions = np.searchsorted(keys, packed).clip(max=len(keys) - 1)
    if not np.array_equal(keys[positions], packed):
        _check_colors(path, np.unique(pixels.reshape(-1, 3), axis=0), keys)
    return np.asarray(classes[positions])


def distinct_pixel_colors(path: Path) -> list[Color]:
    """Return the different colours of a label file with RGB pixels, sorted; an empty list for other files.

    Raises:
        ValueError: If the file cannot be decoded.
    """
    image, _ = _load_label(path)
    if image.mode not in ("RGB", "RGBA"):
        return []
    packed = np.unique(_packed(np.array(image.convert("RGB")))).tolist()
    return [(color >> 16, color >> 8 & 255, color & 255) for color in packed]


def hex_color(color: Sequence[int]) -> str:
    """Return an RGB colour as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*map(int, color))


def parse_hex_color(text: str) -> Color:
    """Return the RGB colour of #rrggbb; raise ValueError for other text."""
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red, green, blue


def narrow(ids: np.ndarray) -> np.ndarray:
    """Return integers as uint8 if they fit, otherwise as int64."""
    fits = not ids.size or (ids.min() >= 0 and ids.max() < 256)
    return ids.astype(np.uint8 if fits else np.int64, copy=False)


def _load_label(path: Path) -> tuple[Image.Image, str]:
    """Decode a label file; return the image, and Pillow's name of the pixel layout in the file, such as "L;4"."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no label at {path}.")
    try:
        with Image.open(path, formats=LABEL_FORMATS) as image:
            arguments = image.tile[0][3] if image.tile else ""
            raw_mode = str(arguments if isinstance(arguments, str) else arguments[0] if arguments else "")
            image.load()
            pages = _pages_of_equal_size(image)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path}: cannot be read as a label map. It is none of {', '.join(LABEL_FORMATS)} (the compression of JPEG "
            "changes class ids), or damaged"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: has too many pixels ({error}). Cut image and label into tiles") from error
    except Exception as error:  # Pillow's errors for damaged files have no common base class
        raise ValueError(f"{path}: cannot be read as a label map ({error})") from error
    if pages > 1:
        raise ValueError(
            f"{path}: contains {pages} pages, expected one class id per pixel. If each page is the mask of a class, "
            "merge them into one map of class ids"
        )
    if ";16" in raw_mode and not image.mode.startswith("I"):
        raise ValueError(f"{path}: contains colours of 16 bits a channel, expected 8")
    return image, raw_mode


def _pages_of_equal_size(image: Image.Image) -> int:
    """Return the number of pages with the size of the first; smaller pages are overviews of it, as GIS tools write."""
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format != "TIFF":
        return int(count)
    size, pages = image.size, 0
    for page in range(count):
        image.seek(page)
        pages += image.size == size
    image.seek(0)
    image.load()
    return pages


def _opaque_rgb(path: Path, image: Image.Image) -> np.ndarray:
    """Convert an image to uint8 (H, W, 3); raise ValueError if it has transparent pixels."""
    if image.has_transparency_data and (np.array(image.convert("RGBA"))[..., 3] < 255).any():
        raise ValueError(f"{path}: has transparent pixels, whose class is not known. Save labels without transparency")
    pixels: np.ndarray = np.array(image.convert("RGB"))
    return pixels


def _greys_or_indices(image: Image.Image, indices: np.ndarray) -> np.ndarray:
    """Return the greys of a palette image if the colours of all used indices are different greys, else the indices."""
    palette = palette_of(image)
    used = np.unique(indices)
    if used[-1] >= len(palette):
        return indices
    greys = palette[used]
    if (greys != greys[:, :1]).any() or len(np.unique(greys[:, 0])) < len(used):
        return indices
    return np.asarray(palette[:, 0][indices])


def palette_of(image: Image.Image) -> np.ndarray:
    """Return the palette of an image, uint8 (N, 3); (0, 3) if it has none."""
    flat = (image.getpalette() if image.mode == "P" else None) or []
    return np.array(flat, np.uint8)[: len(flat) // 3 * 3].reshape(-1, 3)


def _packed(colors: np.ndarray) -> np.ndarray:
    """Pack RGB colours (..., 3) into one int32 each."""
    wide = colors.astype(np.int32)
    packed: np.ndarray = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
    return packed


def _check_colors(path: Path, colors: np.ndarray, keys: np.ndarray) -> None:
    """Raise ValueError for colours (N, 3) that are not among the packed keys."""
    if len(unknown := colors[~np.isin(_packed(colors), keys)]):
        known = ", ".join(hex_color((key >> 16, key >> 8 & 255, key & 255)) for key in keys[:20].tolist())
        raise ValueError(
            f"{path}: contains the colours {_hex_list(unknown)}, which are not mapped to classes; known are {known}. "
            f'In classes.json, add them to "palette", or map them: {{"ids": {{"{hex_color(unknown[0])}": "void"}}}}. '
            "If the classes are not the colours of a palette but its indices, map the indices: "
            '{"ids": {"0": "void"}}'
        )


def _hex_list(pixels: np.ndarray) -> str:
    colors = np.unique(pixels.reshape(-1, 3), axis=0).tolist()
    return ", ".join(map(hex_color, colors[:10])) + (f" and {len(colors) - 10} more" if len(colors) > 10 else "")
