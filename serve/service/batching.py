"""Images that wait for one network go through it together: those of one size, the oldest first."""

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

_RETRY = 5.0  # seconds between two attempts with a network that does not work
_WARM_UP = (256, 256)  # for a network that names no size of its own


@dataclass(frozen=True)
class Batched:
    """A prediction, and how it came about.

    Attributes:
        prediction: Of this image; its timings are its share of the batch's.
        queue_ms: Milliseconds from `Batcher.submit` until its batch was started.
    """

    prediction: Prediction
    queue_ms: float

    @property
    def stages_ms(self) -> dict[str, float]:
        """Where the time went, from queue to mask."""
        timings = self.prediction.timings
        return {"queue": self.queue_ms, "pre": timings.pre, "inference": timings.inference, "post": timings.post}


@dataclass(eq=False)
class _Job:
    image: np.ndarray
    confidence: bool
    future: Future[Batched] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> tuple[object, ...]:
        """Jobs of one kind can go together."""
        return (*self.image.shape, self.confidence)


class Batcher:
    """A queue in front of a network, and the threads that empty it. The queue's length is bounded by who fills it.

    Args:
        predictor: The network.
        size: Most images of a batch.
        wait: Seconds for which the oldest image waits for others of its size at most.
        parallel: Batches at the same time; one is right for a GPU or CPU of one's own.
        observe: Called with every batch that went through.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        size: int = 8,
        wait: float = 0.002,
        parallel: int = 1,
        observe: Callable[[list[Batched]], None] = lambda _: None,
    ) -> None:
        self.predictor = predictor
        self.size = size
        self.wait = wait
        self.ready = threading.Event()
        self._observe = observe
        self._waiting: list[_Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(parallel)]

    def start(self) -> None:
        """Start the threads; `ready` is set while the network works: from its first image on."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Finish what is waiting, then stop the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def submit(self, image: np.ndarray, *, confidence: bool = False) -> Future[Batched]:
        """Queue an image, uint8 (H, W, 3) RGB; its future may be cancelled for as long as it waits."""
        job = _Job(image, confidence)
        with self._changed:
            if self._closing:
                raise RuntimeError("This network takes no more images: the server stops.")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def _work(self) -> None:
        self._try()
        while (batch := self._next()) is not None:
            if batch:
                self._run(batch)
            else:
                self._try()

    def _try(self) -> None:
        # The first image pays for what is set up once: kernels chosen, memory taken. No client should.
        height, width = self.predictor.runtime.metadata.get("input_size", _WARM_UP)
        try:
            self.predictor(np.zeros((height, width, 3), np.uint8))
        except Exception as error:
            log.warning(
                "%s fails on a black image, so the server is not ready; it is tried again every %g s: %s",
                self.predictor.runtime.name, _RETRY, error, exc_info=not isinstance(error, UnreachableError),
            )  # fmt: skip
            return
        self.ready.set()

    def _next(self) -> list[_Job] | None:
        """The next batch: the oldest's, once that has waited long enough, otherwise a full one; None at the end.

        Empty if nothing has come for a while and the network does not work, or not yet: time to try it again.
        """
        with self._changed:
            while True:
                self._waiting = [job for job in self._waiting if not job.future.cancelled()]
                if not self._waiting:
                    if self._closing:
                        return None
                    if not self._changed.wait(None if self.ready.is_set() else _RETRY):
                        return []
                    continue
                left = self._waiting[0].arrived + self.wait - time.monotonic()
                batch = self._together(due=left <= 0 or self._closing)
                if batch:
                    self._waiting = [job for job in self._waiting if job not in batch]
                    self._changed.notify()  # what is left may be the next batch of another thread
                    return batch
                self._changed.wait(left)

    def _together(self, *, due: bool) -> list[_Job]:
        kinds: dict[tuple[object, ...], list[_Job]] = {}
        for job in self._waiting:
            kinds.setdefault(job.kind, []).append(job)
        if due:
            return kinds[self._waiting[0].kind][: self.size]
        return next((jobs[: self.size] for jobs in kinds.values() if len(jobs) >= self.size), [])

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
        done = [
            Batched(prediction, 1000 * (started - job.arrived))
            for job, prediction in zip(jobs, predictions, strict=True)
        ]
        self.ready.set()
        self._observe(done)
        for job, result in zip(jobs, done, strict=True):
            job.future.set_result(result)
