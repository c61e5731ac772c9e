"""A corpus of image files: all kinds that the reader must read, with their pixels, and files that it must refuse."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.serve.cases import encoded

ORIENTATION = 0x0112

# For each EXIF orientation, the function from the upright image to the stored pixels.
STORED = {
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: picture.swapaxes(0, 1)[::-1],
    7: lambda picture: picture.swapaxes(0, 1)[::-1, ::-1],
    8: lambda picture: picture.swapaxes(0, 1)[:, ::-1],
}


@dataclass(frozen=True)
class ImageFile:
    """A file and its expected pixels; None if the file must be refused with an error that matches `error`."""

    name: str
    content: bytes
    pixels: np.ndarray | None
    error: str = ""
    tolerance: int = 0

    @property
    def is_tiff(self) -> bool:
        return self.content[:2] in (b"II", b"MM")


def image_files() -> Iterator[ImageFile]:
    for kind in (jpegs, pngs, tiffs, others):
        yield from kind()


def photo(height=61, width=83, seed=0):
    """Return waves with some noise, whose corners all differ."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + y / 30), np.cos(y / 7 - x / 40), x / width - y / height]
    noise = np.random.default_rng(seed).integers(-4, 5, (height, width, 3))
    return np.clip(128 + 90 * np.dstack(waves) + noise, 0, 255).astype(np.uint8)


def turned(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=2)


def over_white(rgb, alpha):
    alpha = np.asarray(alpha)[..., None] / 255
    return np.rint(rgb * alpha + 255 * (1 - alpha)).astype(np.uint8)


