"""Concurrent requests: batching, queue limits, timeouts, disconnects and shutdown."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from starlette.responses import StreamingResponse

from bpkd_sdk.serve.service.limits import Limits
from tests.serve.cases import SIZE, accepted, encoded, in_background, network, pixels, scene, served, wait_until


def test_32_concurrent_clients_receive_their_own_masks(server, student):
    images = [scene(*size, index) for index, size in enumerate([(48, 64), (64, 48), (90, 101), (48, 64)])]
    expected = [student(image).mask for image in images]

    def send_three(number):
        with httpx.Client(base_url=server.client.base_url, timeout=30) as client:
            for turn in range(3):
                index = (number + turn) % len(images)
                response = client.post("/v1/segment?format=mask", content=encoded(images[index]))
                np.testing.assert_array_equal(pixels(response), expected[index])

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(send_three, range(32)))


def test_queued_images_of_one_size_form_a_batch():
    """Eight images of one size and four of another make three batches of four."""
    with served(network(), batch_size=4, max_wait=20.0) as server, ThreadPoolExecutor(12) as pool:
        wide, tall = encoded(scene(48, 64)), encoded(scene(64, 48))
        responses = list(pool.map(server.segment, [wide, tall, wide] * 4))
        assert {response.status_code for response in responses} == {200}
        assert server.metric("bpkd_batch_images_count") == 3
        assert server.metric("bpkd_batch_images_sum") == 12
        assert server.metric("bpkd_batch_images_bucket", le="2.0") == 0


def test_a_full_batch_overtakes_an_older_incomplete_batch():
    with served(network(), batch_size=2, max_wait=1.0) as server, ThreadPoolExecutor(1) as pool:
        alone = pool.submit(server.segment, encoded(scene(64, 48)))
        accepted(server, 1)
        with in_background(server, 2, encoded(scene(48, 64))) as pair:
            queued = [request.result().json()["timings_ms"]["queue"] for request in pair]
        assert max(queued) < 900
        assert alone.result().json()["timings_ms"]["queue"] >= 1000


def test_a_single_image_waits_at_most_max_wait():
    with served(network(), batch_size=4, max_wait=0.3) as server:
        assert 300 <= server.segment(encoded(scene(*SIZE))).json()["timings_ms"]["queue"] < 3000
    with served(network(), batch_size=1, max_wait=20.0) as server:
        assert server.segment(encoded(scene(*SIZE))).json()["timings_ms"]["queue"] < 3000


def test_a_full_queue_refuses_requests_until_it_empties(held):
    content = encoded(scene(*SIZE))
    with served(held, limits=Limits(max_requests=3)) as server:
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


def test_the_decoded_pixels_in_flight_are_limited(held):
    """The limit allows two images of the largest size, or eight of half the height and width."""
    large, small = encoded(scene(*SIZE)), encoded(scene(SIZE[0] // 2, SIZE[1] // 2))
    with served(held, limits=Limits(max_pixels=SIZE[0] * SIZE[1], max_decoded_images=2)) as server:
        for content, room in ((large, 2), (small, 8)):
            held.hold()
            with in_background(server, room, content) as waiting:
                accepted(server, room)
                wait_until(lambda content=content: server.segment(content).status_code == 503)
                held.go.set()
                assert {request.result().status_code for request in waiting} == {200}
            assert server.segment(content).status_code == 200


def test_a_segmentation_has_a_timeout(held):
    content = encoded(scene(*SIZE))
    with served(held, limits=Limits(timeout=0.5), batch_size=1) as server:
        held.hold()
        start = time.monotonic()
        with in_background(server, 3, content) as requests:
            responses = [request.result() for request in requests]
        assert {response.status_code for response in responses} == {504}
        assert 0.5 <= time.monotonic() - start < 5
        assert server.metric("bpkd_accepted_requests") == 0
        held.go.set()
        assert server.segment(content).status_code == 200
        assert (
            server.metric("bpkd_batch_images_sum") == 2
        )  # the image that was being segmented, and the last; the others were cancelled


def send_head(raw, length):
    raw.sendall(f"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())


def test_an_upload_has_a_timeout():
    with served(network(), limits=Limits(timeout=0.3)) as server, server.connect() as raw:
        send_head(raw, "Content-Length: 1000")
        raw.sendall(b"x" * 10)
        assert raw.recv(4096).startswith(b"HTTP/1.1 408")
        wait_until(lambda: raw.recv(4096) == b"")  # the connection is closed


def test_a_long_upload_is_refused_before_its_end():
    with served(network(), limits=Limits(max_upload_bytes=100_000)) as server:
        with server.connect() as raw:
            send_head(raw, "Transfer-Encoding: chunked")
            chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
            for _ in range(11):  # 110,000 bytes, without the last chunk
                raw.sendall(chunk)
            assert raw.recv(4096).startswith(b"HTTP/1.1 413")
        with server.connect() as raw:
            send_head(raw, "Content-Length: 100001")  # and no body
            assert raw.recv(4096).startswith(b"HTTP/1.1 413")
        assert server.segment(bytes(1_000_000)).status_code == 413
        form = server.client.post("/v1/segment", files={"image": bytes(1_000_000)})
        assert form.status_code == 413


def test_the_image_of_a_disconnected_client_is_not_segmented(held):
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


def test_stopping_finishes_accepted_requests(held):
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
        assert list(ticks) == []  # the response ends regularly; the connection is not broken
        assert time.monotonic() - start < 10
