"""The page for people behind the same door: what a browser, or somebody who plays one, may send to it."""

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
from tests.serve.cases import Counted, encoded, scene, served
from tests.serve.test_malformed import BODIES

LIMITS = Limits(max_upload_bytes=200_000, max_request_bytes=1_000_000, max_pixels=1_000_000)
SLIDER = "Opacity"


class Page:
    """A visitor without a browser."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.config = client.get("/config").raise_for_status().json()
        self.session = uuid.uuid4().hex

    def upload(self, content: bytes, name="photo.png") -> str:
        (path,) = self.client.post("/gradio_api/upload", files={"files": (name, content)}).raise_for_status().json()
        return path

    def place(self, name):
        """The id of a component, by its id on the page or its label."""
        return next(
            part["id"]
            for part in self.config["components"]
            if name in (part["props"].get("elem_id"), part["props"].get("label"))
        )

    def send(self, name, value, **others):
        """What comes of the first event of a component, or that reads it; the others send what they show at first."""
        place = self.place(name)
        event = next(
            event for event in self.config["dependencies"]
            if event["backend_fn"] and place in (*event["inputs"][:1], *(target for target, _ in event["targets"]))
        )  # fmt: skip
        shown = {part["id"]: part["props"].get("value") for part in self.config["components"]}
        shown |= {place: value} | {self.place(other): its for other, its in others.items()}
        job = {"data": [shown[part] for part in event["inputs"]], "fn_index": event["id"], "session_hash": self.session}
        self.client.post("/gradio_api/queue/join", json=job).raise_for_status()
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as told:
            messages = (json.loads(line.removeprefix("data:")) for line in told.iter_lines() if line)
            return next(message for message in messages if message["msg"] == "process_completed")


def file(path, **facts):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **facts}


@pytest.fixture(scope="module")
def student():
    return Counted(colors.student(), "cpu")


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
    """A file of somebody on this machine, beside Gradio's folder."""
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(scene(40, 50)))
    assert not path.is_relative_to(Path(tempfile.gettempdir()) / "gradio")
    return path


PLACES = {
    "photo": lambda value: value,
    "label": lambda value: value,
    "images": lambda value: [value],
    "video": lambda value: value,
}


@pytest.mark.parametrize("place", PLACES)
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
    ids=["file", "no meta", "stream", "other meta", "dots", "address", "stream of an address"],
)
def test_no_path_and_no_address_of_a_visitor_is_opened(page, secret, place, disguise):
    done = page.send(place, PLACES[place](disguise(secret)))
    assert done["success"] is False
    assert "Only files that were uploaded" in done["output"]["error"]


def test_not_in_the_place_of_a_number_either(page):
    path = page.upload(encoded(scene(40, 50)))
    done = page.send("photo", file(path), **{SLIDER: file("http://203.0.113.1/photo.png")})
    assert "Only files that were uploaded" in done["output"]["error"]


def test_what_was_uploaded_is_shown_and_drawn_again_without_a_network(server, student):
    page = Page(server.client)
    runs = student.calls
    opened = pictures(page, page.send("photo", file(page.upload(encoded(scene(40, 50))))))
    assert student.calls == runs + 1
    drawn = pictures(page, page.send(SLIDER, 0))
    assert len(drawn) == 2
    assert not set(drawn) & set(opened)
    assert student.calls == runs + 1


def pictures(page, done):
    """The files of an answer."""
    assert done["success"] is True
    addresses = re.findall(r"/gradio_api/file=[^\"?]*picture\.png", json.dumps(done))
    return [page.client.get(address).raise_for_status().content for address in dict.fromkeys(addresses)]


@pytest.mark.parametrize(
    "address", ["file=http://203.0.113.1/x", "file/HTTPS://203.0.113.1/x", "proxy=http://x.hf.space/"]
)
def test_nothing_is_fetched_for_a_visitor(server, address):
    answer = server.client.get(f"/gradio_api/{address}")
    assert answer.status_code == 403
    assert "fetches nothing" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/join", "/v1/models"])
@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "https://evil.example", "null", "http://127.0.0.1", "http://["]
)
def test_pages_of_other_origins_are_refused(server, path, origin):
    for method in ("GET", "POST", "OPTIONS"):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = server.client.request(method, path, headers=headers)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_the_page_s_own_requests_get_no_cors_headers(server):
    own = str(server.client.base_url).rstrip("/")
    answer = server.client.get("/config", headers={"Origin": own, "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    refused = server.client.post("/gradio_api/queue/join", headers={"Sec-Fetch-Site": "cross-site"})
    assert refused.status_code == 403


def test_the_token_is_asked_for_everywhere():
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


def test_uploads_that_are_too_large(server):
    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
        for _ in range(20):
            yield bytes(100_000)

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for content in (bytes(2_000_000), endless()):  # of a length that is known, and chunked
        answer = server.client.post("/gradio_api/upload", content=content, headers=form)
        assert answer.status_code == 413
    announced = server.client.post("/gradio_api/upload", content=bytes(2_000_000), headers=form)
    assert announced.json()["detail"] == "A request may have 1,000,000 bytes at most."
    whole = server.client.post(
        "/gradio_api/upload", files={"files": bytes(950_000)}
    )  # a file within the request's bound
    assert whole.status_code == 413


def test_malformed_images_are_refused_in_plain_words(server, page):
    kinds = {name.partition(" ")[2].partition(" ")[0]: content for name, content in BODIES}
    assert len(kinds) > 20
    for content in kinds.values():
        if len(content) == 0:
            continue
        done = page.send("photo", file(page.upload(content)))
        assert done["success"] is True  # a toast says why, and the page stays
        assert "Traceback" not in json.dumps(done)
    assert server.client.get("/healthz").status_code == 200
    assert page.send("photo", file(page.upload(encoded(scene(40, 50)))))["success"] is True


def test_the_limits_reach_the_page(page):
    for width, is_shown in ((1000, True), (1001, False)):
        done = page.send("photo", file(page.upload(encoded(Image.new("1", (width, 1000))))))
        assert ("picture.png" in json.dumps(done)) is is_shown
    assert page.config["max_file_size"] < LIMITS.max_request_bytes
