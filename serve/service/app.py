"""Segmentation over HTTP, for programs: an image in, a mask out. The demo is mounted on the same application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from bpkd_sdk import __version__
from bpkd_sdk.models.spec import Color
from bpkd_sdk.serve.networks import ModelSet, ServedModel
from bpkd_sdk.serve.service.limits import FIELD, FORMATS, Limits
from bpkd_sdk.serve.service.metrics import CONTENT_TYPE, Metrics
from bpkd_sdk.serve.service.responses import (
    Format,
    Problem,
    Segmentation,
    choose_format,
    media_type,
    problem_response,
    to_problem,
)
from bpkd_sdk.serve.service.security import Access, EndStreams, SecurityMiddleware
from bpkd_sdk.serve.service.segmenter import Segmenter, SegmentRequest

log = logging.getLogger("bpkd_sdk.serve")


class Served(BaseModel):
    """A network that can be asked for."""

    name: str
    device: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    has_confidence: bool


def create_app(
    models: ModelSet,
    *,
    access: Access | None = None,
    limits: Limits | None = None,
    batch_size: int = 8,
    max_wait: float = 0.002,
    parallel: int = 1,
) -> FastAPI:
    """The application: ``POST /v1/segment``, ``GET /v1/models``, health, metrics and documentation.

    Args:
        models: Networks to serve, from `open_models`. The first student answers requests that name no network.
        access: Who may use it; None: everybody on this machine.
        limits: Of what comes in; None: the defaults.
        batch_size: Most images that go through a network together.
        max_wait: Seconds for which an image waits for others at most.
        parallel: Batches of one network at the same time: 1 for a device of its own, more for a Triton server.

    Raises:
        ValueError: If no network could be opened; the message contains the reasons.
    """
    networks = _available(models)
    default = models.students[0].name if models.students else None
    metrics, limits = Metrics(), limits or Limits()
    segmenter = Segmenter(networks, limits, metrics, batch_size=batch_size, max_wait=max_wait, parallel=parallel)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with segmenter.running():
            yield

    app = FastAPIOffline(
        title="bpkd serve", version=__version__, description=_DESCRIPTION, lifespan=lifespan, redoc_url=None
    )
    app.state.stopping = asyncio.Event()
    app.add_middleware(EndStreams, stopping=app.state.stopping)
    app.add_middleware(
        SecurityMiddleware, access=access or Access(), metrics=metrics, largest=max(limits.body, limits.any_body)
    )
    _explain_problems(app)
    _add_segment(app, segmenter, default)
    _add_models(app, networks)
    _add_health(app, segmenter, metrics)
    return app


def _available(models: ModelSet) -> list[ServedModel]:
    """The students, then the teacher; those that are not available are logged."""
    for model in models.unavailable:
        log.warning("%s is left out: %s", model.name, model.reason)
    if not models.available:
        reasons = "\n".join(f"  {model.name}: {model.reason}" for model in models.unavailable)
        raise ValueError(f"There is no network to serve.\n{reasons}")
    return [*models.students, *([] if models.teacher is None else [models.teacher])]


def _add_segment(app: FastAPI, segmenter: Segmenter, default: str | None) -> None:
    @app.post("/v1/segment", response_class=Response, responses=_RESPONSES, openapi_extra=_REQUEST)
    async def segment(
        request: Request,
        model: Annotated[
            str | None, Query(description="A name from /v1/models; without it, the first student.")
        ] = None,
        format: Annotated[
            Format | None, Query(description="Of the answer; without it, what the Accept header prefers.")
        ] = None,
        confidence: Annotated[bool, Query(description="JSON: add the mean confidence of each class.")] = False,
        alpha: Annotated[float, Query(ge=0, le=1, description="Overlay: of the colours.")] = 0.5,
        boundary_width: Annotated[int, Query(ge=0, le=64, description="Overlay: pixels; 0 for no lines.")] = 1,
        legend: Annotated[bool, Query(description="Overlay: add a strip that names the classes.")] = False,
    ) -> Response:
        """Segment an image."""
        name = model or default
        if name is None:
            raise Problem(HTTPStatus.NOT_FOUND, "No student could be opened here. Name a `model` of /v1/models.")
        chosen = choose_format(format, request.headers.get("accept", ""))
        if chosen is None:
            raise Problem(HTTPStatus.NOT_ACCEPTABLE, "Answers are application/json or image/png.")
        content, stages = await segmenter.answer(
            request, SegmentRequest(name, chosen, confidence, alpha, boundary_width, legend)
        )
        timing = ", ".join(f"{stage};dur={milliseconds:.2f}" for stage, milliseconds in stages.items())
        headers = {"Server-Timing": timing, "Cache-Control": "no-store"}
        return Response(content, media_type=media_type(chosen), headers=headers)


def _add_models(app: FastAPI, networks: Sequence[ServedModel]) -> None:
    @app.get("/v1/models")
    async def models() -> list[Served]:
        """The networks that can be asked for; the first student answers where none is named."""
        return [
            Served(
                name=network.name,
                device=str(network.predictor.runtime.device),
                class_names=network.predictor.class_names,
                palette=network.predictor.palette,
                has_confidence=network.predictor.has_probabilities,
            )
            for network in networks
        ]


def _add_health(app: FastAPI, segmenter: Segmenter, metrics: Metrics) -> None:
    def told(fine: bool, word: str) -> Response:
        status = HTTPStatus.OK if fine else HTTPStatus.SERVICE_UNAVAILABLE
        return Response(word if fine else f"not {word}", status, media_type="text/plain")

    @app.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        """Whether the server lives; if not, start it again."""
        return told(segmenter.is_alive, "alive")

    @app.get("/readyz", response_class=Response)
    async def readyz() -> Response:
        """Whether requests may be sent: every network has seen its first image, and can be reached."""
        return told(segmenter.is_ready, "ready")

    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _explain_problems(app: FastAPI) -> None:
    """All that is refused is refused in one form."""

    async def explain(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            told = "; ".join(f"{item['loc'][-1]}: {item['msg']}" for item in error.errors())
            error = Problem(HTTPStatus.UNPROCESSABLE_ENTITY, told)
        elif isinstance(error, HTTPException):
            error = to_problem(error)
        assert isinstance(error, Problem)  # noqa: S101  (the three kinds below)
        return problem_response(error, request.state.request_id)

    for kind in (Problem, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, explain)


_DESCRIPTION = """Semantic segmentation: an image in, its classes out.

    curl --data-binary @photo.jpg 'http://127.0.0.1:7860/v1/segment?format=mask' -o mask.png

Errors are `application/problem+json`; their `request_id` is in the server's log."""

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            **{f"image/{name.lower()}": _BINARY for name in FORMATS},
            "multipart/form-data": {
                "schema": {"type": "object", "required": [FIELD], "properties": {FIELD: _BINARY["schema"]}}
            },
        },
    }
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Segmentation,
        "description": "JSON; or a PNG: the mask (its pixel values are class ids), an overlay, or the confidence.",
        "content": {"image/png": _BINARY},
    },
    400: {"description": "No image in the request."},
    401: {"description": "A token or password is missing."},
    404: {"description": "No such network."},
    408: {"description": "The upload took too long."},
    413: {"description": "Too many bytes or pixels."},
    415: {"description": f"None of {', '.join(FORMATS)}, by its content."},
    422: {"description": "A damaged file, a wrong parameter, or confidence of a network that has none."},
    503: {"description": "The queue is full, or the network out of reach; `Retry-After` says when to come again."},
    504: {"description": "The answer took too long."},
}