def decoded(content):
    """Decode with Pillow, which reads complete 8-bit JPEGs correctly."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


# ---------------------------------------------------------------------------------------------------------------------
# JPEG

VIDEO = b"\0\0\0\x18ftypmp42" + np.random.default_rng(9).bytes(100_000)  # compressed video looks like noise
END = b"\xff\xd9"


def one_scan_a_channel(picture):
    """Return a baseline RGB JPEG with one scan per channel, made of three grey files."""
    start, *others = (encoded(picture[..., channel], "JPEG", quality=95) for channel in range(3))
    frame, scan = start.index(b"\xff\xc0"), start.index(b"\xff\xda")
    components = b"".join(bytes([name, 0x11, 0]) for name in b"RGB")
    content = start[:frame] + struct.pack(">HHB4sB", 0xFFC0, 17, 8, start[frame + 5 : frame + 9], 3) + components
    content += start[frame + 13 : scan]
    for name, grey_file in zip(b"RGB", (start, *others), strict=True):
        header = grey_file.index(b"\xff\xda")
        content += grey_file[header : header + 5] + bytes([name]) + grey_file[header + 6 : -2]
    # Without JFIF, the component names R, G and B mean that the channels are RGB.
    return content[:2] + content[20:] + END


def jpegs() -> Iterator[ImageFile]:
    picture = photo()
    kinds = {
        "baseline": {},
        "progressive": {"progressive": True},
        "without subsampling": {"subsampling": 0},
        "with restart markers": {"restart_marker_rows": 1},
        "with its own tables": {"optimize": True},
        "progressive with restart markers": {"progressive": True, "restart_marker_rows": 2},
        "RGB": {"keep_rgb": True},
    }
    for name, options in kinds.items():
        content = encoded(picture, "JPEG", quality=95, **options)
        yield ImageFile(f"{name}.jpg", content, decoded(content), tolerance=3)
        yield ImageFile(f"{name}, a video after it.jpg", content + VIDEO, decoded(content), tolerance=3)
        yield ImageFile(f"{name}, no end marker.jpg", content[:-2], decoded(content), tolerance=3)
        yield ImageFile(f"{name}, zeros for its end.jpg", content[:-2] + bytes(500), decoded(content), tolerance=3)
        content = encoded(photo(120, 160), "JPEG", quality=95, **options)
        for part in (0.3, 0.6, 0.9, 0.99):
            start = content[: int(part * len(content))]
            for what, end in {
                "": b"",
                ", a video after it": VIDEO,
                ", zeros after it": bytes(5000),
            }.items():
                yield ImageFile(f"{name}, cut at {part:.0%}{what}.jpg", start + end, None, "is cut short")
        yield ImageFile(f"{name}, cut in its header.jpg", content[:200], None, "is cut short")
    content = one_scan_a_channel(picture)
    yield ImageFile("one scan a channel.jpg", content, picture, tolerance=16)
    yield ImageFile("one scan a channel, a video after it.jpg", content + VIDEO, picture, tolerance=16)
    yield ImageFile("one scan a channel, no end marker.jpg", content[:-2], picture, tolerance=16)
    for part in (0.3, 0.6, 0.9, 0.99):
        cut = content[: int(part * len(content))]
        yield ImageFile(f"one scan a channel, cut at {part:.0%}.jpg", cut, None, "is cut short")
    content = encoded(picture[..., 0], "JPEG", quality=95)
    yield ImageFile("grey.jpg", content, decoded(content), tolerance=3)
    ink = Image.fromarray(picture).convert("CMYK")
    content = encoded(ink, "JPEG", quality=95)
    yield ImageFile("CMYK.jpg", content, decoded(content), tolerance=3)
    yield ImageFile("CMYK, cut.jpg", content[: len(content) // 2], None, "is cut short")
    content = encoded(Image.fromarray(picture), "MPO", save_all=True, append_images=[Image.fromarray(255 - picture)])
    yield ImageFile("two images.mpo.jpg", content, decoded(content), tolerance=3)
    for value, stored in STORED.items():
        content = encoded(stored(picture), "JPEG", quality=95, subsampling=0, exif=turned(value))
        yield ImageFile(f"orientation {value}.jpg", content, picture, tolerance=16)
    flat = encoded(np.full((40, 40, 3), 128, np.uint8), "JPEG")
    yield ImageFile("grey to its end.jpg", flat, np.full((40, 40, 3), 128, np.uint8), tolerance=1)
    content = encoded(picture, "JPEG", exif=turned(3))
    damaged = content.replace(b"MM\0*\0\0\0\x08", b"MM\0*\xff\xff\xff\xff")
    yield ImageFile("damaged EXIF.jpg", damaged, decoded(encoded(picture, "JPEG")), tolerance=3)
    content = encoded(picture, "JPEG")
    twelve = content.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    yield ImageFile("12 bits.jpg", twelve, None, "12-bit")


# ---------------------------------------------------------------------------------------------------------------------
# PNG


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, color, depth=8, before=(), after=()):
    """Return a PNG of values (H, W) or (H, W, C); colour types: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    height, width = values.shape[:2]
    bits = np.asarray(values, ">u2").reshape(height, -1, 1).view(np.uint8)
    rows = np.packbits(np.unpackbits(bits, axis=2)[..., 16 - depth :].reshape(height, -1), axis=1)
    packed = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", packed), *after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def exif_chunk(value):
    return chunk(b"eXIf", turned(value).tobytes().removeprefix(b"Exif\0\0"))


def scaled(values, depth):
    return np.rint(values.astype(float) * 255 / (2**depth - 1)).astype(np.uint8)


def deep(depth, channels=3):
    """Return uint16 values with this number of bits; the largest value occurs."""
    values = np.random.default_rng(depth).integers(0, 2**depth, (20, 30, channels)).astype(np.uint16)
    values[0, 0] = 2**depth - 1
    return values[..., 0] if channels == 1 else values


