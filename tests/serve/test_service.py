"""HTTP service, tested through a running server."""

import io
import json
import logging
import re
import socket
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from bpkd_sdk.runtime.triton import UnreachableError
from bpkd_sdk.serve import draw_overlay
from bpkd_sdk.serve.networks import open_models
from bpkd_sdk.serve.predictor import Prediction, Predictor, Timings
from bpkd_sdk.serve.service.app import create_app
from bpkd_sdk.serve.service.segmenter import SegmentRequest, encode
from bpkd_sdk.serve.service.server import listen
from tests.serve.cases import NAMES, PALETTE, SIZE, Held, encoded, network, pixels, scene, served, wait_until


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_the_mask_equals_the_mask_of_the_predictor(server, student, file_format):
    content = encoded(scene(61, 83), file_format)
    expected = student(content).mask
    response = server.segment(content, params={"format": "mask"})
    image = Image.open(io.BytesIO(response.content))
    np.testing.assert_array_equal(pixels(response), expected)
    assert image.mode == "P"
    assert image.getpalette()[:15] == [channel for color in PALETTE for channel in color]
    form = server.client.post("/v1/segment?format=mask", files={"image": ("photo.exe", content, "text/plain")})
    np.testing.assert_array_equal(pixels(form), expected)


def test_json_contains_the_run_lengths_of_every_class(server, student):
    content = encoded(scene(61, 83))
    expected = student(content, confidence=True)
    response = server.segment(content, params={"confidence": True}).json()
    assert response["size"] == [61, 83]
    assert [segment["class_id"] for segment in response["segments"]] == np.unique(expected.mask).tolist()
    for segment in response["segments"]:
        inside = expected.mask == segment["class_id"]
        runs = coco.frPyObjects(segment["rle"], *response["size"])
        np.testing.assert_array_equal(coco.decode(runs), inside)
        assert segment["area"] == inside.sum() == coco.area(runs)
        assert segment["share"] == pytest.approx(inside.mean())
        assert segment["confidence"] == pytest.approx(expected.confidence[inside].mean(), abs=1e-5)
        assert segment["class_name"] == NAMES[segment["class_id"]]
        assert segment["color"] == list(PALETTE[segment["class_id"]])
    assert set(response["timings_ms"]) == {"decode", "queue", "pre", "inference", "post"}
    assert all(segment["confidence"] is None for segment in server.segment(content).json()["segments"])


def test_a_network_with_one_logit_is_served_with_two_classes():
    model = network(1, class_names=("road",), palette=((1, 2, 3),))
    content = encoded(scene(*SIZE))
    prediction = Predictor(model, "cpu")(content, confidence=True)
    with served(model) as server:
        assert server.client.get("/v1/models").json()[0]["class_names"] == ["background", "road"]
        np.testing.assert_array_equal(pixels(server.segment(content, params={"format": "mask"})), prediction.mask)
        for segment in server.segment(content, params={"confidence": True}).json()["segments"]:
            inside = prediction.mask == segment["class_id"]
            assert segment["class_name"] == ("background", "road")[segment["class_id"]]
            assert segment["confidence"] == pytest.approx(prediction.confidence[inside].mean(), abs=1e-5)


def test_overlay_and_confidence(server, student):
    image = scene(61, 83)
    expected = student(image, confidence=True)
    overlay = {"format": "overlay", "alpha": 0.3, "boundary_width": 3, "legend": True}
    np.testing.assert_array_equal(
        pixels(server.segment(encoded(image), params=overlay)),
        draw_overlay(image, expected.mask, PALETTE, class_names=NAMES, boundary_width=3, alpha=0.3, legend=True),
    )
    plain = pixels(server.segment(encoded(image), params={"format": "overlay", "boundary_width": 0}))
    np.testing.assert_array_equal(plain, draw_overlay(image, expected.mask, PALETTE, boundaries=False))
    grey = pixels(server.segment(encoded(image), params={"format": "confidence"}))
    np.testing.assert_allclose(grey, 255 * expected.confidence, atol=0.51)


def test_an_overlay_colours_class_255():
    image, mask = scene(8, 8), np.full((8, 8), 255, np.uint8)
    prediction = Prediction(
        image, mask, tuple(map(str, range(256))), ((0, 0, 0),) * 255 + ((230, 120, 40),), Timings(1, 1, 1)
    )
    content = encode(prediction, SegmentRequest("network", "overlay", alpha=1.0), {})
    assert np.unique(np.asarray(Image.open(io.BytesIO(content))).reshape(-1, 3), axis=0).tolist() == [[230, 120, 40]]


@pytest.mark.parametrize("accept", ["*/*", "image/png", "video/mp4"])
def test_the_query_alone_chooses_the_format(server, accept):
    content, headers = encoded(scene(*SIZE)), {"Accept": accept}
    assert server.segment(content, headers=headers).headers["content-type"] == "application/json"
    response = server.segment(content, headers=headers, params={"format": "mask"})
    assert response.headers["content-type"] == "image/png"


