"""Limits of requests (bytes, pixels, video frames, queue length, seconds) and the checks that apply them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import numpy as np
from starlette.datastructures import Headers, UploadFile
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bpkd_sdk.images import RAW_FORMATS, TooLargeError, UnknownFormatError, read_pixels
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.serve.service.responses import Problem, problem_response

# No TIFF, whose many codecs are a risk with untrusted files. Networks of other channels get TIFF files too, of which
# `bpkd_sdk.images.read_pixels` decodes only a few lossless codecs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
FORM_FIELD = "image"

# Longest allowed side of an image, relative to the side of the largest square. Networks pad both sides to a multiple of
# their stride, so a very thin image costs far more memory than its number of pixels suggests.
_MAX_SIDE_RATIO = 8


@dataclass(frozen=True)
class Limits:
    """Limits of requests and images.

    Attributes:
        max_upload_bytes: Maximum bytes of an uploaded image.
        max_request_bytes: Maximum bytes of any other request; the demo page receives videos.
        max_pixels: Maximum pixels of an image or video frame, checked before decoding.
        max_frames: Maximum frames of a video.
        max_requests: Maximum requests in progress; more get HTTP 503.
        max_decoded_images: Decoded pixels allowed in flight, as a count of largest images; more get HTTP 503.
        timeout: Seconds allowed for an upload, and again for its segmentation.
    """

    max_upload_bytes: int = 20_000_000
    max_request_bytes: int = 200_000_000
    max_pixels: int = 4096 * 4096
    max_frames: int = 20_000
    max_requests: int = 64
    max_decoded_images: int = 8
    timeout: float = 30.0

    def max_pixels_of(self, pixels: PixelFormat) -> int:
        """Return the maximum pixels of an image, so that one image does not need more than all decoded images may."""
        pixel_bytes = pixels.channels * (1 if pixels.is_uint8 else 4)
        return min(self.max_pixels, 3 * self.max_decoded_images * self.max_pixels // pixel_bytes)


def upload_formats(pixels: PixelFormat) -> tuple[str, ...]:
    """Return the formats of files that visitors can send for images of a `PixelFormat`."""
    return IMAGE_FORMATS if pixels.is_rgb8 or (pixels.channels == 1 and pixels.is_uint8) else RAW_FORMATS


class BodyLimitMiddleware:
    """ASGI middleware that refuses a request as soon as its body exceeds a number of bytes.

    Args:
        app: Application to protect.
        max_bytes: Maximum bytes of a request body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        problem: Problem | None = None
        has_started = False
        receive_limited = limit_body(receive, self.max_bytes)

        async def receive_or_refuse() -> Message:
            nonlocal problem
            try:
                return await receive_limited()
            except Problem as error:
                problem = error
                raise

        async def send_unless_refused(message: Message) -> None:
            # The application may catch the error and send another response, which the 413 replaces.
            nonlocal has_started
            if problem is None:
                has_started = True
                await send(message)

        if content_length(Headers(scope=scope)) > self.max_bytes:
            problem = body_too_long(self.max_bytes)
        else:
            try:
                await self.app(scope, receive_or_refuse, send_unless_refused)
            except Exception:
                if problem is None:
                    raise
        if problem is not None and not has_started:
            await problem_response(problem)(scope, receive, send)


def limit_body(receive: Receive, max_bytes: int) -> Receive:
    """Return a `receive` that raises a `Problem` as soon as the request body exceeds `max_bytes`."""
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise body_too_long(max_bytes)
        return message

    return receive_limited


def content_length(headers: Headers) -> int:
    """Return the body length that a request announces; 0 if it announces none."""
    return int(headers.get("content-length", 0))


def body_too_long(max_bytes: int) -> Problem:
    """Return the `Problem` of a request body that exceeds `max_bytes`."""
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A request may have {max_bytes:,} bytes at most.")


class AdmissionControl:
    """Admission control for HTTP requests: limits the requests in progress and the decoded pixels that they hold.

    Args:
        limits: Limits of requests and images.

    Attributes:
        requests: Number of requests in progress.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self._pixels = 0

    @contextmanager
    def admit_request(self) -> Iterator[None]:
        """Count a request as in progress, or raise a `Problem` with status 503."""
        if self.requests >= self.limits.max_requests:
            raise _queue_full()
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def admit_image(self, image: np.ndarray) -> Iterator[None]:
        """Count the pixels of a decoded image as in flight, as those of an RGB image, or raise a `Problem` (503)."""
        pixels = -(-image.nbytes // 3)
        if self._pixels + pixels > self.limits.max_decoded_images * self.limits.max_pixels:
            raise _queue_full()
        self._pixels += pixels
        try:
            yield
        finally:
            self._pixels -= pixels


def _queue_full() -> Problem:
    return Problem(
        HTTPStatus.SERVICE_UNAVAILABLE, "The queue is full; try again in a second.", headers={"Retry-After": "1"}
    )


async def read_upload(request: Request, limits: Limits) -> bytes:
    """Return the bytes of the uploaded image: the request body, or the file in the form field `image`.

    Raises:
        Problem: If there is no image, the body is too long, or the upload takes too long.
    """
    if content_length(request.headers) > limits.max_upload_bytes:
        raise body_too_long(limits.max_upload_bytes)
    request = Request(request.scope, limit_body(request.receive, limits.max_upload_bytes))
    try:
        async with asyncio.timeout(limits.timeout):
            if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
                content = await _read_form_file(request)
            else:
                content = await request.body()
    except TimeoutError:
        raise Problem(
            HTTPStatus.REQUEST_TIMEOUT,
            f"The upload took more than {limits.timeout:g} s.",
            headers={"Connection": "close"},
        ) from None
    if not content:
        raise Problem(
            HTTPStatus.BAD_REQUEST,
            f"The request contains no image. Send the file as the request body, or in the form field `{FORM_FIELD}`.",
        )
    return content


async def _read_form_file(request: Request) -> bytes:
    async with request.form(max_files=1, max_fields=8) as form:
        file = form.get(FORM_FIELD)
        return await file.read() if isinstance(file, UploadFile) else b""


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Return the content of an untrusted file; raise TooLargeError if it has more than `max_bytes`."""
    if (size := path.stat().st_size) > max_bytes:
        raise TooLargeError(f"Expected a file of at most {max_bytes:,} bytes, but got {size:,}.")
    return path.read_bytes()


def read_untrusted_image(content: bytes, limits: Limits, pixels: PixelFormat) -> np.ndarray:
    """Decode an untrusted image file to (H, W, channels). No error message contains a path.

    Args:
        content: Content of the file.
        limits: Limits of images.
        pixels: Format of the images that the network takes.

    Raises:
        UnknownFormatError: If the format is not one of `upload_formats`.
        TooLargeError: If the image has too many pixels, or is too long and thin.
        ValueError: If the file is damaged.
    """
    max_pixels = limits.max_pixels_of(pixels)
    image = read_pixels(content, pixels, max_pixels=max_pixels, formats=upload_formats(pixels))
    height, width, _ = image.shape
    if max(height, width) > _MAX_SIDE_RATIO * limits.max_pixels**0.5:
        raise TooLargeError(f"An image of {height} x {width} is too long and thin.")
    return image


def decode_upload(content: bytes, limits: Limits, pixels: PixelFormat) -> np.ndarray:
    """Decode an uploaded image as `read_untrusted_image` does; raise every error as a `Problem`."""
    try:
        return read_untrusted_image(content, limits, pixels)
    except UnknownFormatError as error:
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, str(error)) from error
    except TooLargeError as error:
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error)) from error
    except ValueError as error:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
