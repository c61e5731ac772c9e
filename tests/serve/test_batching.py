"""Many requests at once, and how long each may take."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from starlette.responses import StreamingResponse

from bpkd_sdk.serve.service.limits import Limits
from tests.serve.cases import SIZE, accepted, encoded, in_background, network, pixels, scene, served, wait_until


def test_32_clients_get_their_own_masks(server, student):
    images = [scene(*size, index) for index, size in enumerate([(48, 64), (64, 48), (90, 101), (48, 64)])]
    expected = [student(image).mask for image in images]

    def client(number):
        with httpx.Client(base_url=server.client.base_url, timeout=30) as own:
            for turn in range(3):
                which = (number + turn) % len(images)
                answer = own.post("/v1/segment?format=mask", content=encoded(images[which]))
                np.testing.assert_array_equal(pixels(answer), expected[which])

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(client, range(32)))


def test_waiting_requests_are_put_together():
    """Eight of one size and four of another, four at most together, however long the first has to wait: three batches."""
    with served(network(), batch_size=4, max_wait=20.0) as server, ThreadPoolExecutor(12) as pool:
        wide, tall = encoded(scene(48, 64)), encoded(scene(64, 48))
        answers = list(pool.map(server.segment, [wide, tall, wide] * 4))
        assert {answer.status_code for answer in answers} == {200}
        assert server.metric("bpkd_batch_images_count") == 3
        assert server.metric("bpkd_batch_images_sum") == 12
        assert server.metric("bpkd_batch_images_bucket", le="2.0") == 0


def test_a_full_batch_does_not_wait_behind_one_that_is_not():
    with served(network(), batch_size=2, max_wait=1.0) as server, ThreadPoolExecutor(1) as pool:
        alone = pool.submit(server.segment, encoded(scene(64, 48)))
        accepted(server, 1)
        with in_background(server, 2, encoded(scene(48, 64))) as pair:
            queued = [request.result().json()["timings_ms"]["queue"] for request in pair]
        assert max(queued) < 900
        assert alone.result().json()["timings_ms"]["queue"] >= 1000


def test_a_single_request_waits_for_others_but_not_for_long():
    with served(network(), batch_size=4, max_wait=0.3) as server:
        assert 300 <= server.segment(encoded(scene(*SIZE))).json()["timings_ms"]["queue"] < 3000
    with served(network(), batch_size=1, max_wait=20.0) as server:
        assert server.segment(encoded(scene(*SIZE))).json()["timings_ms"]["queue"] < 3000


def test_a_full_queue_says_so_and_empties(held):
    content = encoded(scene(*SIZE))
    with served(held, limits=Limits(requests=3)) as server:
        held.hold()
        with in_background(server, 3, content) as waiting:
            accepted(server, 3)
            refused = server.segment(content)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert "The queue is full" in refused.json()["detail"]
            assert server.client.get("/healthz").status_code == 200
            held.go.set()
            assert [request.result().status_code for request in waiting] == [200] * 3
        assert server.segment(content).status_code == 200


def test_the_pixels_that_wait_are_bounded_too(held):
    """There is room for two of the largest images, or for eight of half the height and width."""
    large, small = encoded(scene(*SIZE)), encoded(scene(SIZE[0] // 2, SIZE[1] // 2))
    with served(held, limits=Limits(pixels=SIZE[0] * SIZE[1], largest=2)) as server:
        for content, room in ((large, 2), (small, 8)):
            held.hold()
            with in_background(server, room, content) as waiting:
                accepted(server, room)
                wait_until(lambda content=content: server.segment(content).status_code == 503)
                held.go.set()
                assert {request.result().status_code for request in waiting} == {200}
            assert server.segment(content).status_code == 200


def test_an_answer_has_a_time_limit(held):
    content = encoded(scene(*SIZE))
    with served(held, limits=Limits(seconds=0.5), batch_size=1) as server:
        held.hold()
        start = time.monotonic()
        with in_background(server, 3, content) as requests:
            answers = [request.result() for request in requests]
        assert {answer.status_code for answer in answers} == {504}
        assert 0.5 <= time.monotonic() - start < 5
        assert server.metric("bpkd_accepted_requests") == 0
        held.go.set()
        assert server.segment(content).status_code == 200
        assert (
            server.metric("bpkd_batch_images_sum") == 2
        )  # the one under way and the last; nobody waited for the others


def send_head(raw, length):
    raw.sendall(f"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())


def test_an_upload_has_a_time_limit():
    with served(network(), limits=Limits(seconds=0.3)) as server, server.connect() as raw:
        send_head(raw, "Content-Length: 1000")
        raw.sendall(b"x" * 10)
        assert raw.recv(4096).startswith(b"HTTP/1.1 408")
        wait_until(lambda: raw.recv(4096) == b"")  # the connection is closed


def test_an_upload_is_refused_while_it_comes_in():
    with served(network(), limits=Limits(body=100_000)) as server:
        with server.connect() as raw:
            send_head(raw, "Transfer-Encoding: chunked")
            chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
            for _ in range(11):  # 110,000 bytes of an upload without an end
                raw.sendall(chunk)
            assert raw.recv(4096).startswith(b"HTTP/1.1 413")
        with server.connect() as raw:
            send_head(raw, "Content-Length: 100001")  # and nothing more
            assert raw.recv(4096).startswith(b"HTTP/1.1 413")
        assert server.segment(bytes(1_000_000)).status_code == 413
        form = server.client.post("/v1/segment", files={"image": bytes(1_000_000)})
        assert form.status_code == 413


def test_nothing_is_done_for_a_client_that_has_left(held):
    content = encoded(scene(*SIZE))
    with served(held, batch_size=1) as server:
        held.hold()
        with in_background(server, 1, content) as (first,):
            assert held.started.wait(20)
            with server.connect() as raw:
                send_head(raw, f"Content-Length: {len(content)}")
                raw.sendall(content)
                accepted(server, 2)
            accepted(server, 1)
            held.go.set()
            assert first.result().status_code == 200
        wait_until(lambda: server.metric("bpkd_http_requests_total", path="/v1/segment", status="0") == 1)
        assert server.metric("bpkd_batch_images_sum") == 1


def test_stopping_finishes_what_was_accepted(held):
    with served(held, batch_size=2) as server:
        held.hold()
        with in_background(server, 5, encoded(scene(*SIZE))) as waiting:
            accepted(server, 5)
            server.server.should_exit = True
            wait_until(lambda: not server.server.servers[0].is_serving())
            with pytest.raises(httpx.ConnectError):
                httpx.get(server.client.base_url.join("/healthz"))
            held.go.set()
            assert [request.result().status_code for request in waiting] == [200] * 5


def test_stopping_ends_the_streams_of_open_pages():
    async def endless():
        while True:
            yield b"tick"
            await asyncio.sleep(3600)

    def add_stream(app):
        app.add_api_route("/stream", lambda: StreamingResponse(endless()))

    with served(network(), prepare=add_stream) as server, server.client.stream("GET", "/stream") as stream:
        ticks = stream.iter_bytes()
        assert next(ticks) == b"tick"
        start = time.monotonic()
        server.server.should_exit = True
        assert list(ticks) == []  # a proper end, not a broken connection
        assert time.monotonic() - start < 10
