"""A prediction in the forms that go over the wire: PNG of the mask, of an overlay, of the confidence, or JSON."""

from __future__ import annotations

import io
from http import HTTPStatus
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from bpkd_sdk.models.spec import Color
from bpkd_sdk.serve.predictor import Prediction


class Problem(Exception):  # noqa: N818  (the name of what is sent: RFC 9457)
    """Why a request is not answered, in words for the client."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def problem_response(problem: Problem, request_id: str) -> JSONResponse:
    """A problem as ``application/problem+json`` (RFC 9457)."""
    content = {
        "status": problem.status.value,
        "title": problem.status.phrase,
        "detail": str(problem),
        "request_id": request_id,
    }
    return JSONResponse(content, problem.status, problem.headers, "application/problem+json")


def to_problem(error: HTTPException) -> Problem:
    """A problem from an error of Starlette's."""
    return Problem(HTTPStatus(error.status_code), str(error.detail), **dict(error.headers or {}))


Format = Literal["json", "mask", "overlay", "confidence"]

_JSON, _PNG = "application/json", "image/png"
_FAST = 1  # zlib's quickest level; masks pack well at any


class RunLengths(BaseModel):
    """COCO's uncompressed run lengths, as `pycocotools.mask.frPyObjects` takes them."""

    size: tuple[int, int] = Field(description="Height and width of the image, in pixels.")
    counts: list[int] = Field(
        description="Pixels outside, inside, outside, ... the class, column by column from the top left."
    )


class Segment(BaseModel):
    """All pixels of one class."""

    class_id: int
    class_name: str
    color: Color = Field(description="RGB, 0..255.")
    area: int = Field(description="Pixels.")
    share: float = Field(description="Of the image, 0..1.")
    confidence: float | None = Field(
        None, description="Mean probability of the class over its pixels, 0..1; null unless asked for."
    )
    rle: RunLengths


class Segmentation(BaseModel):
    """What a network sees in an image."""

    model: str
    size: tuple[int, int] = Field(description="Height and width of the image, in pixels.")
    segments: list[Segment] = Field(description="The classes present, by id.")
    timings_ms: dict[str, float] = Field(
        description="decode: the file; queue: waiting for others and for the network; pre, inference, post: this "
        "image's share of its batch."
    )


def choose_format(asked: Format | None, accept: str) -> Format | None:
    """The format of the query, otherwise by the Accept header (RFC 9110): a PNG is the mask. None if none will do.

    Of what is as welcome, the one that is named more closely is taken, then JSON.
    """
    if asked is not None:
        return asked
    ranges = dict(map(_media_range, (accept or "*/*").split(",")))

    def welcome(kind: str) -> tuple[float, int]:
        closest_first = (kind, f"{kind.partition('/')[0]}/*", "*/*")
        weights = [(ranges[name], -step) for step, name in enumerate(closest_first) if name in ranges]
        return weights[0] if weights else (0.0, 0)

    best = max((_JSON, _PNG), key=welcome)
    if welcome(best)[0] <= 0:
        return None
    return "json" if best == _JSON else "mask"


def _media_range(text: str) -> tuple[str, float]:
    kind, *parameters = (part.strip().lower() for part in text.split(";"))
    weights = [parameter[2:] for parameter in parameters if parameter.startswith("q=")]
    try:
        return kind, float(weights[0]) if weights else 1.0
    except ValueError:
        return kind, 0.0


def media_type(kind: Format) -> str:
    """Of an answer in this format."""
    return _JSON if kind == "json" else _PNG


def mask_png(prediction: Prediction) -> bytes:
    """A palette PNG whose pixel values are the class ids."""
    image = Image.fromarray(prediction.mask)
    image.putpalette([channel for color in prediction.palette for channel in color])
    return _png(image)


def confidence_png(prediction: Prediction) -> bytes:
    """A grey PNG: the probability of the class in the mask, 0..1 as 0..255."""
    assert prediction.confidence is not None  # noqa: S101  (asked for with the image)
    return _png(Image.fromarray(np.rint(255 * prediction.confidence).astype(np.uint8)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=_FAST)
    return buffer.getvalue()


def segments(prediction: Prediction) -> list[Segment]:
    """Area, run lengths and, if it is known, confidence of every class present."""
    mask = prediction.mask
    height, width = mask.shape
    areas = np.bincount(mask.ravel(), minlength=256)
    sums = None
    if prediction.confidence is not None:
        sums = np.bincount(mask.ravel(), weights=prediction.confidence.ravel(), minlength=256)
    return [
        Segment(
            class_id=class_id,
            class_name=prediction.class_names[class_id],
            color=prediction.palette[class_id],
            area=int(areas[class_id]),
            share=float(areas[class_id] / mask.size),
            confidence=None if sums is None else float(sums[class_id] / areas[class_id]),
            rle=RunLengths(size=(height, width), counts=counts),
        )
        for class_id, counts in run_lengths(mask).items()
    ]


def run_lengths(mask: np.ndarray) -> dict[int, list[int]]:
    """For every class of a mask (H, W): lengths of the runs outside, inside, outside, ... it, column by column.

    Example:
        >>> run_lengths(np.array([[0, 0, 1], [0, 1, 1]]))
        {0: [0, 3, 3], 1: [3, 3]}
    """
    pixels = mask.ravel(order="F")
    cuts = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts, ends = np.concatenate([[0], cuts]), np.concatenate([cuts, [pixels.size]])
    of_run = pixels[starts]
    return {
        int(class_id): _counts(starts[of_run == class_id], ends[of_run == class_id], pixels.size)
        for class_id in np.unique(of_run)
    }


def _counts(starts: np.ndarray, ends: np.ndarray, pixels: int) -> list[int]:
    counts: list[int] = np.diff(np.column_stack([starts, ends]).ravel(), prepend=0, append=pixels).tolist()
    return counts[:-1] if counts[-1] == 0 else counts
