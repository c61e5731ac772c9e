"""Label files: class ids from grey values, from the indices of a palette, or from colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bpkd_sdk.models.spec import Color

LABEL_FORMATS = ("PNG", "TIFF", "BMP")  # Pillow's names; all keep every value

_GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow spreads grey values of 2 and 4 bits over 0..255


def read_label(path: Path) -> np.ndarray:
    """Read ids (H, W) from a file: grey values, or the indices of a palette.

    A file of three equal channels is grey, and so is one whose palette gives each index in use a grey of its own. Grey
    values of 2 and 4 bits are read as they are stored.

    Returns:
        bool of a file with 1 bit per pixel, uint8 if the ids fit, otherwise int64.

    Raises:
        ValueError: If the file cannot be decoded, is no PNG, TIFF or BMP, or holds colours or fractions.
    """
    image, raw_mode = _load_label(path)
    if image.mode in ("RGB", "RGBA", "LA"):
        pixels = _opaque(path, image)
        if (pixels != pixels[..., :1]).any():
            raise ValueError(
                f"{path}: holds colours {_hex_list(pixels)}, expected one class id per pixel (grey or palette PNG). "
                'For a folder, name the colours of the classes: "palette" in classes.json, one per class'
            )
        return np.ascontiguousarray(pixels[..., 0])
    label = np.array(image)
    if label.ndim != 2 or image.mode == "F":
        raise ValueError(f"{path}: holds pixels of the kind {image.mode!r}, expected one class id per pixel")
    if image.mode == "P":
        return _greys(image, label)
    if raw_mode in _GREY_STEPS:
        label //= _GREY_STEPS[raw_mode]
    return label if label.dtype == np.bool_ else fitted(label)


def read_colors(path: Path, colors: Mapping[Color, int], ignore_index: int) -> np.ndarray:
    """Read class ids (H, W) from the colours of a file: RGB, palette or grey; uint8 if they fit, otherwise int64.

    The palette index `ignore_index` is void, whatever its colour.

    Args:
        path: A PNG, TIFF or BMP.
        colors: Class, or void label, of each RGB colour.
        ignore_index: The void label.

    Raises:
        ValueError: If the file cannot be decoded, or holds a colour without a class; the colours are named.
    """
    keys = np.array([_packed(np.array(color)) for color in colors])
    rank = np.argsort(keys)
    keys, classes = keys[rank], fitted(np.array([*colors.values(), ignore_index]))[rank]
    image, _ = _load_label(path)
    if image.mode == "P":
        entries = palette_of(image)
        index = np.array(image)
        used = np.unique(index)
        used = used[used != ignore_index]
        if used.size and used[-1] >= len(entries):
            raise ValueError(f"{path}: uses the palette index {used[-1]}, but its palette has {len(entries)} colours")
        _check_colors(path, entries[used], keys)
        table = np.full(256, ignore_index, classes.dtype)
        table[used] = classes[np.searchsorted(keys, _packed(entries[used]))]
        known: np.ndarray = table[index]
        return known
    if image.mode in ("RGB", "RGBA", "LA"):
        pixels = _opaque(path, image)
    elif image.mode in ("L", "1"):
        pixels = np.array(image.convert("RGB"))
    else:
        raise ValueError(f"{path}: holds pixels of the kind {image.mode!r}, expected colours of 8 bits a channel")
    packed = _packed(pixels)
    places = np.searchsorted(keys, packed).clip(max=len(keys) - 1)
    if not np.array_equal(keys[places], packed):
        _check_colors(path, np.unique(pixels.reshape(-1, 3), axis=0), keys)
    found: np.ndarray = classes[places]
    return found


def hex_color(color: Sequence[int]) -> str:
    """Return an RGB colour as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*map(int, color))


def fitted(ids: np.ndarray) -> np.ndarray:
    """Return integers as uint8 if they fit, otherwise as int64."""
    fits = not ids.size or (ids.min() >= 0 and ids.max() < 256)
    return ids.astype(np.uint8 if fits else np.int64, copy=False)


def _load_label(path: Path) -> tuple[Image.Image, str]:
    """Decode a label file; return the image, and how its pixels lie in the file, in Pillow's words, such as "L;4"."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no label at {path}.")
    try:
        with Image.open(path, formats=LABEL_FORMATS) as image:
            arguments = image.tile[0][3] if image.tile else ""
            raw_mode = str(arguments if isinstance(arguments, str) else arguments[0] if arguments else "")
            image.load()
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path}: cannot be read as a label map. It is none of {', '.join(LABEL_FORMATS)} (JPEG changes class ids "
            "where it compresses), or damaged"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: has too many pixels ({error}). Cut image and label into tiles") from error
    except Exception as error:  # what Pillow's readers raise for a damaged file has no base class
        raise ValueError(f"{path}: cannot be read as a label map ({error})") from error
    if ";16" in raw_mode and not image.mode.startswith("I"):
        raise ValueError(f"{path}: holds colours of 16 bits a channel, expected 8")
    return image, raw_mode


def _opaque(path: Path, image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of an image without transparency, or ValueError."""
    if image.has_transparency_data and (np.array(image.convert("RGBA"))[..., 3] < 255).any():
        raise ValueError(f"{path}: has transparent pixels, whose class is not known. Save labels without transparency")
    pixels: np.ndarray = np.array(image.convert("RGB"))
    return pixels


def _greys(image: Image.Image, index: np.ndarray) -> np.ndarray:
    """The greys of a palette image if all that it uses are greys, each once; otherwise its indices."""
    palette = palette_of(image)
    used = np.unique(index)
    if used[-1] >= len(palette):
        return index
    greys = palette[used]
    if (greys != greys[:, :1]).any() or len(np.unique(greys[:, 0])) < len(used):
        return index
    found: np.ndarray = palette[:, 0][index]
    return found


def palette_of(image: Image.Image) -> np.ndarray:
    """The palette of an image, uint8 (N, 3); of none, (0, 3)."""
    flat = (image.getpalette() if image.mode == "P" else None) or []
    return np.array(flat, np.uint8)[: len(flat) // 3 * 3].reshape(-1, 3)


def _packed(colors: np.ndarray) -> np.ndarray:
    """RGB (..., 3) -> one int32 each."""
    wide = colors.astype(np.int32)
    packed: np.ndarray = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
    return packed


def _check_colors(path: Path, found: np.ndarray, keys: np.ndarray) -> None:
    """Raise ValueError for colours (N, 3) that are not among the packed keys."""
    if len(strange := found[~np.isin(_packed(found), keys)]):
        known = ", ".join(hex_color((key >> 16, key >> 8 & 255, key & 255)) for key in keys[:20].tolist())
        raise ValueError(
            f"{path}: holds the colours {_hex_list(strange)}, which are no class's; known are {known}. "
            f'In classes.json, add them to "palette", or map them: {{"ids": {{"{hex_color(strange[0])}": "void"}}}}. '
            "Where not the colours of a palette but its indices are the classes, map the indices: "
            '{"ids": {"0": "void"}}'
        )


def _hex_list(pixels: np.ndarray) -> str:
    colors = np.unique(pixels.reshape(-1, 3), axis=0).tolist()
    return ", ".join(map(hex_color, colors[:10])) + (f" and {len(colors) - 10} more" if len(colors) > 10 else "")
