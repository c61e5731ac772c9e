"""Dynamic batching: images of one size that wait for the same network are segmented together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from bpkd_sdk.runtime.triton import UnreachableError
from bpkd_sdk.serve.predictor import Prediction, Predictor

log = logging.getLogger("bpkd_sdk.serve")

_RETRY_SECONDS = 5.0  # between two attempts with a network that fails
_WARM_UP_SIZE = (256, 256)  # for a network without a fixed input size


@dataclass(frozen=True)
class BatchResult:
    """Prediction of one image of a batch.

    Attributes:
        prediction: Prediction of the image; its timings are the image's share of the batch's.
        queue_ms: Milliseconds from `Batcher.submit` to the start of the batch.
    """

    prediction: Prediction
    queue_ms: float

    @property
    def timings_ms(self) -> dict[str, float]:
        """Milliseconds per stage, from queue to mask."""
        timings = self.prediction.timings
        return {"queue": self.queue_ms, "pre": timings.pre, "inference": timings.inference, "post": timings.post}


@dataclass(eq=False)
class _Job:
    image: np.ndarray
    confidence: bool
    future: Future[BatchResult] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Key that all jobs of a batch share."""
        return (*self.image.shape, self.confidence)


class Batcher:
    """Queue of images in front of a network, and the threads that segment them in batches.

    The queue itself has no limit: `AdmissionControl` limits the requests that reach it.

    Args:
        predictor: Network that segments the images.
        batch_size: Maximum images per batch.
        max_wait: Maximum seconds that an image waits for others of its size.
        parallel: Number of batches at the same time; 1 suits a network on a GPU or CPU of this machine.
        on_batch: Function that is called with the results of each batch.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        batch_size: int,
        max_wait: float,
        parallel: int,
        on_batch: Callable[[list[BatchResult]], None],
    ) -> None:
        self.predictor = predictor
        self.batch_size = batch_size
        self.max_wait = max_wait
        self.ready = threading.Event()
        self._on_batch = on_batch
        self._queue: list[_Job] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(parallel)]

    def start(self) -> None:
        """Start the threads. `ready` is set as soon as the network has segmented its first image."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Segment the images in the queue, then stop the threads."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether all threads are running."""
        return all(thread.is_alive() for thread in self._threads)

    def submit(self, image: np.ndarray, *, confidence: bool = False) -> Future[BatchResult]:
        """Add an image to the queue and return its future, which can be cancelled until its batch starts.

        Args:
            image: Image (H, W, channels) in the format of the network.
            confidence: Whether to predict the confidence of each pixel.

        Raises:
            RuntimeError: If the server is stopping.
        """
        job = _Job(image, confidence)
        with self._changed:
            if self._is_closing:
                raise RuntimeError("The server is stopping and accepts no more images.")
            self._queue.append(job)
            self._changed.notify()
        return job.future

    def _work(self) -> None:
        self._warm_up()
        while (batch := self._next_batch()) is not None:
            if batch:
                self._run(batch)
            else:
                self._warm_up()

    def _warm_up(self) -> None:
        """Segment a black image, so that no client waits for the network's one-time set-up; set `ready` on success."""
        height, width = self.predictor.runtime.metadata.get("input_size", _WARM_UP_SIZE)
        try:
            pixels = self.predictor.pixels
            dtype = np.uint8 if pixels.is_uint8 else np.float32
            self.predictor(np.full((height, width, pixels.channels), pixels.value_range[0], dtype))
        except Exception as error:
            log.warning(
                "%s fails on a black image, so the server is not ready; next attempt in %g s: %s",
                self.predictor.runtime.name, _RETRY_SECONDS, error, exc_info=not isinstance(error, UnreachableError),
            )  # fmt: skip
            return
        self.ready.set()

    def _next_batch(self) -> list[_Job] | None:
        """Wait for the next batch and remove it from the queue.

        Returns:
            The jobs of the batch; an empty list if the queue was empty for `_RETRY_SECONDS` while the network was not
            ready, so that the network is tried again; None if the queue is empty and the server is stopping.
        """
        with self._changed:
            while True:
                self._queue = [job for job in self._queue if not job.future.cancelled()]
                if not self._queue:
                    if self._is_closing:
                        return None
                    if not self._changed.wait(None if self.ready.is_set() else _RETRY_SECONDS):
                        return []
                    continue
                seconds_left = self._queue[0].arrived + self.max_wait - time.monotonic()
                batch = self._select_batch(is_due=seconds_left <= 0 or self._is_closing)
                if batch:
                    self._queue = [job for job in self._queue if job not in batch]
                    self._changed.notify()  # the remaining jobs may be the next batch of another thread
                    return batch
                self._changed.wait(seconds_left)

    def _select_batch(self, *, is_due: bool) -> list[_Job]:
        """Return the batch of the oldest job if that is due, otherwise a full batch; empty if there is none."""
        groups: dict[tuple[object, ...], list[_Job]] = {}
        for job in self._queue:
            groups.setdefault(job.batch_key, []).append(job)
        if is_due:
            return groups[self._queue[0].batch_key][: self.batch_size]
        return next((jobs[: self.batch_size] for jobs in groups.values() if len(jobs) >= self.batch_size), [])

    def _run(self, batch: list[_Job]) -> None:
        jobs = [job for job in batch if job.future.set_running_or_notify_cancel()]
        if not jobs:
            return
        started = time.monotonic()
        try:
            predictions = self.predictor([job.image for job in jobs], confidence=jobs[0].confidence)
        except Exception as error:
            if isinstance(error, UnreachableError):
                self.ready.clear()
            for job in jobs:
                job.future.set_exception(error)
            return
        self.ready.set()
        results = [
            BatchResult(prediction, 1000 * (started - job.arrived))
            for job, prediction in zip(jobs, predictions, strict=True)
        ]
        self._on_batch(results)
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