def test_networks_are_chosen_by_name(server, student):
    content = encoded(scene(*SIZE))
    models = server.client.get("/v1/models").json()
    first, masks, teacher = (model["name"] for model in models)
    assert [model["has_confidence"] for model in models] == [True, False, True]
    assert models[0]["class_names"] == list(NAMES)
    for name, expected in ((first, student.class_names), (teacher, ("0", "1", "2", "3", "4"))):
        response = server.segment(content, params={"model": name}).json()
        assert response["model"] == name
        assert {segment["class_name"] for segment in response["segments"]} <= set(expected)
    assert server.segment(content).json()["model"] == first
    response = server.segment(content, params={"model": masks, "format": "confidence"})
    assert response.status_code == 422
    assert "returns masks without confidence" in response.json()["detail"]
    response = server.segment(content, params={"model": masks[:-1]})
    assert response.status_code == 404
    assert f"Did you mean '{masks}'?" in response.json()["detail"]


def test_every_response_has_security_headers_and_a_request_id(server):
    responses = [
        server.client.get("/healthz"), server.client.get("/nothing"), server.segment(b""), server.client.get("/docs"),
        server.segment(encoded(scene(*SIZE))), server.client.get("/v1/models", headers={"Host": "evil.example"}),
    ]  # fmt: skip
    assert [response.status_code for response in responses] == [200, 404, 400, 200, 200, 421]
    for response in responses:
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "SAMEORIGIN"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert "server" not in response.headers
    assert len({response.headers["x-request-id"] for response in responses}) == len(responses)


def test_a_client_cannot_choose_the_request_id(server):
    response = server.client.get("/healthz", headers={"X-Request-ID": 32 * "0"})
    (request_id,) = response.headers.get_list("x-request-id")
    assert re.fullmatch("[0-9a-f]{32}", request_id)
    assert request_id != 32 * "0"


class Broken(Held):
    """Network that works once, for the warm-up, and then fails."""

    def forward(self, images):
        if self.started.is_set():
            raise RuntimeError("the weights in /home/ann/secret are gone")
        return super().forward(images)


def test_internal_errors_are_logged_and_not_sent(caplog):
    with served(Broken()) as server:
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        response = server.segment(encoded(scene(*SIZE)))
        assert response.status_code == 500
        assert response.headers["content-type"] == "application/problem+json"
        assert "secret" not in response.text
        assert "Traceback" not in response.text
        assert response.json()["request_id"] == response.headers["x-request-id"]
        (record,) = (record for record in caplog.records if record.exc_info)
        assert response.json()["request_id"] in record.getMessage()
        assert "secret" in str(record.exc_info[1])
        assert server.client.get("/healthz").status_code == 200


def test_the_server_is_ready_when_every_network_has_segmented_an_image(held):
    held.hold()
    with served(held, network()) as server:
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/healthz").status_code == 200
        held.go.set()
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        assert server.metric("bpkd_batch_images_count") == 0


def test_a_network_that_fails_its_warm_up_is_not_ready_until_it_works(caplog):
    broken = Broken()
    broken.started.set()
    with served(broken) as server:
        wait_until(lambda: "fails on a black image" in caplog.text)
        assert server.client.get("/readyz").status_code == 503
        broken.started.clear()
        wait_until(lambda: server.client.get("/readyz").status_code == 200)


class Remote(Held):
    """Network on another server that cannot be reached while `is_reachable` is false."""

    is_reachable = True

    def forward(self, images):
        if not self.is_reachable:
            raise UnreachableError("the server at 10.0.0.1 cannot be reached")
        return super().forward(images)


def test_an_unreachable_network_is_tried_again():
    remote = Remote()
    with served(remote) as server:
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        remote.is_reachable = False
        response = server.segment(encoded(scene(*SIZE)))
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert "cannot be reached" in response.json()["detail"]
        assert "10.0.0.1" not in response.text
        assert server.client.get("/readyz").status_code == 503
        remote.is_reachable = True
        assert server.segment(encoded(scene(*SIZE))).status_code == 200
        assert server.client.get("/readyz").status_code == 200
        remote.is_reachable = False
        assert server.segment(encoded(scene(*SIZE))).status_code == 503
        remote.is_reachable = True  # tried again without a request
        wait_until(lambda: server.client.get("/readyz").status_code == 200)


def test_the_documentation_loads_nothing_from_other_servers(server):
    page = server.client.get("/docs").text
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)|url: '([^']+)'""", page)
    assert len(addresses) >= 4
    for address in (first or second for first, second in addresses):
        assert address.startswith("/")
        assert server.client.get(address).status_code == 200
    paths = server.client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/segment", "/v1/models", "/healthz", "/readyz", "/metrics"}
    segment = paths["/v1/segment"]["post"]
    assert set(segment["requestBody"]["content"]) == {
        "image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff", "application/octet-stream",
        "multipart/form-data",
    }  # fmt: skip
    assert set(segment["responses"]["200"]["content"]) == {"application/json", "image/png"}