def pngs() -> Iterator[ImageFile]:
    picture = photo()
    alpha = (np.add.outer(np.arange(61), np.arange(83)) * 2 % 256).astype(np.uint8)
    content = encoded(picture, "PNG")
    yield ImageFile("RGB.png", content, picture)
    yield ImageFile("RGB, a video after it.png", content + VIDEO, picture)
    yield ImageFile("RGB in fine strokes.png", encoded(picture, "PNG", compress_level=0), picture)
    yield ImageFile("RGB under another name.jpg", content, picture)
    yield ImageFile("grey.png", encoded(picture[..., 0], "PNG"), grey(picture[..., 0]))
    yield ImageFile("RGBA.png", encoded(np.dstack([picture, alpha]), "PNG"), over_white(picture, alpha))
    yield ImageFile("opaque.png", encoded(np.dstack([picture, np.full_like(alpha, 255)]), "PNG"), picture)
    grey_alpha = np.dstack([picture[..., 0], alpha])
    yield ImageFile("grey and alpha.png", png(grey_alpha, 4), over_white(grey(picture[..., 0]), alpha))
    clear = np.where((picture == picture[5, 5]).all(2), 0, 255)
    key = chunk(b"tRNS", struct.pack(">3H", *picture[5, 5]))
    yield ImageFile("RGB with a clear colour.png", png(picture, 2, before=[key]), over_white(picture, clear))
    colors = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    palette = chunk(b"PLTE", colors.tobytes())
    indices = picture[..., 1]
    yield ImageFile("palette.png", png(indices, 3, before=[palette]), colors[indices])
    levels = np.random.default_rng(2).integers(0, 256, 256, np.uint8)
    yield ImageFile(
        "palette with alpha.png",
        png(indices, 3, before=[palette, chunk(b"tRNS", levels.tobytes())]),
        over_white(colors[indices], levels[indices]),
    )
    for depth in (1, 2, 4, 8):
        values = picture[..., 0] >> 8 - depth
        expected = grey(scaled(values, depth))
        yield ImageFile(f"grey of {depth} bits.png", png(values, 0, depth), expected)
        clear = np.where(values == 1, 0, 255)
        content = png(values, 0, depth, [chunk(b"tRNS", struct.pack(">H", 1))])
        yield ImageFile(f"grey of {depth} bits with a clear value.png", content, over_white(expected, clear))
    for depth in (8, 10, 12, 14, 16):
        for channels, color in ((1, 0), (3, 2)):
            values = deep(depth, channels)
            expected = scaled(values, depth)
            yield ImageFile(
                f"{depth} in 16 bits, {channels} channels.png",
                png(values, color, 16),
                grey(expected) if channels == 1 else expected,
                tolerance=1,
            )
    values = deep(12) // 5
    bits = chunk(b"sBIT", bytes([12, 12, 12]))
    yield ImageFile("12 bits by sBIT.png", png(values, 2, 16, [bits]), scaled(values, 12), tolerance=1)
    values = deep(12) // 20 << 4
    yield ImageFile("12 bits by sBIT, scaled up.png", png(values, 2, 16, [bits]), scaled(values, 16), tolerance=1)
    for depth in (12, 16):
        values = deep(depth, 4)
        expected = over_white(scaled(values[..., :3], depth), scaled(values[..., 3], depth))
        yield ImageFile(f"{depth} bits with alpha.png", png(values, 6, 16), expected, tolerance=2)
        expected = over_white(grey(scaled(values[..., 0], depth)), scaled(values[..., 3], depth))
        yield ImageFile(f"{depth} bits, grey and alpha.png", png(values[..., [0, 3]], 4, 16), expected, tolerance=2)
    values = np.dstack([deep(12), np.full((20, 30), 65535)])
    yield ImageFile("12 bits, opaque in 16.png", png(values, 6, 16), scaled(values[..., :3], 12), tolerance=1)
    values = deep(12)
    key = chunk(b"tRNS", struct.pack(">3H", *values[3, 3]))
    expected = scaled(values, 12)
    expected[(values == values[3, 3]).all(2)] = 255
    yield ImageFile("12 bits with a clear colour.png", png(values, 2, 16, [key]), expected, tolerance=1)
    expected = grey(scaled(values[..., 0], 12))
    expected[values[..., 0] == values[3, 3, 0]] = 255
    content = png(values[..., 0], 0, 16, [chunk(b"tRNS", struct.pack(">H", values[3, 3, 0]))])
    yield ImageFile("12 bits with a clear value.png", content, expected, tolerance=1)
    sixteen = picture.astype(np.uint16) * 257
    for value, stored in STORED.items():
        turn = [exif_chunk(value)]
        yield ImageFile(f"orientation {value}.png", png(stored(picture), 2, before=turn), picture)
        yield ImageFile(f"orientation {value} after the pixels.png", png(stored(picture), 2, after=turn), picture)
        yield ImageFile(f"orientation {value}, 16 bits.png", png(stored(sixteen), 2, 16, turn), picture)
        both = np.dstack([picture, alpha])
        content = png(stored(both), 6, before=turn)
        yield ImageFile(f"orientation {value} with alpha.png", content, over_white(picture, alpha))
    text = chunk(b"tEXt", b"date:create\x002020-01-01")
    yield ImageFile("text after the pixels.png", png(picture, 2, after=[text]), picture)
    frames = [Image.fromarray(picture), Image.fromarray(255 - picture)]
    content = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield ImageFile("animation.png", content, picture)
    content = png(sixteen, 2, 16, [chunk(b"acTL", struct.pack(">II", 1, 0))])
    yield ImageFile("animation of 16 bits.png", content, picture)
    for color, depth, values in (
        (2, 8, picture),
        (3, 8, indices),
        (2, 16, sixteen),
        (6, 8, np.dstack([picture, alpha])),
    ):
        content = png(values, color, depth, [palette] if color == 3 else [])
        name = f"colour type {color} of {depth} bits"
        for part in (0.3, 0.6, 0.9):
            yield ImageFile(f"{name}, cut at {part:.0%}.png", content[: int(part * len(content))], None, "truncated")
        yield ImageFile(f"{name}, without its end.png", content[:-12], None, "truncated")
        middle = (content.index(b"IDAT") + len(content)) // 2
        damaged = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        yield ImageFile(f"{name}, one bit changed.png", damaged, None, "checksum of its chunk IDAT is wrong")
    content = png(picture, 2).replace(chunk(b"IEND", b""), b"")
    start = content.index(b"IDAT") - 4
    short = content[:start] + chunk(b"IDAT", zlib.compress(bytes(3000))) + chunk(b"IEND", b"")
    yield ImageFile("too few rows.png", short, None, "cannot be read|Cannot read")
    yield ImageFile("cut in its header.png", content[:20], None, "truncated")


