"""Path of one segmentation request: read, decode, queue, segment, encode."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from bpkd_sdk.errors import did_you_mean
from bpkd_sdk.runtime.triton import UnreachableError
from bpkd_sdk.serve.networks import ServedModel
from bpkd_sdk.serve.overlay import picture_png
from bpkd_sdk.serve.predictor import Prediction
from bpkd_sdk.serve.service import responses
from bpkd_sdk.serve.service.batching import Batcher
from bpkd_sdk.serve.service.limits import AdmissionControl, Limits, decode_upload, read_upload
from bpkd_sdk.serve.service.metrics import Metrics
from bpkd_sdk.serve.service.responses import Problem, ResponseFormat

log = logging.getLogger("bpkd_sdk.serve")

T = TypeVar("T")


@dataclass(frozen=True)
class SegmentRequest:
    """Options of a segmentation request.

    Attributes:
        model: Name of the network.
        format: Format of the response.
        confidence: Whether the JSON response contains the mean confidence of each class.
        alpha: Opacity of the class colours in an overlay, 0..1.
        boundary_width: Width of the boundary lines in an overlay in pixels; 0 for no lines.
        legend: Whether an overlay names the classes.
    """

    model: str
    format: ResponseFormat
    confidence: bool = False
    alpha: float = 0.5
    boundary_width: int = 1
    legend: bool = False

    @property
    def needs_confidence(self) -> bool:
        """Whether the network has to predict the confidence of each pixel."""
        return self.format == "confidence" or (self.format == "json" and self.confidence)


class Segmenter:
    """Networks with one batching queue each, behind a common admission control.

    Args:
        models: Networks to serve.
        limits: Limits of requests and images.
        metrics: Metrics that record every batch.
        batch_size: Maximum images per batch.
        max_wait: Maximum seconds that an image waits for others of its size.
        parallel: Number of batches of one network at the same time.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        limits: Limits,
        metrics: Metrics,
        *,
        batch_size: int,
        max_wait: float,
        parallel: int,
    ) -> None:
        self.limits = limits
        self.admission = AdmissionControl(limits)
        self.batchers = {
            model.name: Batcher(
                model.predictor,
                batch_size=batch_size,
                max_wait=max_wait,
                parallel=parallel,
                on_batch=partial(metrics.observe_batch, model.name),
            )
            for model in models
        }
        # At most four threads, because each of them holds a whole image while it decodes or encodes.
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="images")
        metrics.accepted_requests.set_function(lambda: self.admission.requests)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start all networks; at the end finish the accepted images and stop the threads."""
        for batcher in self.batchers.values():
            batcher.start()
        yield
        for batcher in self.batchers.values():
            await asyncio.to_thread(batcher.close)
        self._threads.shutdown()

    @property
    def is_ready(self) -> bool:
        """Whether every network has segmented its first image and can be reached."""
        return all(batcher.ready.is_set() for batcher in self.batchers.values())

    @property
    def is_alive(self) -> bool:
        """Whether the threads of every network are running."""
        return all(batcher.is_alive for batcher in self.batchers.values())

    async def segment(self, http_request: Request, request: SegmentRequest) -> Response:
        """Segment the image in an HTTP request.

        Raises:
            Problem: For invalid requests and images, a full queue, a network that cannot be reached, and a timeout.
        """
        batcher = self._find_batcher(request)
        with self.admission.admit_request():
            upload = await read_upload(http_request, self.limits)
            try:
                async with asyncio.timeout(self.limits.timeout):
                    return await _run_while_connected(http_request, self._process(upload, request, batcher))
            except TimeoutError:
                raise Problem(
                    HTTPStatus.GATEWAY_TIMEOUT,
                    f"The segmentation took more than {self.limits.timeout:g} s; try again when the queue is shorter.",
                ) from None
            except UnreachableError as error:
                log.warning("%s: %s", request.model, error)
                raise Problem(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    f"The server that runs {request.model!r} cannot be reached or does not respond; try again in some "
                    "seconds.",
                    headers={"Retry-After": "5"},
                ) from error

    def _find_batcher(self, request: SegmentRequest) -> Batcher:
        if request.model not in self.batchers:
            raise Problem(
                HTTPStatus.NOT_FOUND,
                f"Expected `model` to be one of {', '.join(map(repr, self.batchers))}, but got {request.model!r}."
                f"{did_you_mean(request.model, self.batchers)}",
            )
        batcher = self.batchers[request.model]
        if request.needs_confidence and not batcher.predictor.has_probabilities:
            raise Problem(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                f"{request.model!r} returns masks without confidence. Serve the checkpoint, or export with "
                "argmax=False.",
            )
        return batcher

    async def _process(self, upload: bytes, request: SegmentRequest, batcher: Batcher) -> Response:
        timings_ms: dict[str, float] = {}
        pixels = batcher.predictor.pixels
        image = await self._run_in_thread("decode", timings_ms, lambda: decode_upload(upload, self.limits, pixels))
        with self.admission.admit_image(image):
            result = await asyncio.wrap_future(batcher.submit(image, confidence=request.needs_confidence))
            timings_ms |= result.timings_ms
            content = await self._run_in_thread(
                "encode", timings_ms, lambda: encode(result.prediction, request, timings_ms)
            )
        return responses.segmentation_response(content, request.format, timings_ms)

    async def _run_in_thread(self, stage: str, timings_ms: dict[str, float], function: Callable[[], T]) -> T:
        """Run a function in a thread and add its milliseconds to the timings, the wait for the thread included."""
        start = time.perf_counter()
        result = await asyncio.get_running_loop().run_in_executor(self._threads, function)
        timings_ms[stage] = 1000 * (time.perf_counter() - start)
        return result


def encode(prediction: Prediction, request: SegmentRequest, timings_ms: dict[str, float]) -> bytes:
    """Encode a prediction as the body of a response.

    Args:
        prediction: Prediction of the image.
        request: Options of the request.
        timings_ms: Milliseconds per stage, for JSON.
    """
    if request.format == "mask":
        return prediction.mask_png()
    if request.format == "confidence":
        return responses.confidence_png(prediction)
    if request.format == "overlay":
        overlay = prediction.overlay(
            boundaries=request.boundary_width > 0,
            boundary_width=max(1, request.boundary_width),
            alpha=request.alpha,
            legend=request.legend,
        )
        return picture_png(overlay)
    height, width = prediction.mask.shape
    segmentation = responses.Segmentation(
        model=request.model,
        size=(height, width),
        segments=responses.list_segments(prediction),
        timings_ms=timings_ms,
    )
    return segmentation.model_dump_json().encode()


async def _run_while_connected(http_request: Request, work: Awaitable[T]) -> T:
    """Return the result of some work; cancel the work and raise ClientDisconnect if the client disconnects."""
    job, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(http_request))
    try:
        await asyncio.wait((job, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientDisconnect
        return job.result()
    finally:
        job.cancel()
        disconnect.cancel()


async def _wait_for_disconnect(http_request: Request) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass  # discard what remains of the body
