"""Prometheus metrics of the server, and the middleware that counts, times and logs each request."""

from __future__ import annotations

import logging
import time
from http import HTTPStatus

from asgi_correlation_id import correlation_id
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bpkd_sdk.serve.service.batching import BatchResult

log = logging.getLogger("bpkd_sdk.serve")

PATHS = ("/v1/segment", "/v1/models", "/healthz", "/readyz", "/metrics")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Prometheus metrics of one server, in a separate registry.

    Attributes:
        accepted_requests: Gauge of the requests that are accepted and not yet answered.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.accepted_requests = Gauge(
            "bpkd_accepted_requests", "Requests accepted and not yet answered.", registry=registry
        )
        self._requests = Counter(
            "bpkd_http_requests",
            "HTTP requests; status 0 if the client disconnected before the response.",
            ["path", "status"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            "bpkd_http_request_seconds",
            "Seconds from request to response.",
            ["path"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._batch_images = Histogram(
            "bpkd_batch_images", "Images per batch.", ["model"], registry=registry, buckets=(1, 2, 4, 8, 16, 32)
        )
        self._stage_seconds = Histogram(
            "bpkd_stage_seconds",
            "Seconds per image and stage; queue: waiting time; pre, inference, post: its share of the batch.",
            ["model", "stage"],
            registry=registry,
            buckets=_SECONDS,
        )

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """Record an HTTP request; status 0 if the client disconnected before the response."""
        path = path if path in PATHS else "other"  # clients can invent paths, and each label value takes memory
        self._requests.labels(path, status).inc()
        self._request_seconds.labels(path).observe(seconds)

    def observe_batch(self, model: str, results: list[BatchResult]) -> None:
        """Record a batch that a network has segmented."""
        self._batch_images.labels(model).observe(len(results))
        for result in results:
            for stage, milliseconds in result.timings_ms.items():
                self._stage_seconds.labels(model, stage).observe(milliseconds / 1000)

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class RequestMetricsMiddleware:
    """ASGI middleware that counts, times and logs each HTTP request.

    Args:
        app: Application to observe.
        metrics: Metrics that record the requests.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            seconds = time.perf_counter() - start
            self.metrics.observe_request(scope["path"], status, seconds)
            # The many files of the demo page and the frequent health probes are logged at DEBUG only.
            is_important = scope["path"].startswith("/v1/") or status >= HTTPStatus.BAD_REQUEST
            log.log(
                logging.INFO if is_important else logging.DEBUG,
                "%s %s %r: %s, %.0f ms",
                correlation_id.get(), scope["method"], scope["path"], status or "client disconnected", 1000 * seconds,
            )  # fmt: skip