# ---------------------------------------------------------------------------------------------------------------------
# TIFF

TIFF_GREY, TIFF_RGB, TIFF_PALETTE = 1, 2, 3  # photometric interpretations
_SIZES = {"B": 1, "H": 2, "I": 4, "Q": 8}


def tiff(values, photometric, *, depth=None, order="<", extra=None, tags=None, big=False, data=None, channels=None):
    """Return a TIFF with one strip of values (H, W) or (H, W, C); `tags` maps tag numbers to (type, values)."""
    height, width = values.shape[:2]
    channels = channels or (1 if values.ndim == 2 else values.shape[2])
    depth = depth or 8 * values.dtype.itemsize
    if data is None and depth % 8:
        bits = np.asarray(values, ">u2").reshape(height, -1, 1).view(np.uint8)
        data = np.packbits(np.unpackbits(bits, axis=2)[..., 16 - depth :].reshape(height, -1), axis=1).tobytes()
    data = data or values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [depth] * channels), 259: ("H", [1]),
        262: ("H", [photometric]), 273: ("I", [0]), 277: ("H", [channels]), 278: ("I", [height]),
        279: ("I", [len(data)]), **({} if extra is None else {338: ("H", extra)}), **(tags or {}),
    }  # fmt: skip
    word, inline, count = ("Q", 8, "Q") if big else ("I", 4, "H")
    head = (b"II" if order == "<" else b"MM") + struct.pack(
        order + ("HHHQ" if big else "HI"), *((43, 8, 0, 16) if big else (42, 8))
    )
    end = len(head) + struct.calcsize("=" + count) + (12 + (8 if big else 0)) * len(entries) + inline
    outside = b""
    directory = struct.pack(order + count, len(entries))
    outer = sum(len(v) * _SIZES[t] + len(v) * _SIZES[t] % 2 for t, v in entries.values() if len(v) * _SIZES[t] > inline)
    entries[273] = ("I", [end + outer])
    for tag, (kind, numbers) in sorted(entries.items()):
        raw = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(raw) > inline:
            field = struct.pack(order + word, end + len(outside))
            outside += raw + bytes(len(raw) % 2)
        else:
            field = raw.ljust(inline, b"\0")
        code = {"B": 1, "H": 3, "I": 4, "Q": 16}[kind]
        directory += struct.pack(order + "HH" + word, tag, code, len(numbers)) + field
    return head + directory + bytes(inline) + outside + data


