"""FastAPI application: segmentation over HTTP, list of networks, health and metrics. The demo page is mounted on it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI, Query, Request, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import PlainTextResponse

from bpkd_sdk import __version__
from bpkd_sdk.images import RAW_FORMATS
from bpkd_sdk.serve.networks import ModelSet, ServedModel, check_models
from bpkd_sdk.serve.service.limits import FORM_FIELD, IMAGE_FORMATS, BodyLimitMiddleware, Limits, upload_formats
from bpkd_sdk.serve.service.metrics import Metrics, RequestMetricsMiddleware
from bpkd_sdk.serve.service.responses import Problem, ResponseFormat, Segmentation, add_problem_handlers
from bpkd_sdk.serve.service.security import AccessPolicy, SecurityMiddleware
from bpkd_sdk.serve.service.segmenter import Segmenter, SegmentRequest
from bpkd_sdk.serve.service.server import StreamShutdownMiddleware
from bpkd_sdk.spec import Color

log = logging.getLogger("bpkd_sdk.serve")


class ModelInfo(BaseModel):
    """Network that the server can run.

    Attributes:
        name: Name of the network.
        device: Device that runs it.
        class_names: Name of each class id.
        palette: RGB colour of each class id.
        has_confidence: Whether confidence can be requested.
        channels: Number of channels of the images.
        value_range: Lowest and highest value of a channel.
        formats: Formats of the files that can be sent.
        pictures: How overlays show the channels; empty for RGB images.
    """

    name: str
    device: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    has_confidence: bool
    channels: int
    value_range: tuple[float, float]
    formats: tuple[str, ...]
    pictures: str


def create_app(
    models: ModelSet,
    *,
    access: AccessPolicy | None = None,
    limits: Limits | None = None,
    batch_size: int = 8,
    max_wait: float = 0.002,
    parallel: int = 1,
) -> FastAPI:
    """Create the application: ``POST /v1/segment``, ``GET /v1/models``, health, metrics and documentation.

    Args:
        models: Networks to serve, from `open_models`. The first student is the default of ``/v1/segment``; the teacher
            is used only by requests that name it.
        access: Credentials and hosts to accept; None accepts every request from this machine.
        limits: Limits of requests and images; None for the defaults.
        batch_size: Maximum images per batch.
        max_wait: Maximum seconds that an image waits for others of its size.
        parallel: Number of batches of one network at the same time: 1 for a GPU or CPU of this machine, more for a
            Triton server.

    Raises:
        ValueError: If no network could be opened; the message contains the reasons.
    """
    check_models(models)
    _report_unavailable(models)
    served = [*models.students, *([] if models.teacher is None else [models.teacher])]
    default = models.students[0].name if models.students else None
    metrics, limits = Metrics(), limits or Limits()
    segmenter = Segmenter(served, limits, metrics, batch_size=batch_size, max_wait=max_wait, parallel=parallel)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with segmenter.running():
            yield

    app = FastAPIOffline(
        title="bpkd serve", version=__version__, description=_DESCRIPTION, lifespan=lifespan, redoc_url=None
    )
    _add_middleware(app, access or AccessPolicy(), limits, metrics)
    add_problem_handlers(app)
    _add_segment(app, segmenter, default)
    _add_models(app, served)
    _add_health(app, segmenter)
    _add_metrics(app, metrics)
    return app


def _report_unavailable(models: ModelSet) -> None:
    """Log the networks that could not be opened; raise ValueError if no network is available."""
    for model in models.unavailable:
        log.warning("%s is not served: %s", model.name, model.reason)
    if not models.available:
        reasons = "\n".join(f"  {model.name}: {model.reason}" for model in models.unavailable)
        raise ValueError(f"Expected at least one network, but none could be opened:\n{reasons}")


def _add_middleware(app: FastAPI, access: AccessPolicy, limits: Limits, metrics: Metrics) -> None:
    """Add the middleware, the innermost first; it handles every path, the mounted demo page included."""
    app.state.stopping = asyncio.Event()
    app.add_middleware(StreamShutdownMiddleware, stopping=app.state.stopping)
    app.add_middleware(BodyLimitMiddleware, max_bytes=max(limits.max_upload_bytes, limits.max_request_bytes))
    app.add_middleware(SecurityMiddleware, access=access)
    app.add_middleware(RequestMetricsMiddleware, metrics=metrics)
    # The server creates every id: with an id of the client's, log lines of different requests could get mixed up.
    app.add_middleware(CorrelationIdMiddleware, validator=None, transformer=lambda _: uuid.uuid4().hex)


def _add_segment(app: FastAPI, segmenter: Segmenter, default: str | None) -> None:
    @app.post("/v1/segment", response_class=Response, responses=_RESPONSES, openapi_extra=_REQUEST)
    async def segment(
        http_request: Request,
        model: Annotated[
            str | None, Query(description="Name of a network in /v1/models. Default: the first student.")
        ] = None,
        format: Annotated[
            ResponseFormat,
            Query(description="Format of the response: JSON, or a PNG of the mask, the overlay or the confidence."),
        ] = "json",
        confidence: Annotated[bool, Query(description="JSON: add the mean confidence of each class.")] = False,
        alpha: Annotated[float, Query(ge=0, le=1, description="Overlay: opacity of the class colours.")] = 0.5,
        boundary_width: Annotated[
            int, Query(ge=0, le=64, description="Overlay: width of the boundary lines in pixels; 0 for no lines.")
        ] = 1,
        legend: Annotated[bool, Query(description="Overlay: add a strip with the names of the classes.")] = False,
    ) -> Response:
        """Segment an image."""
        name = model or default
        if name is None:
            raise Problem(
                HTTPStatus.NOT_FOUND, "No student could be opened. Specify a `model` that /v1/models contains."
            )
        request = SegmentRequest(name, format, confidence, alpha, boundary_width, legend)
        return await segmenter.segment(http_request, request)


def _add_models(app: FastAPI, served: Sequence[ServedModel]) -> None:
    @app.get("/v1/models")
    async def models() -> list[ModelInfo]:
        """List the networks that the server can run."""
        return [
            ModelInfo(
                name=model.name,
                device=str(model.predictor.runtime.device),
                class_names=model.predictor.class_names,
                palette=model.predictor.palette,
                has_confidence=model.predictor.has_probabilities,
                channels=model.predictor.pixels.channels,
                value_range=model.predictor.pixels.value_range,
                formats=upload_formats(model.predictor.pixels),
                pictures=model.predictor.pixels.picture_rule,
            )
            for model in served
        ]


def _add_health(app: FastAPI, segmenter: Segmenter) -> None:
    def health_response(state: str, is_true: bool) -> Response:
        if is_true:
            return PlainTextResponse(state)
        return PlainTextResponse(f"not {state}", HTTPStatus.SERVICE_UNAVAILABLE)

    @app.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        """Return 200 while the server works; after any other status it should be restarted."""
        return health_response("alive", segmenter.is_alive)

    @app.get("/readyz", response_class=Response)
    async def readyz() -> Response:
        """Return 200 while every network has segmented its first image and can be reached."""
        return health_response("ready", segmenter.is_ready)


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """Return the metrics of the server in the text format of Prometheus."""
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


_DESCRIPTION = """Semantic segmentation: send an image, receive the class of each pixel.

    curl --data-binary @photo.jpg 'http://127.0.0.1:7860/v1/segment?format=mask' -o mask.png

