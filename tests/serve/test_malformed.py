"""Malformed uploads and requests: each is refused, and the server keeps working."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from bpkd_sdk.serve.service.limits import Limits
from tests.serve.cases import encoded, scene, served

LIMITS = Limits(max_upload_bytes=200_000, max_pixels=1_000_000)
GOOD = {kind: encoded(scene(90, 120), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP")}


def seeded():
    return np.random.default_rng(5)


def put(content, offset, layout, *values):
    """Return the content with some bytes overwritten."""
    changed = bytearray(content)
    struct.pack_into(layout, changed, offset, *values)
    return bytes(changed)


def checksummed(png):
    """Return a PNG with the correct checksum of its header."""
    return put(png, 29, ">I", zlib.crc32(png[12:29]))


def truncated():
    rng = seeded()
    for kind, content in GOOD.items():
        for _ in range(12):
            yield f"{kind} cut off", content[: int(rng.integers(1, 0.9 * len(content)))]


def fuzzed_headers():
    rng = seeded()
    jpeg_size = GOOD["JPEG"].index(b"\xff\xc0") + 2
    for _ in range(10):
        noise = rng.bytes(12)
        yield "PNG whose header does not match its checksum", put(GOOD["PNG"], 16, "12s", noise)
        yield "PNG without its signature", noise[:8] + GOOD["PNG"][8:]
        yield "JPEG that begins with noise", noise + GOOD["JPEG"][12:]
        yield "JPEG with noise in its size and channels", put(GOOD["JPEG"], jpeg_size, "8s", b"\0\3" + noise[:6])
        yield "WEBP with noise in its type", put(GOOD["WEBP"], 8, "8s", noise[:8])
        yield "BMP with noise in its header", put(GOOD["BMP"], 14, "12s", noise)


def wrong_types():
    picture = scene(40, 50)
    rng = seeded()
    yield "nothing", b""
    for length in (1, 2, 3, 7, 8, 100, 10_000):
        yield "zeros", bytes(length)
        yield "noise", b"\1" + rng.bytes(length)
    for kind in ("GIF", "TIFF", "ICO", "PPM", "TGA", "PDF", "EPS", "JPEG2000", "AVIF"):
        yield kind, encoded(Image.fromarray(picture), kind)
    yield "HTML", b"<!doctype html><script>alert(1)</script>"
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "XML that refers to a file", b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>'
    yield "JSON", b'{"image": "/etc/passwd"}'
    yield "a path", b"/etc/passwd"
    yield "an address", b"http://127.0.0.1/photo.png"
    yield "a pickle", b"\x80\x04cposix\nsystem\n(S'true'\ntR."
    yield "an archive", b"PK\3\4" + rng.bytes(200)
    yield "a program", b"\x7fELF" + rng.bytes(200)
    yield "base64", b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    yield "text before an image", b"image=" + GOOD["PNG"]


def giant():
    for side in (1_001, 20_000, 70_000, 2**31 - 1):
        yield "PNG", checksummed(put(GOOD["PNG"], 16, ">II", side, side))
        yield "BMP", put(GOOD["BMP"], 18, "<ii", side, side)
    yield "long and thin", encoded(Image.new("1", (900_000, 1)))
    yield "JPEG", put(GOOD["JPEG"], GOOD["JPEG"].index(b"\xff\xc0") + 5, ">HH", 65_500, 65_500)
    yield "WEBP", encoded(Image.new("L", (1_200, 1_200)), "WEBP")
    yield "a decompression bomb: 9 million pixels in 9 kB", encoded(Image.new("L", (3_000, 3_000)))
    yield "no pixels", checksummed(put(GOOD["PNG"], 16, ">II", 0, 5))
    yield "negative", put(GOOD["BMP"], 18, "<ii", -5, -5)
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 5_000_000, zip=True)
    yield "a decompression bomb in the text", encoded(scene(40, 50), pnginfo=text)
    yield "more bytes than allowed", bytes(LIMITS.max_upload_bytes + 1)


def damaged_inside():
    rng = seeded()
    data = GOOD["PNG"].index(b"IDAT") + 4
    for _ in range(8):
        offset = data + int(rng.integers(50, 500))
        yield "PNG whose pixels cannot be decompressed", put(GOOD["PNG"], offset, "40s", rng.bytes(40))
        yield "WEBP whose pixels cannot be decompressed", GOOD["WEBP"][:30] + rng.bytes(40) + GOOD["WEBP"][70:200]


BODIES = [
    (f"{make.__name__} {name}", content)
    for make in (truncated, fuzzed_headers, wrong_types, giant, damaged_inside)
    for name, content in make()
]


def form(*parts, boundary="b"):
    body = b"".join(b"--b\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts)
    return {"content": body + b"--b--\r\n", "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"}}


FILE = 'Content-Disposition: form-data; name="image"; filename="photo.png"'
REQUESTS = {
    "a form without boundary": {"content": b"--b", "headers": {"Content-Type": "multipart/form-data"}},
    "a form with another boundary": form((FILE, GOOD["PNG"]), boundary="c"),
    "a form without parts": form(),
    "a form that ends early": {**form((FILE, GOOD["PNG"])), "content": form((FILE, GOOD["PNG"]))["content"][:500]},
    "a form with another field": form((FILE.replace("image", "photo"), GOOD["PNG"])),
    "a form with a text": form(('Content-Disposition: form-data; name="image"', b"/etc/passwd")),
    "a form with two files": form((FILE, GOOD["PNG"]), (FILE, GOOD["PNG"])),
    "a form with an empty file": form((FILE, b"")),
    "a form without a name": form(("Content-Disposition: form-data", GOOD["PNG"])),
    "a form of many fields": form(*((f'Content-Disposition: form-data; name="{i}"', b"x") for i in range(100))),
    "a form with an invalid header": form(("\0\0\0", GOOD["PNG"])),
    "a form with a file that is not an image": form((FILE, b"no image")),
    "a form that is too large": form((FILE, bytes(LIMITS.max_upload_bytes))),
    "an image that is declared as a form": {"content": GOOD["PNG"], "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
    **{
        f"the option {option}": {"content": GOOD["PNG"], "params": dict([option.split("=")])}
        for option in (
            "format=gif", "format=../mask", "alpha=2", "alpha=nan", "alpha=x", "boundary_width=-1",
            "boundary_width=1000000000", "boundary_width=1.5", "legend=maybe", "confidence=2", "model=none",
            "model=../../etc/passwd", "model=\0", f"model={'m' * 5000}",
        )
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def server(model):
    with served(model, limits=LIMITS) as server:
        yield server


def test_200_malformed_uploads_are_refused(server):
    good = server.segment(GOOD["PNG"]).json()["segments"]
    memory = server.metric("process_resident_memory_bytes")
    requests = {f"{number} {name}": {"content": content} for number, (name, content) in enumerate(BODIES)} | REQUESTS
    assert len(requests) >= 200
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda request: server.client.post("/v1/segment", **request), requests.values()))
    statuses = {name: response.status_code for name, response in zip(requests, responses, strict=True)}
    assert {name: status for name, status in statuses.items() if not 400 <= status < 500} == {}
    assert {400, 404, 413, 415, 422} == set(statuses.values())
    for response in responses:
        assert response.headers["content-type"] == "application/problem+json"
        assert "Traceback" not in response.text
    assert [server.client.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    assert server.metric("bpkd_accepted_requests") == 0
    assert server.segment(GOOD["PNG"]).json()["segments"] == good
    assert server.metric("process_resident_memory_bytes") < memory + 200e6


HEADS = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00" + bytes(200),
    "an invalid length": b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    "two lengths": b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "invalid chunks": b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
    "endless headers": b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
    "no host": b"GET /v1/models HTTP/1.0\r\n\r\n",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=list(HEADS))
def test_requests_that_are_not_valid_http_are_refused(server, head):
    with server.connect() as raw:
        raw.sendall(head)
        assert raw.recv(4096).startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
    assert server.client.get("/healthz").status_code == 200


def test_randomly_damaged_images_are_segmented_or_refused(server):
    """A damaged file may still be a valid image; the response is never a server error."""
    rng = seeded()
    uploads = []
    for _ in range(150):
        content = bytearray(GOOD[str(rng.choice(list(GOOD)))])
        for offset in rng.integers(len(content), size=int(rng.integers(1, 8))):
            content[offset] = rng.integers(256)
        uploads.append(bytes(content))
    with ThreadPoolExecutor(8) as pool:
        statuses = [response.status_code for response in pool.map(server.segment, uploads)]
    assert set(statuses) <= {200, 413, 415, 422}
    assert 20 < statuses.count(200) < 140
