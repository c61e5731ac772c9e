"""The way of one request: bytes in, decoded, queued, segmented, encoded, bytes out."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

import numpy as np
from starlette.requests import ClientDisconnect, Request

from bpkd_sdk.errors import did_you_mean
from bpkd_sdk.runtime.triton import UnreachableError
from bpkd_sdk.serve.networks import ServedModel
from bpkd_sdk.serve.overlay import draw_overlay, picture_png
from bpkd_sdk.serve.predictor import Prediction
from bpkd_sdk.serve.service import responses
from bpkd_sdk.serve.service.batching import Batcher
from bpkd_sdk.serve.service.limits import AdmissionControl, Limits, decode, read_upload
from bpkd_sdk.serve.service.metrics import Metrics
from bpkd_sdk.serve.service.responses import Problem

log = logging.getLogger("bpkd_sdk.serve")

T = TypeVar("T")


@dataclass(frozen=True)
class SegmentRequest:
    """What a client asks for.

    Attributes:
        model: A network's name.
        format: Of the answer.
        confidence: Whether JSON has the mean confidence of each class.
        alpha: Of an overlay's colours, 0..1.
        boundary_width: Of an overlay's lines in pixels; 0 for none.
        legend: Whether an overlay names the classes.
    """

    model: str
    format: responses.Format
    confidence: bool = False
    alpha: float = 0.5
    boundary_width: int = 1
    legend: bool = False


class Segmenter:
    """Networks with a queue each, and the room for all requests.

    Args:
        networks: Networks to serve.
        limits: Of what comes in.
        metrics: Hears of every batch.
        batch_size: Most images that go through a network together.
        max_wait: Seconds for which an image waits for others at most.
        parallel: Batches of one network at the same time.
    """

    def __init__(
        self,
        networks: Sequence[ServedModel],
        limits: Limits,
        metrics: Metrics,
        *,
        batch_size: int,
        max_wait: float,
        parallel: int,
    ) -> None:
        self.limits = limits
        self.gate = AdmissionControl(limits)
        self.batchers = {
            network.name: Batcher(
                network.predictor,
                size=batch_size,
                wait=max_wait,
                parallel=parallel,
                observe=metrics.observe(network.name),
            )
            for network in networks
        }
        # So few that the images being decoded and encoded stay within reach of the machine's memory.
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="images")
        metrics.watch_accepted(lambda: self.gate.requests)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """From the first image, which warms every network up, to the last that was accepted."""
        for batcher in self.batchers.values():
            batcher.start()
        yield
        for batcher in self.batchers.values():
            await asyncio.to_thread(batcher.close)
        self._threads.shutdown()

    @property
    def is_ready(self) -> bool:
        """Whether every network has seen its first image, and can be reached."""
        return all(batcher.ready.is_set() for batcher in self.batchers.values())

    @property
    def is_alive(self) -> bool:
        """Whether every network's threads run."""
        return all(batcher.is_alive for batcher in self.batchers.values())

    async def answer(self, request: Request, wish: SegmentRequest) -> tuple[bytes, dict[str, float]]:
        """The answer to a request, and the milliseconds of each stage.

        Raises:
            Problem: For all that is the client's doing, a full queue, and an answer that takes too long.
        """
        batcher = self._find(wish)
        with self.gate.request():
            upload = await read_upload(request, self.limits)
            try:
                async with asyncio.timeout(self.limits.seconds):
                    return await _while_connected(request, self._segment(upload, wish, batcher))
            except TimeoutError:
                raise Problem(
                    HTTPStatus.GATEWAY_TIMEOUT, f"The answer took more than {self.limits.seconds:g} s; too many wait."
                ) from None
            except UnreachableError as error:
                log.warning("%s: %s", wish.model, error)
                raise Problem(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    f"What runs {wish.model!r} cannot be reached, or does not answer; try again in some seconds.",
                    Retry_After="5",
                ) from error

    def _find(self, wish: SegmentRequest) -> Batcher:
        if wish.model not in self.batchers:
            raise Problem(
                HTTPStatus.NOT_FOUND,
                f"There is no network {wish.model!r}; there are {', '.join(map(repr, self.batchers))}."
                f"{did_you_mean(wish.model, self.batchers)}",
            )
        batcher = self.batchers[wish.model]
        if _needs_confidence(wish) and not batcher.predictor.has_probabilities:
            raise Problem(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                f"{wish.model!r} returns masks without confidence. Serve the checkpoint, or export with argmax=False.",
            )
        return batcher

    async def _segment(self, upload: bytes, wish: SegmentRequest, batcher: Batcher) -> tuple[bytes, dict[str, float]]:
        stages: dict[str, float] = {}
        image = await self._timed("decode", stages, lambda: decode(upload, self.limits))
        with self.gate.image(image):
            done = await asyncio.wrap_future(batcher.submit(image, confidence=_needs_confidence(wish)))
            stages |= done.stages_ms
            told = dict(stages)
            content = await self._timed("encode", stages, lambda: encode(image, done.prediction, wish, told))
        return content, stages

    async def _timed(self, stage: str, stages: dict[str, float], work: Callable[[], T]) -> T:
        """Do some work on a thread; the wait for the thread counts."""
        start = time.perf_counter()
        result = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        stages[stage] = 1000 * (time.perf_counter() - start)
        return result


def _needs_confidence(wish: SegmentRequest) -> bool:
    return wish.format == "confidence" or (wish.format == "json" and wish.confidence)


def encode(image: np.ndarray, prediction: Prediction, wish: SegmentRequest, stages: dict[str, float]) -> bytes:
    """The body of an answer."""
    if wish.format == "mask":
        return responses.mask_png(prediction)
    if wish.format == "confidence":
        return responses.confidence_png(prediction)
    if wish.format == "overlay":
        picture = draw_overlay(
            image,
            prediction.mask,
            prediction.palette,
            class_names=prediction.class_names,
            boundaries=wish.boundary_width > 0,
            boundary_width=max(1, wish.boundary_width),
            alpha=wish.alpha,
            ignore_index=-1,  # no id is void: networks are sure of every pixel, and 255 may be a class
            legend=wish.legend,
        )
        return picture_png(picture)
    height, width = prediction.mask.shape
    segments = responses.segments(prediction)
    found = responses.Segmentation(model=wish.model, size=(height, width), segments=segments, timings_ms=stages)
    return found.model_dump_json().encode()


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is given up when the client leaves."""
    job, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((job, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientDisconnect
        return job.result()
    finally:
        job.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass  # what is left of the body
