"""HTTP server: listening socket, the demo page on the same application, and a shutdown that finishes requests."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bpkd_sdk.serve.networks import ModelSet
from bpkd_sdk.serve.service.limits import Limits
from bpkd_sdk.serve.service.responses import add_problem_handlers

_GRACE_SECONDS = 5.0  # beyond the timeout of a request, before a stopping server closes open connections
_SERVICE_PATHS = "/v1/"  # a stopping server finishes requests to these paths


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket on an address; port 0 selects any free port.

    Raises:
        OSError: If the address does not belong to this machine, or the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        advice = "Specify a --host that is an address of this machine."
        if error.errno == errno.EADDRINUSE:
            advice = "Choose another --port; 0 takes any that is free."
        raise OSError(f"Cannot listen on {host}, port {port}: {error.strerror}. {advice}") from error
    # Connections inherit the option. asyncio sets it only on sockets that it creates itself; without it the body of a
    # response waits 40 ms behind its head for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def format_url(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def mount_demo(
    app: FastAPI,
    models: ModelSet,
    *,
    examples: Path | None,
    limits: Limits,
) -> None:
    """Mount the demo page on the root path of the application, behind the same security checks.

    Args:
        app: Application that `create_app` returned.
        models: Networks to show.
        examples: Folder of example images, as in `build_demo`.
        limits: Limits of uploads.
    """
    import gradio

    from bpkd_sdk.serve.demo import build_demo, page_options

    page = build_demo(models, examples=examples, limits=limits)
    options = {"max_file_size": page.max_file_bytes, "show_error": False, "run_history": False, "ssr_mode": False}
    gradio.mount_gradio_app(app, page, "/", **(page_options() | options))
    mounted = app.routes[-1]
    assert isinstance(mounted, Mount) and isinstance(mounted.app, FastAPI)  # noqa: S101, PT018  (added by Gradio)
    add_problem_handlers(mounted.app)


class StreamShutdownMiddleware:
    """ASGI middleware that ends the streams of open pages when the server stops.

    When `stopping` is set, requests outside of ``/v1/`` receive a disconnect of their client, which every streaming
    response waits for. Responses that have started get a regular end.

    Args:
        app: Application whose streams end.
        stopping: Event that is set when the server stops.
    """

    def __init__(self, app: ASGIApp, stopping: asyncio.Event) -> None:
        self.app = app
        self.stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or scope["path"].startswith(_SERVICE_PATHS):
            await self.app(scope, receive, send)
            return
        is_unfinished = False

        async def send_and_note_end(message: Message) -> None:
            nonlocal is_unfinished
            is_unfinished = message["type"] == "http.response.start" or message.get("more_body", False)
            await send(message)

        await self.app(scope, self._receive_until_stopping(receive), send_and_note_end)
        if is_unfinished and self.stopping.is_set():
            await send({"type": "http.response.body", "body": b""})

    def _receive_until_stopping(self, receive: Receive) -> Receive:
        async def receive_or_disconnect() -> Message:
            if self.stopping.is_set():  # without waiting, because `Request.is_disconnected` does not wait
                return {"type": "http.disconnect"}
            message, stop = asyncio.ensure_future(receive()), asyncio.ensure_future(self.stopping.wait())
            try:
                await asyncio.wait((message, stop), return_when=asyncio.FIRST_COMPLETED)
                return message.result() if message.done() else {"type": "http.disconnect"}
            finally:
                message.cancel()
                stop.cancel()

        return receive_or_disconnect


class _Server(uvicorn.Server):
    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams of open pages, then shut down as uvicorn does."""
        self.app.state.stopping.set()
        await super().shutdown(sockets)


def make_server(app: FastAPI, *, timeout: float) -> uvicorn.Server:
    """Return a server for an application; setting its `should_exit` stops it.

    A stopping server accepts no new connections, finishes accepted requests, and closes remaining connections some
    seconds after the timeout of a request.

    Args:
        app: Application that `create_app` returned.
        timeout: Timeout of a request in seconds.
    """
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=round(timeout + _GRACE_SECONDS),
        ws="none",
    )
    return _Server(app, config)


def run(app: FastAPI, listener: socket.socket, *, timeout: float) -> None:
    """Serve an application until SIGINT or SIGTERM, then stop as described in `make_server`.

    Args:
        app: Application that `create_app` returned.
        listener: Socket that `listen` returned.
        timeout: Timeout of a request in seconds.
    """
    # After the shutdown uvicorn raises the signal again. As KeyboardInterrupt it does not kill the process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        make_server(app, timeout=timeout).run(sockets=[listener])
