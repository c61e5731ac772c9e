"""Responses of the service: masks, overlays and confidence as PNG, segments as JSON, and errors as problem details."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

import numpy as np
from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from bpkd_sdk.serve.overlay import encode_png
from bpkd_sdk.serve.predictor import Prediction
from bpkd_sdk.spec import Color

ResponseFormat = Literal["json", "mask", "overlay", "confidence"]


class Problem(Exception):  # noqa: N818  (RFC 9457 calls the response of an error a problem)
    """Error that becomes an ``application/problem+json`` response.

    Args:
        status: HTTP status of the response.
        detail: Explanation for the client.
        headers: Additional headers of the response.
    """

    def __init__(self, status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = headers


def problem_response(problem: Problem) -> JSONResponse:
    """Return a problem as ``application/problem+json`` (RFC 9457), with the id of the current request."""
    content = {
        "status": problem.status.value,
        "title": problem.status.phrase,
        "detail": str(problem),
        "request_id": correlation_id.get(),
    }
    return JSONResponse(content, problem.status, problem.headers, "application/problem+json")


def add_problem_handlers(app: FastAPI) -> None:
    """Let an application return every error of a route as ``application/problem+json``."""

    @app.exception_handler(Problem)
    async def handle_problem(_: Request, error: Problem) -> Response:
        return problem_response(error)

    @app.exception_handler(HTTPException)
    async def handle_http_exception(_: Request, error: HTTPException) -> Response:
        return problem_response(Problem(HTTPStatus(error.status_code), str(error.detail), error.headers))

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(_: Request, error: RequestValidationError) -> Response:
        detail = "; ".join(f"{item['loc'][-1]}: {item['msg']}" for item in error.errors())
        return problem_response(Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail))


def segmentation_response(content: bytes, format: ResponseFormat, timings_ms: Mapping[str, float]) -> Response:
    """Return an encoded segmentation, with the milliseconds of each stage in the Server-Timing header."""
    timing = ", ".join(f"{stage};dur={milliseconds:.2f}" for stage, milliseconds in timings_ms.items())
    return Response(
        content,
        media_type="application/json" if format == "json" else "image/png",
        headers={"Server-Timing": timing, "Cache-Control": "no-store"},
    )


class RunLengths(BaseModel):
    """Uncompressed run lengths of COCO, as `pycocotools.mask.frPyObjects` reads them."""

    size: tuple[int, int] = Field(description="Height and width of the image in pixels.")
    counts: list[int] = Field(
        description="Lengths of the runs outside, inside, outside, ... the class in pixels, column by column from the "
        "top left."
    )


class Segment(BaseModel):
    """All pixels of one class."""

    class_id: int
    class_name: str
    color: Color = Field(description="RGB colour, 0..255.")
    area: int = Field(description="Number of pixels.")
    share: float = Field(description="Share of the image, 0..1.")
    confidence: float | None = Field(
        None, description="Mean probability of the class over its pixels, 0..1; null unless requested."
    )
    rle: RunLengths


class Segmentation(BaseModel):
    """Segmentation of an image."""

    model: str = Field(description="Name of the network.")
    size: tuple[int, int] = Field(description="Height and width of the image in pixels.")
    segments: list[Segment] = Field(description="Classes in the image, ordered by id.")
    timings_ms: dict[str, float] = Field(
        description="Milliseconds per stage. decode: reading the file; queue: waiting for other images and for the "
        "network; pre, inference, post: this image's share of its batch."
    )


def confidence_png(prediction: Prediction) -> bytes:
    """Encode the probability of each pixel's class, 0..1, as a grey PNG of values 0..255."""
    assert prediction.confidence is not None  # noqa: S101  (requested with the image)
    return encode_png(Image.fromarray(np.rint(255 * prediction.confidence).astype(np.uint8)))


def list_segments(prediction: Prediction) -> list[Segment]:
    """Return area, run lengths and, if predicted, mean confidence of every class in the mask."""
    mask = prediction.mask
    height, width = mask.shape
    areas = np.bincount(mask.ravel(), minlength=256)
    confidence_sums = None
    if prediction.confidence is not None:
        confidence_sums = np.bincount(mask.ravel(), weights=prediction.confidence.ravel(), minlength=256)
    return [
        Segment(
            class_id=class_id,
            class_name=prediction.class_names[class_id],
            color=prediction.palette[class_id],
            area=int(areas[class_id]),
            share=float(areas[class_id] / mask.size),
            confidence=None if confidence_sums is None else float(confidence_sums[class_id] / areas[class_id]),
            rle=RunLengths(size=(height, width), counts=counts),
        )
        for class_id, counts in run_lengths(mask).items()
    ]


def run_lengths(mask: np.ndarray) -> dict[int, list[int]]:
    """Return COCO's run lengths of every class in a mask (H, W): outside, inside, outside, ..., column by column.

    Examples:
        >>> run_lengths(np.array([[0, 0, 1], [0, 1, 1]]))
        {0: [0, 3, 3], 1: [3, 3]}
    """
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts, ends = np.concatenate([[0], changes]), np.concatenate([changes, [pixels.size]])
    classes = pixels[starts]
    return {
        int(class_id): _outside_inside(starts[classes == class_id], ends[classes == class_id], pixels.size)
        for class_id in np.unique(classes)
    }


def _outside_inside(starts: np.ndarray, ends: np.ndarray, pixels: int) -> list[int]:
    counts: list[int] = np.diff(np.column_stack([starts, ends]).ravel(), prepend=0, append=pixels).tolist()
    return counts[:-1] if counts[-1] == 0 else counts  # COCO omits an empty last run
