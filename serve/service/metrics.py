"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from bpkd_sdk.serve.service.batching import Batched

CONTENT_TYPE = CONTENT_TYPE_LATEST
PATHS = ("/v1/segment", "/v1/models", "/healthz", "/readyz", "/metrics")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """One server's counters, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = Counter(
            "bpkd_http_requests", "Requests; status 0: the client left.", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "bpkd_http_request_seconds", "From request to answer.", ["path"], registry=self.registry, buckets=_SECONDS
        )
        self._accepted = Gauge("bpkd_accepted_requests", "Accepted and not answered yet.", registry=self.registry)
        self._batch = Histogram(
            "bpkd_batch_images", "Images that went through together.", ["model"], registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32),
        )  # fmt: skip
        self._stage = Histogram(
            "bpkd_stage_seconds",
            "Queue: an image's wait; pre, inference, post: its share of the batch's.",
            ["model", "stage"],
            registry=self.registry,
            buckets=_SECONDS,
        )

    def count(self, path: str, status: int, seconds: float) -> None:
        """One request answered."""
        # Only paths that are known: a client could make up as many as it likes.
        path = path if path in PATHS else "other"
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def watch_accepted(self, read: Callable[[], float]) -> None:
        """Where to read how many requests are accepted and not answered."""
        self._accepted.set_function(read)

    def observe(self, model: str) -> Callable[[list[Batched]], None]:
        """What a network's `Batcher` calls."""

        def seen(batch: list[Batched]) -> None:
            self._batch.labels(model).observe(len(batch))
            for done in batch:
                for stage, milliseconds in done.stages_ms.items():
                    self._stage.labels(model, stage).observe(milliseconds / 1000)

        return seen

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