A network of other channels than RGB takes TIFF, NPY and PNG files with the original values; `/v1/models` states them.

Errors are `application/problem+json`; the server's log contains their `request_id`."""

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            **{f"image/{name.lower()}": _BINARY for name in (*IMAGE_FORMATS, "TIFF")},
            "application/octet-stream": _BINARY,
            "multipart/form-data": {
                "schema": {"type": "object", "required": [FORM_FIELD], "properties": {FORM_FIELD: _BINARY["schema"]}}
            },
        },
    }
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Segmentation,
        "description": "JSON, or a PNG: the mask (its pixel values are class ids), the overlay, or the confidence.",
        "content": {"image/png": _BINARY},
    },
    400: {"description": "The request contains no image."},
    401: {"description": "The request contains no valid token or password."},
    404: {"description": "The network does not exist."},
    408: {"description": "The upload took too long."},
    413: {"description": "The request has too many bytes, or the image too many pixels."},
    415: {
        "description": f"The content of the file is none of {', '.join(IMAGE_FORMATS)}; or, for a "
        f"network of other channels than RGB, none of {', '.join(RAW_FORMATS)}."
    },
    422: {
        "description": "The file is damaged, a parameter is invalid, or confidence is requested from a network that "
        "returns masks only."
    },
    503: {
        "description": "The queue is full, or the network cannot be reached; `Retry-After` contains the seconds to "
        "wait before the next attempt."
    },
    504: {"description": "The segmentation took too long."},
}
