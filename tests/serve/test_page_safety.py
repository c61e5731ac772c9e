"""The security of the demo page: requests from browsers, and from programs that imitate a browser."""

import json
import re
import tempfile
import uuid
from pathlib import Path

import httpx
import pytest
from PIL import Image

from bpkd_sdk.serve.networks import open_models
from bpkd_sdk.serve.service.limits import Limits
from bpkd_sdk.serve.service.security import AccessPolicy
from bpkd_sdk.serve.service.server import mount_demo
from tests.serve import colors
from tests.serve.cases import CountingPredictor, encoded, scene, served
from tests.serve.test_malformed import BODIES

LIMITS = Limits(max_upload_bytes=200_000, max_request_bytes=1_000_000, max_pixels=1_000_000)
SLIDER = "Opacity"


class Page:
    """A client of the page that works without a browser."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.config = client.get("/config").raise_for_status().json()
        self.session = uuid.uuid4().hex

    def upload(self, content: bytes, name="photo.png") -> str:
        (path,) = self.client.post("/gradio_api/upload", files={"files": (name, content)}).raise_for_status().json()
        return path

    def component_id(self, name):
        """Return the id of the component with this HTML id or label."""
        return next(
            part["id"]
            for part in self.config["components"]
            if name in (part["props"].get("elem_id"), part["props"].get("label"))
        )

    def send(self, name, value, **others):
        """Run the first event that a component triggers or that reads it, and return the final message.

        Args:
            name: HTML id or label of the component.
            value: Value of the component.
            others: Values of other components by name; the rest keep their initial values.
        """
        component = self.component_id(name)
        event = next(
            event for event in self.config["dependencies"]
            if event["backend_fn"] and component in (*event["inputs"][:1], *(target for target, _ in event["targets"]))
        )  # fmt: skip
        values = {part["id"]: part["props"].get("value") for part in self.config["components"]}
        values |= {component: value} | {self.component_id(other): other_value for other, other_value in others.items()}
        job = {
            "data": [values[part] for part in event["inputs"]],
            "fn_index": event["id"],
            "session_hash": self.session,
        }
        self.client.post("/gradio_api/queue/join", json=job).raise_for_status()
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            messages = (json.loads(line.removeprefix("data:")) for line in stream.iter_lines() if line)
            return next(message for message in messages if message["msg"] == "process_completed")


def file(path, **facts):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **facts}


@pytest.fixture(scope="module")
def student():
    return CountingPredictor(colors.student(), "cpu")


@pytest.fixture(scope="module")
def server(student):
    def mount(app):
        mount_demo(app, open_models([student], teacher=colors.teacher(), device="cpu"), examples=None, limits=LIMITS)

    with served(colors.student(), prepare=mount, limits=LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def page(server):
    return Page(server.client)


@pytest.fixture
def secret(tmp_path):
    """A file on this machine outside of Gradio's folder."""
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(scene(40, 50)))
    assert not path.is_relative_to(Path(tempfile.gettempdir()) / "gradio")
    return path


COMPONENTS = {
    "photo": lambda value: value,
    "label": lambda value: value,
    "images": lambda value: [value],
    "video": lambda value: value,
}


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    "disguise",
    [
        file,
        lambda path: {"path": str(path)},
        lambda path: file(path, is_stream=True),
        lambda path: {"path": str(path), "meta": {"_type": "something else"}},
        lambda path: file(f"{tempfile.gettempdir()}/gradio/../../{path}"),
        lambda path: file("http://203.0.113.1/photo.png"),
        lambda path: file("https://203.0.113.1/photo.png", is_stream=True),
    ],
    ids=["file", "no meta", "stream", "other meta", "dots", "url", "stream of a url"],
)
def test_no_path_and_no_url_from_a_visitor_is_opened(page, secret, component, disguise):
    done = page.send(component, COMPONENTS[component](disguise(secret)))
    assert done["success"] is False
    assert "Only files that were uploaded" in done["output"]["error"]


def test_a_url_in_the_place_of_a_number_is_rejected_too(page):
    path = page.upload(encoded(scene(40, 50)))
    done = page.send("photo", file(path), **{SLIDER: file("http://203.0.113.1/photo.png")})
    assert "Only files that were uploaded" in done["output"]["error"]


