"""How much a server takes in: bytes, pixels, requests at a time, seconds. Each bound holds while the thing comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import numpy as np
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message, Receive

from bpkd_sdk.images import TooLargeError, UnknownFormatError, read_image
from bpkd_sdk.serve.service.responses import Problem

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # TIFF's many codecs are not for strangers
FIELD = "image"  # of a form

_LONGEST = 8  # times the side of the largest square: most of one side; networks pad what is thin, and pay for it


@dataclass(frozen=True)
class Limits:
    """The bounds.

    Attributes:
        body: Most bytes of a request to segment an image.
        any_body: Most bytes of any other request; the page for people takes videos.
        pixels: Most pixels of an image or a frame, checked before it is decoded.
        frames: Most frames of a video.
        requests: Most requests that are accepted and not answered yet; more get 503.
        largest: Room for the pixels of so many images of the largest size, decoded and not answered yet; more get 503.
        seconds: For an upload, and again for its answer.
    """

    body: int = 20_000_000
    any_body: int = 200_000_000
    pixels: int = 4096 * 4096
    frames: int = 20_000
    requests: int = 64
    largest: int = 8
    seconds: float = 30.0


class AdmissionControl:
    """Lets in as many requests and pixels as there is room for."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self._pixels = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Room for a request, or a `Problem`."""
        if self.requests >= self.limits.requests:
            raise _busy()
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def image(self, image: np.ndarray) -> Iterator[None]:
        """Room for a decoded image, or a `Problem`."""
        pixels = image.shape[0] * image.shape[1]
        if self._pixels + pixels > self.limits.largest * self.limits.pixels:
            raise _busy()
        self._pixels += pixels
        try:
            yield
        finally:
            self._pixels -= pixels


def _busy() -> Problem:
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, "The queue is full; try again in a second.", Retry_After="1")


async def read_upload(request: Request, limits: Limits) -> bytes:
    """The bytes of the image in a request: its body, or the file in the field `image` of a form.

    Raises:
        Problem: If there is none, there is more than allowed, or it comes too slowly.
    """
    if int(request.headers.get("content-length", 0)) > limits.body:
        raise too_long(limits.body)
    request = Request(request.scope, bounded(request.receive, limits.body))
    try:
        async with asyncio.timeout(limits.seconds):
            if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
                content = await _from_form(request)
            else:
                content = await request.body()
    except TimeoutError:
        raise Problem(
            HTTPStatus.REQUEST_TIMEOUT, f"The upload took more than {limits.seconds:g} s.", Connection="close"
        ) from None
    if not content:
        raise Problem(HTTPStatus.BAD_REQUEST, f"Send an image as the body, or in the field `{FIELD}` of a form.")
    return content


def bounded(receive: Receive, most: int) -> Receive:
    """The same messages of a request; a `Problem` as soon as its body has more bytes than allowed."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            raise too_long(most)
        return message

    return counted


async def _from_form(request: Request) -> bytes:
    async with request.form(max_files=1, max_fields=8) as form:
        file = form.get(FIELD)
        return await file.read() if isinstance(file, UploadFile) else b""


def too_long(most: int) -> Problem:
    """A request has more bytes than allowed."""
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A request may have {most:,} bytes at most.")


def read_bounded(path: Path, most: int) -> bytes:
    """A file that a stranger sent; TooLargeError if it has more bytes than allowed."""
    if (size := path.stat().st_size) > most:
        raise TooLargeError(f"Expected a file of at most {most:,} bytes, but got {size:,}.")
    return path.read_bytes()


def read_untrusted_image(content: bytes, limits: Limits) -> np.ndarray:
    """The image in a file that a stranger sent, uint8 (H, W, 3) RGB.

    Raises:
        UnknownFormatError: If it is none of the `FORMATS`.
        TooLargeError: If it has too many pixels, or too many in a row.
        ValueError: If it is damaged. No message names a path.
    """
    image = read_image(content, largest=limits.pixels, formats=FORMATS)
    height, width, _ = image.shape
    if max(height, width) > _LONGEST * limits.pixels**0.5:
        raise TooLargeError(f"An image of {height} x {width} is too long and thin.")
    return image


def decode(content: bytes, limits: Limits) -> np.ndarray:
    """As `read_untrusted_image`, but every error is a `Problem`."""
    try:
        return read_untrusted_image(content, limits)
    except UnknownFormatError as error:
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, str(error)) from error
    except TooLargeError as error:
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error)) from error
    except ValueError as error:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
