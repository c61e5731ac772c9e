"""What the requests of an open page see when the server stops."""

import asyncio

import pytest
from starlette.requests import Request

from bpkd_sdk.serve.service.security import EndStreams


@pytest.mark.parametrize(("path", "after"), [("/gradio_api/queue/data", True), ("/v1/segment", False)])
def test_who_asks_without_waiting_sees_the_client_leave(path, after):
    """A program's request is finished instead."""

    async def seen() -> list[bool]:
        stopping, found = asyncio.Event(), []

        async def app(scope, receive, send):
            request = Request(scope, receive)
            found.append(await request.is_disconnected())
            stopping.set()
            found.append(await request.is_disconnected())

        async def receive():
            await asyncio.Event().wait()

        async def send(message):
            raise AssertionError(message)

        await EndStreams(app, stopping)({"type": "http", "path": path, "method": "GET", "headers": []}, receive, send)
        return found

    assert asyncio.run(seen()) == [False, after]
