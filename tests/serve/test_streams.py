"""Streams of open pages while the server stops."""

import asyncio

import pytest
from starlette.requests import Request

from bpkd_sdk.serve.service.server import StreamShutdownMiddleware


@pytest.mark.parametrize(
    ("path", "is_disconnected"), [("/gradio_api/queue/data", True), ("/v1/segment", False)], ids=["page", "service"]
)
def test_only_requests_of_the_page_are_disconnected_when_the_server_stops(path, is_disconnected):
    async def observe() -> list[bool]:
        stopping, states = asyncio.Event(), []

        async def app(scope, receive, send):
            request = Request(scope, receive)
            states.append(await request.is_disconnected())
            stopping.set()
            states.append(await request.is_disconnected())

        async def receive():
            await asyncio.Event().wait()

        async def send(message):
            raise AssertionError(message)

        scope = {"type": "http", "path": path, "method": "GET", "headers": []}
        await StreamShutdownMiddleware(app, stopping)(scope, receive, send)
        return states

    assert asyncio.run(observe()) == [False, is_disconnected]