def test_metrics_count_requests_and_stages(server):
    before = server.metric("bpkd_http_requests_total", path="/v1/segment", status="415")
    server.segment(b"no image")
    server.client.get("/made/up/by/a/client")
    server.segment(encoded(scene(*SIZE)))
    assert server.metric("bpkd_http_requests_total", path="/v1/segment", status="415") == before + 1
    assert server.metric("bpkd_http_requests_total", path="other", status="404") >= 1
    images = server.metric("bpkd_batch_images_sum")
    assert images >= 1
    for stage in ("queue", "pre", "inference", "post"):
        assert server.metric("bpkd_stage_seconds_count", stage=stage) == images
        assert server.metric("bpkd_stage_seconds_sum", stage=stage) > 0
    assert server.metric("process_resident_memory_bytes") > 1e6


def test_the_server_timing_header_contains_the_stages(server):
    header = server.segment(encoded(scene(*SIZE)), params={"format": "mask"}).headers["server-timing"]
    stages = dict(re.fullmatch(r"(\w+);dur=([\d.]+)", stage).groups() for stage in header.split(", "))
    assert list(stages) == ["decode", "queue", "pre", "inference", "post", "encode"]


def test_each_request_is_logged_in_one_line(server, caplog):
    with caplog.at_level(logging.INFO, "bpkd_sdk.serve"):
        request_id = server.segment(encoded(scene(*SIZE))).headers["x-request-id"]
        server.client.get("/healthz")
        server.client.get("/v1/nothing%0aFORGED")
        wait_until(lambda: "FORGED" in caplog.text)
    lines = [record.getMessage() for record in caplog.records]
    first = next(index for index, line in enumerate(lines) if line.startswith(request_id))
    lines = lines[first:]  # the last line of the previous test may precede them
    assert len(lines) == 2
    assert re.fullmatch(rf"{request_id} POST '/v1/segment': 200, \d+ ms", lines[0])
    assert "GET '/v1/nothing\\nFORGED': 404" in lines[1]


def test_a_network_that_cannot_be_opened_is_not_served(caplog, tmp_path):
    with served(tmp_path / "none.onnx", network()) as server:
        (model,) = server.client.get("/v1/models").json()
        assert server.segment(encoded(scene(*SIZE))).json()["model"] == model["name"]
    assert "none.onnx is not served: There is no ONNX file at" in caplog.text
    with served(tmp_path / "none.onnx", teacher=network()) as server:
        refused = server.segment(encoded(scene(*SIZE)))  # the teacher does not replace a missing student
        assert refused.status_code == 404
        assert "No student could be opened" in refused.json()["detail"]
    with pytest.raises(ValueError, match="(?s)none could be opened.*none.onnx: There is no ONNX file"):
        create_app(open_models([tmp_path / "none.onnx"]))


AUDITED = {"on": False, "events": []}  # an audit hook cannot be removed, so it is switched


def audit(event, arguments):
    if (
        AUDITED  # None while the interpreter exits
        and AUDITED["on"]
        and event in ("open", "socket.connect", "pickle.find_class", "subprocess.Popen", "os.system")
    ):
        AUDITED["events"].append((event, str(arguments)))


def test_requests_open_no_files_run_nothing_and_connect_nowhere(server):
    sys.addaudithook(audit)
    content = encoded(scene(*SIZE))
    path = "/etc/passwd"
    AUDITED["on"] = True
    try:
        for upload in (path.encode(), json.dumps({"path": path}).encode(), b"cposix\nsystem\n(S'id'\ntR.", content):
            server.segment(upload)
            server.client.post("/v1/segment", files={"image": (f"../../..{path}", upload)})
            server.client.post("/v1/segment", data={"image": path, "path": f"file://{path}"})
        for dots in ("/..", "/%2e%2e", "/..%2f", "/.%00."):
            with server.connect() as raw:  # httpx would normalise the path
                raw.sendall(f"GET /static-offline-docs{6 * dots}{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert raw.recv(4096).startswith(b"HTTP/1.1 404")
        server.client.get("/docs")
    finally:
        AUDITED["on"] = False
    events = AUDITED["events"]
    assert not [event for event in events if path in event[1]]
    assert {event for event, _ in events} <= {"open", "socket.connect"}
    assert all("127.0.0.1" in arguments for event, arguments in events if event == "socket.connect")


def test_connections_send_small_packets_without_delay():
    """Without TCP_NODELAY the body of each response waits 40 ms behind its head."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_threads_end_with_the_server():
    before = threading.active_count()
    with served(network(), parallel=3) as server:
        server.segment(encoded(scene(*SIZE)))
    wait_until(lambda: threading.active_count() <= before)
