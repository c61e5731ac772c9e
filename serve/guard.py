"""What stands in front of the whole server, service and demo alike: who is let in, what is said about failures."""

from __future__ import annotations

import logging
import re
import time
import uuid
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bpkd_sdk.serve.access import Access
from bpkd_sdk.serve.limits import bounded, too_long
from bpkd_sdk.serve.metrics import Metrics
from bpkd_sdk.serve.problem import Problem, problem_response

log = logging.getLogger("bpkd_sdk.serve")

_FETCHES = re.compile(r"/gradio_api/(file[=/]\s*https?:|proxy=)", re.IGNORECASE)  # Gradio would, for anybody who asks
OPEN_PATHS = ("/healthz", "/readyz")  # those who ask for health have no secrets, and learn none
HEADERS = {
    # Everything comes from this server, nothing from elsewhere. Gradio's pages need the inline scripts.
    "Content-Security-Policy": "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
}


class Guard:
    """ASGI middleware: refuses who may not come in, names every request, keeps tracebacks on this side.

    Each request gets an id, which its answer carries as ``X-Request-ID`` and the log names. No answer has CORS headers,
    those that Gradio gives are taken off, so a browser lets no page of another origin read an answer; what such a page
    sends is refused. No request may have more bytes than the `largest`.
    """

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics, largest: int) -> None:
        self.app = app
        self.access = access
        self.metrics = metrics
        self.largest = largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            # The start and stop of the server. Web sockets, which nothing here speaks, end before they begin.
            await (self.app(scope, receive, send) if scope["type"] == "lifespan" else send({"type": "websocket.close"}))
            return
        request_id = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        start, status = time.perf_counter(), 0
        refusal: Problem | None = None
        body = bounded(receive, self.largest)

        async def take() -> Message:
            nonlocal refusal
            try:
                return await body()
            except Problem as problem:
                refusal = problem
                raise

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
                headers.update(HEADERS | {"X-Request-ID": request_id})
            await send(message)

        async def answer_unless_refused(message: Message) -> None:
            if refusal is None:  # otherwise whoever was reading has his own idea of what went wrong
                await answer(message)

        try:
            try:
                self._check(scope)
                await self.app(scope, take, answer_unless_refused)
            except Problem as problem:
                refusal = problem
            except ClientDisconnect:
                pass  # nobody is there to be answered
            except Exception:
                if refusal is None:
                    log.exception("request %s failed: %s %r", request_id, scope["method"], scope["path"])
                    refusal = _unexpected()
            if refusal is not None and status == 0:
                await problem_response(refusal, request_id)(scope, receive, answer)
        finally:
            self._note(request_id, scope, status, time.perf_counter() - start)

    def _note(self, request_id: str, scope: Scope, status: int, seconds: float) -> None:
        self.metrics.count(scope["path"], status, seconds)
        # The many files of a page, and those who ask for health every second, would hide the rest.
        level = logging.INFO if scope["path"].startswith("/v1/") or status >= HTTPStatus.BAD_REQUEST else logging.DEBUG
        milliseconds = 1000 * seconds
        log.log(
            level, "%s %s %r: %s, %.0f ms", request_id, scope["method"], scope["path"], status or "gone", milliseconds
        )

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if not self.access.knows_host(headers.get("host", "")):
            raise Problem(
                HTTPStatus.MISDIRECTED_REQUEST,
                "Without a token this server answers requests to localhost only, and yours names another host.",
            )
        if scope["path"] not in OPEN_PATHS and not self.access.admits(headers.get("authorization", "")):
            raise Problem(
                HTTPStatus.UNAUTHORIZED,
                "This server wants a token (Authorization: Bearer ...) or a user and password.",
                WWW_Authenticate='Basic realm="bpkd", charset="UTF-8"',
            )
        is_own = "origin" not in headers or headers["origin"].partition("://")[2] == headers.get("host")
        if not is_own or (scope["method"] not in ("GET", "HEAD") and headers.get("sec-fetch-site") == "cross-site"):
            raise Problem(
                HTTPStatus.FORBIDDEN,
                "This server takes nothing from pages of other sites. A proxy in front of it has to pass Host on.",
            )
        if _FETCHES.match(scope["path"]):
            raise Problem(HTTPStatus.FORBIDDEN, "This server fetches nothing from elsewhere.")
        if int(headers.get("content-length", 0)) > self.largest:
            raise too_long(self.largest)


def _unexpected() -> Problem:
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong here; the log has it under the request_id.")
