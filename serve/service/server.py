"""The application on a port of this machine, until it is told to stop."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from bpkd_sdk.serve.networks import ModelSet
from bpkd_sdk.serve.service.limits import Limits

_GRACE = 5.0  # seconds beyond the time limit of a request, for what is left open when the server stops


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address; port 0 stands for any that is free.

    Raises:
        OSError: If the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        advice = "Choose another --port; 0 takes any that is free." if taken else "Is this address this machine's?"
        raise OSError(f"Cannot listen on {host}, port {port}: {error.strerror}. {advice}") from error
    # Connections inherit it. asyncio sets it only on sockets that it makes itself; without it an answer's body waits
    # 40 ms behind its head for the client's delayed acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def url_of(listening: socket.socket) -> str:
    """The address to type into a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def mount_demo(
    app: FastAPI,
    models: ModelSet,
    *,
    examples: Path | None,
    limits: Limits,
) -> None:
    """Put the page for people on the root of the application, behind the same door.

    Args:
        app: Of `create_app`.
        models: Networks to show.
        examples: Folder of example images, as `build_demo` takes it.
        limits: Limits of the images and videos that visitors send.
    """
    import gradio

    from bpkd_sdk.serve.demo import build_demo, page_options

    page = build_demo(models, examples=examples, limits=limits)
    safe = {"max_file_size": page.max_upload_bytes, "show_error": False, "run_history": False, "ssr_mode": False}
    gradio.mount_gradio_app(app, page, "/", **(page_options() | safe))


class _Server(uvicorn.Server):
    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell the application first, so that the streams of open pages end."""
        self.app.state.stopping.set()
        await super().shutdown(sockets)


def make_server(app: FastAPI, *, seconds: float) -> uvicorn.Server:
    """A server for `run`; `should_exit` stops it.

    It then takes no new connections, finishes what it has accepted, and closes the rest after `seconds` and a few more.
    """
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=round(seconds + _GRACE),
        ws="none",
    )
    return _Server(app, config)


def run(app: FastAPI, listening: socket.socket, *, seconds: float) -> None:
    """Serve until SIGINT or SIGTERM, then stop as `make_server` says.

    Args:
        app: Of `create_app`.
        listening: Of `listen`.
        seconds: The time limit of a request.
    """
    # When all is finished, uvicorn raises the signal that has stopped it again: it must not end what comes after.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        make_server(app, seconds=seconds).run(sockets=[listening])
