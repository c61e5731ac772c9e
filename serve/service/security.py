"""Who may use the server: everybody on this machine, or whoever has a token or a password."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bpkd_sdk.serve.service.limits import bounded, too_long
from bpkd_sdk.serve.service.metrics import Metrics
from bpkd_sdk.serve.service.responses import Problem, problem_response


@dataclass(frozen=True)
class Access:
    """What a request has to show. All of the server asks for it: service, documentation and demo.

    A token is taken as ``Authorization: Bearer <token>``, or as the password that a browser asks for, with any user
    name. Without token and user, only requests that name this machine as their host are answered, so that a page in a
    browser cannot reach the server under a name of its own (DNS rebinding).

    Attributes:
        token: A long secret.
        user: A name, together with a password.
        password: Of the user.
        insecure: Let anybody in, under any host name.

    Raises:
        ValueError: For an empty secret, a user without password, or a password without user.
    """

    token: str | None = field(default=None, repr=False)
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    insecure: bool = False

    def __post_init__(self) -> None:
        for name in ("token", "user", "password"):
            if getattr(self, name) == "":
                raise ValueError(f"The {name} is empty, which would let anybody in. Is its variable set?")
        if (self.user is None) != (self.password is None):
            raise ValueError("A user needs a password and a password a user: give both or none.")

    @property
    def is_restricted(self) -> bool:
        """Whether a token or a password is asked for."""
        return self.token is not None or self.user is not None

    def admits(self, authorization: str) -> bool:
        """Whether the value of an Authorization header is good enough; in a time that does not depend on what fits."""
        if not self.is_restricted:
            return True
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "bearer":
            return _same(value.strip(), self.token)
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        return _same(password, self.token) | (_same(user, self.user) & _same(password, self.password))

    def knows_host(self, host: str) -> bool:
        """Whether a Host header is one that requests may name."""
        return self.is_restricted or self.insecure or is_loopback(_without_port(host))

    def check_address(self, host: str) -> None:
        """Raise ValueError if a server on this address would be open to others without anybody having said so."""
        if self.is_restricted or self.insecure or is_loopback(host):
            return
        raise ValueError(
            f"On {host} others could reach this server, and nothing keeps them out. Give --token (a long secret, best "
            "in the variable BPKD_TOKEN) or --user and --password, stay on 127.0.0.1, or say --insecure."
        )


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _same(given: str, expected: str | None) -> bool:
    return expected is not None and hmac.compare_digest(given.encode(), expected.encode())


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


class SecurityMiddleware:
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


FINISHED = "/v1/"  # requests to programs' paths are finished instead


class EndStreams:
    """ASGI middleware: when `stopping` is set, a page's requests see their client leave.

    That is what everything that streams looks out for anyway. What was sent until then gets a proper end.
    """

    def __init__(self, app: ASGIApp, stopping: asyncio.Event) -> None:
        self.app = app
        self.stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["path"].startswith(FINISHED):
            await self.app(scope, receive, send)
            return
        unfinished = False

        async def watched(message: Message) -> None:
            nonlocal unfinished
            unfinished = message["type"] == "http.response.start" or message.get("more_body", False)
            await send(message)

        await self.app(scope, self._until_stopping(receive), watched)
        if unfinished and self.stopping.is_set():
            await send({"type": "http.response.body", "body": b""})

    def _until_stopping(self, receive: Receive) -> Receive:
        async def either() -> Message:
            if self.stopping.is_set():  # at once: `Request.is_disconnected` does not wait
                return {"type": "http.disconnect"}
            message, stop = asyncio.ensure_future(receive()), asyncio.ensure_future(self.stopping.wait())
            try:
                await asyncio.wait((message, stop), return_when=asyncio.FIRST_COMPLETED)
                return message.result() if message.done() else {"type": "http.disconnect"}
            finally:
                message.cancel()
                stop.cancel()

        return either