def test_a_change_of_opacity_redraws_an_upload_without_running_the_network(server, student):
    page = Page(server.client)
    runs = student.calls
    opened = pictures(page, page.send("photo", file(page.upload(encoded(scene(40, 50))))))
    assert student.calls == runs + 1
    drawn = pictures(page, page.send(SLIDER, 0))
    assert len(drawn) == 2
    assert not set(drawn) & set(opened)
    assert student.calls == runs + 1


def pictures(page, done):
    """Download the pictures of a final message."""
    assert done["success"] is True
    addresses = re.findall(r"/gradio_api/file=[^\"?]*picture\.png", json.dumps(done))
    return [page.client.get(address).raise_for_status().content for address in dict.fromkeys(addresses)]


@pytest.mark.parametrize(
    "address", ["file=http://203.0.113.1/x", "file/HTTPS://203.0.113.1/x", "proxy=http://x.hf.space/"]
)
def test_no_url_is_downloaded_for_a_visitor(server, address):
    answer = server.client.get(f"/gradio_api/{address}")
    assert answer.status_code == 403
    assert "fetches nothing" in answer.json()["detail"]


def test_an_unknown_path_of_the_page_is_a_problem(server):
    for path in ("/nothing", "/gradio_api/nothing"):
        answer = server.client.get(path)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["title"] == "Not Found"
        assert answer.json()["request_id"]


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/join", "/v1/models"])
@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "https://evil.example", "null", "http://127.0.0.1", "http://["]
)
def test_requests_from_other_origins_are_rejected(server, path, origin):
    for method in ("GET", "POST", "OPTIONS"):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = server.client.request(method, path, headers=headers)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_requests_of_the_page_itself_get_no_cors_headers(server):
    own = str(server.client.base_url).rstrip("/")
    answer = server.client.get("/config", headers={"Origin": own, "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    refused = server.client.post("/gradio_api/queue/join", headers={"Sec-Fetch-Site": "cross-site"})
    assert refused.status_code == 403


def test_every_path_requires_the_token():
    def mount(app):
        mount_demo(app, open_models([colors.student()], device="cpu"), examples=None, limits=LIMITS)

    with served(colors.student(), prepare=mount, access=AccessPolicy("a long secret")) as server:
        for path in (
            "/",
            "/config",
            "/gradio_api/upload",
            "/gradio_api/queue/join",
            "/theme.css",
            "/gradio_api/file=x",
        ):
            assert server.client.get(path).status_code == 401
            assert server.client.post(path).status_code == 401
        headers = {"Authorization": "Bearer a long secret"}
        assert server.client.get("/config", headers=headers).status_code == 200


def test_uploads_that_are_too_large_are_rejected(server):
    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
        for _ in range(20):
            yield bytes(100_000)

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for content in (bytes(2_000_000), endless()):  # with Content-Length, and chunked
        answer = server.client.post("/gradio_api/upload", content=content, headers=form)
        assert answer.status_code == 413
    with_length = server.client.post("/gradio_api/upload", content=bytes(2_000_000), headers=form)
    assert with_length.json()["detail"] == "A request may have 1,000,000 bytes at most."
    # The limit of a file is lower than the limit of its request.
    complete = server.client.post("/gradio_api/upload", files={"files": bytes(950_000)})
    assert complete.status_code == 413


def test_malformed_images_are_rejected_with_a_message(server, page):
    kinds = {name.partition(" ")[2].partition(" ")[0]: content for name, content in BODIES}
    assert len(kinds) > 20
    for content in kinds.values():
        if len(content) == 0:
            continue
        done = page.send("photo", file(page.upload(content)))
        assert done["success"] is True  # the page shows a warning and keeps working
        assert "Traceback" not in json.dumps(done)
    assert server.client.get("/healthz").status_code == 200
    assert page.send("photo", file(page.upload(encoded(scene(40, 50)))))["success"] is True


def test_the_limits_apply_to_the_page(page):
    for width, is_shown in ((1000, True), (1001, False)):
        done = page.send("photo", file(page.upload(encoded(Image.new("1", (width, 1000))))))
        assert ("picture.png" in json.dumps(done)) is is_shown
    assert page.config["max_file_size"] < LIMITS.max_request_bytes
