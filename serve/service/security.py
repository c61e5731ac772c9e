"""Request security: credentials, allowed hosts, requests from other sites, and security headers of responses."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
import re
from dataclasses import dataclass, field
from http import HTTPStatus

from asgi_correlation_id import correlation_id
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bpkd_sdk.serve.service.responses import Problem, problem_response

log = logging.getLogger("bpkd_sdk.serve")

OPEN_PATHS = ("/healthz", "/readyz")  # health probes have no credentials, and the responses contain nothing secret

SECURITY_HEADERS = {
    # All content comes from this server. Gradio's pages need the inline scripts and `eval`.
    "Content-Security-Policy": "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
}

# Gradio would download these addresses on behalf of any client (server-side request forgery).
_GRADIO_FETCH = re.compile(r"/gradio_api/(file[=/]\s*https?:|proxy=)", re.IGNORECASE)


@dataclass(frozen=True)
class AccessPolicy:
    """Credentials and hosts that the server accepts. They protect every path: service, documentation and demo page.

    A token is accepted as ``Authorization: Bearer <token>``, or as the password of HTTP basic authentication with any
    user name. Without a token and a user, only requests whose Host header names this machine are answered, so that a
    web page cannot reach the server through a domain that its author controls (DNS rebinding).

    Attributes:
        token: Secret token.
        user: User name; requires a password.
        password: Password of the user.
        insecure: Whether to accept every request, for any host.

    Raises:
        ValueError: For an empty token, user or password, a user without a password, or a password without a user.
    """

    token: str | None = field(default=None, repr=False)
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    insecure: bool = False

    def __post_init__(self) -> None:
        for name in ("token", "user", "password"):
            if getattr(self, name) == "":
                raise ValueError(
                    f"The {name} is empty, which would accept every request. Is its environment variable set?"
                )
        if (self.user is None) != (self.password is None):
            raise ValueError("Expected a user and a password, but got only one of them: specify both or neither.")

    @property
    def requires_credentials(self) -> bool:
        """Whether requests need a token or a password."""
        return self.token is not None or self.user is not None

    def accepts_credentials(self, authorization: str) -> bool:
        """Return whether an Authorization header contains valid credentials, compared in constant time."""
        if not self.requires_credentials:
            return True
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "bearer":
            return _is_equal(value.strip(), self.token)
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        # `|` and `&` always compare all three, so the duration does not depend on which of them match.
        return _is_equal(password, self.token) | (_is_equal(user, self.user) & _is_equal(password, self.password))

    def accepts_host(self, host: str) -> bool:
        """Return whether requests with this Host header are answered."""
        return self.requires_credentials or self.insecure or is_loopback(_strip_port(host))

    def check_address(self, host: str) -> None:
        """Raise ValueError if other machines could reach a server on this address without credentials."""
        if self.requires_credentials or self.insecure or is_loopback(host):
            return
        raise ValueError(
            f"A server on {host} can be reached from other machines, but no credentials are set. Specify --token (a "
            "long secret, preferably in the environment variable BPKD_TOKEN) or --user and --password, use 127.0.0.1, "
            "or specify --insecure."
        )


def is_loopback(host: str) -> bool:
    """Return whether a name or IP address is a loopback address of this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _strip_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_equal(received: str, expected: str | None) -> bool:
    return expected is not None and hmac.compare_digest(received.encode(), expected.encode())


class SecurityMiddleware:
    """ASGI middleware that checks requests, adds security headers, and turns exceptions into problem responses.

    It removes all CORS headers from responses, those of Gradio included, so that a browser lets no page of another site
    read a response. Requests that such a page sends are refused.

    Args:
        app: Application to protect.
        access: Credentials and hosts to accept.
    """

    def __init__(self, app: ASGIApp, access: AccessPolicy) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "websocket":  # neither service nor page uses web sockets
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
                headers.update(SECURITY_HEADERS)
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, send_with_headers)
            return
        except ClientDisconnect:
            return
        except Problem as error:
            problem = error
        except Exception:
            log.exception("request %s failed: %s %r", correlation_id.get(), scope["method"], scope["path"])
            # The response does not contain the exception: its text may contain paths or data.
            problem = Problem(
                HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error; the server's log contains it under the request_id."
            )
        if not has_started:
            await problem_response(problem)(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        """Raise a `Problem` for a request that the server must not answer."""
        headers = Headers(scope=scope)
        if not self.access.accepts_host(headers.get("host", "")):
            raise Problem(
                HTTPStatus.MISDIRECTED_REQUEST,
                "Without credentials this server answers only requests to localhost, but the Host header names another "
                "host.",
            )
        if scope["path"] not in OPEN_PATHS and not self.access.accepts_credentials(headers.get("authorization", "")):
            raise Problem(
                HTTPStatus.UNAUTHORIZED,
                "This server requires a token (Authorization: Bearer ...) or a user and a password.",
                headers={"WWW-Authenticate": 'Basic realm="bpkd", charset="UTF-8"'},
            )
        origin = headers.get("origin")
        is_same_origin = origin is None or origin.partition("://")[2] == headers.get("host")
        is_cross_site = scope["method"] not in ("GET", "HEAD") and headers.get("sec-fetch-site") == "cross-site"
        if not is_same_origin or is_cross_site:
            raise Problem(
                HTTPStatus.FORBIDDEN,
                "This server refuses requests from pages of other sites. A proxy in front of it must forward the Host "
                "header.",
            )
        if _GRADIO_FETCH.match(scope["path"]):
            raise Problem(HTTPStatus.FORBIDDEN, "This server fetches nothing from other addresses.")
