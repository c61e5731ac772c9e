"""Open pages keep streams to the server that never end; these end when the server stops, so that it can."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