def tiffs() -> Iterator[ImageFile]:
    picture = photo()
    alpha = (np.add.outer(np.arange(61), np.arange(83)) * 2 % 256).astype(np.uint8)
    four = np.dstack([picture, alpha])
    multiplied = np.dstack([np.rint(picture * (alpha[..., None] / 255)), alpha]).astype(np.uint8)
    for order in "<>":
        name = {"<": "little", ">": "big"}[order]
        yield ImageFile(f"RGB, {name} end first.tif", tiff(picture, TIFF_RGB, order=order), picture)
        if order == "<":  # Pillow does not read big-endian BigTIFF
            yield ImageFile("BigTIFF.tif", tiff(picture, TIFF_RGB, big=True), picture)
        for depth in (10, 12, 14, 16):
            for channels in (1, 3):
                values = deep(depth, channels)
                expected = grey(scaled(values, depth)) if channels == 1 else scaled(values, depth)
                content = tiff(values, TIFF_GREY if channels == 1 else TIFF_RGB, order=order)
                what = f"{depth} in 16 bits, {channels} channels, {name} end first"
                yield ImageFile(f"{what}.tif", content, expected, tolerance=1)
        for channels in (1, 3):
            values = deep(12, channels) // 3
            expected = grey(scaled(values, 12)) if channels == 1 else scaled(values, 12)
            content = tiff(values, TIFF_GREY if channels == 1 else TIFF_RGB, order=order, depth=12)
            yield ImageFile(
                f"12 packed bits, {channels} channels, {name} end first.tif", content, expected, tolerance=1
            )
            content = tiff(
                values, TIFF_GREY if channels == 1 else TIFF_RGB, order=order, tags={281: ("H", [4095] * channels)}
            )
            yield ImageFile(
                f"12 stated bits, {channels} channels, {name} end first.tif", content, expected, tolerance=1
            )
        content = tiff(deep(12, 1), 0, order=order)
        yield ImageFile(f"white is 0, {name} end first.tif", content, grey(255 - scaled(deep(12, 1), 12)), tolerance=1)
    for name, extra, values, expected in (
        ("alpha", [2], four, over_white(picture, alpha)),
        ("a channel without a stated kind", None, four, over_white(picture, alpha)),
        ("premultiplied alpha", [1], multiplied, over_white(picture, alpha)),
        ("an unspecified channel", [0], four, picture),
    ):
        yield ImageFile(f"RGB and {name}.tif", tiff(values, TIFF_RGB, extra=extra), expected, tolerance=2)
        content = tiff(values.astype(np.uint16) * 257, TIFF_RGB, extra=extra)
        yield ImageFile(f"RGB of 16 bits and {name}.tif", content, expected, tolerance=2)
    yield ImageFile(
        "grey and alpha.tif", tiff(four[..., [0, 3]], TIFF_GREY, extra=[2]), over_white(grey(four[..., 0]), alpha)
    )
    yield ImageFile("white is 0, 8 bits.tif", tiff(255 - picture[..., 0], 0), grey(picture[..., 0]))
    one = picture[..., 0] > 128
    yield ImageFile("1 bit.tif", tiff(one.astype(np.uint16), TIFF_GREY, depth=1), grey(one * 255))
    colors = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    table = {320: ("H", (colors.T.astype(int) * 257).ravel().tolist())}
    yield ImageFile("palette.tif", tiff(picture[..., 1], TIFF_PALETTE, tags=table), colors[picture[..., 1]])
    ink = Image.fromarray(picture).convert("CMYK")
    yield ImageFile("CMYK.tif", encoded(ink, "TIFF"), np.asarray(ink.convert("RGB")))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        content = encoded(picture, "TIFF", compression=compression)
        yield ImageFile(f"{compression}.tif", content, picture)
        for part in (0.3, 0.9, 0.99):
            cut = content[: int(part * len(content))]
            yield ImageFile(f"{compression}, cut at {part:.0%}.tif", cut, None, "truncated")
    pages = [Image.fromarray(picture), Image.fromarray(255 - picture)]
    yield ImageFile("two pages.tif", encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]), picture)
    for value, stored in STORED.items():
        turn = {274: ("H", [value])}
        yield ImageFile(f"orientation {value}.tif", tiff(stored(picture), TIFF_RGB, tags=turn), picture)
        content = tiff(stored(picture).astype(np.uint16) * 257, TIFF_RGB, tags=turn)
        yield ImageFile(f"orientation {value}, 16 bits.tif", content, picture)
        content = tiff(stored(picture[..., 0]).astype(np.uint16) * 257, TIFF_GREY, tags=turn)
        yield ImageFile(f"orientation {value}, 16 bits of grey.tif", content, grey(picture[..., 0]))
    for values in (picture, picture.astype(np.uint16) * 257, picture[..., 0].astype(np.uint16) * 257):
        content = tiff(values, TIFF_RGB if values.ndim == 3 else TIFF_GREY)
        name = f"{values.dtype} {values.ndim}"
        for part in (0.3, 0.9, 0.99):
            cut = content[: int(part * len(content))]
            yield ImageFile(f"{name}, cut at {part:.0%}.tif", cut, None, "truncated")
        yield ImageFile(f"{name}, cut in its directory.tif", content[:40], None, "truncated")
    five = np.dstack([four, alpha])
    yield ImageFile("5 channels.tif", tiff(five, TIFF_RGB, extra=[0, 0]), None, "at most 4 channels, but got 5")
    yield ImageFile(
        "5 channels of 16 bits.tif", tiff(five.astype(np.uint16), TIFF_RGB, extra=[2, 0]), None, "but got 5"
    )
    planar = tiff(deep(12), TIFF_RGB, tags={284: ("H", [2])})
    yield ImageFile("planes of 16 bits.tif", planar, None, "one plane for each channel")
    number = {339: ("H", [3])}
    yield ImageFile("fractions.tif", tiff(np.ones((4, 4), np.float32), TIFF_GREY, tags=number), None, "PIL's mode 'F'")
    number = {339: ("H", [3] * 3)}
    content = tiff(np.ones((4, 4, 3), np.float32), TIFF_RGB, tags=number)
    yield ImageFile("fractions of three channels.tif", content, None, "3 channels of .32. bits")
    yield ImageFile("32 bits.tif", tiff(np.ones((4, 4), np.uint32), TIFF_GREY), None, "PIL's mode 'I'")
    number = {339: ("H", [2])}
    yield ImageFile("signed.tif", tiff(np.ones((4, 4), np.int16), TIFF_GREY, tags=number), None, "PIL's mode 'I'")


# ---------------------------------------------------------------------------------------------------------------------
# Others


def others() -> Iterator[ImageFile]:
    picture = photo()
    alpha = (np.add.outer(np.arange(61), np.arange(83)) * 2 % 256).astype(np.uint8)
    content = encoded(picture, "BMP")
    yield ImageFile("RGB.bmp", content, picture)
    yield ImageFile("RGB, cut.bmp", content[: len(content) // 2], None, "truncated")
    yield ImageFile("grey.bmp", encoded(picture[..., 0], "BMP"), grey(picture[..., 0]))
    content = encoded(picture, "WEBP", lossless=True)
    yield ImageFile("RGB.webp", content, picture)
    for part in (0.3, 0.9, 0.99):
        cut = content[: int(part * len(content))]
        yield ImageFile(f"cut at {part:.0%}.webp", cut, None, "[Cc]annot ?(be)? read")
    both = np.dstack([picture, np.maximum(alpha, 1)])
    content = encoded(both, "WEBP", lossless=True)
    yield ImageFile("RGBA.webp", content, over_white(picture, both[..., 3]))
    content = encoded(picture, "WEBP", quality=90)
    yield ImageFile("lossy.webp", content, decoded(content), tolerance=3)
    for value, stored in STORED.items():
        content = encoded(stored(picture), "WEBP", lossless=True, exif=turned(value))
        yield ImageFile(f"orientation {value}.webp", content, picture)
    frames = [Image.fromarray(picture), Image.fromarray(255 - picture)]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    yield ImageFile("animation.webp", content, picture)
    for name, content in {
        "empty": b"",
        "svg": b"<svg/>",
        "GIF": encoded(picture, "GIF"),
        "zeros": bytes(1000),
        "noise": b"\1" + np.random.default_rng(0).bytes(1000),
    }.items():
        yield ImageFile(f"{name}.png", content, None, "is none of them")
    bomb = bytearray(png(np.zeros((2, 3), np.uint8), 0))
    bomb[16:24] = struct.pack(">II", 20_000, 20_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    yield ImageFile("bomb.png", bytes(bomb), None, "400000000 pixels")
