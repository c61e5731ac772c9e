"""Images, networks and servers that the tests of this folder share."""

import io
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import numpy as np
import torch
import torch.nn.functional as F
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

import bpkd_sdk
from bpkd_sdk.data.shapes import render
from bpkd_sdk.serve import Predictor
from bpkd_sdk.serve.networks import open_models
from bpkd_sdk.serve.service.app import create_app
from bpkd_sdk.serve.service.server import format_url, listen, make_server
from tests.networks import tiny

SIZE = (48, 64)
CLASSES = 5
NAMES = tuple("abcde")
PALETTE = tuple((50 * index, 0, 255) for index in range(CLASSES))


def scene(height, width, index=0):
    """Return an image of a generated scene, uint8 (height, width, 3)."""
    return render(0, "predictor", index, (max(height, 32), max(width, 32)))[0][:height, :width]


def encoded(image, file_format="PNG", **options):
    """Return the content of an image file."""
    buffer = io.BytesIO()
    (Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image).save(
        buffer, file_format, **options
    )
    return buffer.getvalue()


def exact_logits(model, image):
    """Compute the logits of a `tiny` network in float64, (C, H, W), independently of the code under test."""
    twin = tiny(next(reversed(model.state_dict().values())).shape[0]).double().eval()
    twin.load_state_dict(model.state_dict())
    inputs = (image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = twin(torch.from_numpy(inputs.transpose(2, 0, 1)[None]))
    return F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)[0].numpy()


def network(classes=CLASSES, **facts):
    """Create a network with random weights, scaled so that every class is predicted for some pixels."""
    model = tiny(classes).eval()
    logits = exact_logits(model, scene(48, 64)).reshape(classes, -1)
    last = model[-1]
    last.bias.data = torch.from_numpy((last.bias.detach().numpy() - logits.mean(1)) / logits.std(1)).float()
    last.weight.data /= torch.from_numpy(logits.std(1)).float()[:, None, None, None]
    model.spec = bpkd_sdk.NetworkSpec(None, classes, **facts)
    return model


class Held(nn.Module):
    """A network that waits while the event `go` is not set. It sets the event `started` when it is called."""

    def __init__(self):
        super().__init__()
        self.network = network(class_names=NAMES, palette=PALETTE)
        self.spec = self.network.spec
        self.go, self.started = threading.Event(), threading.Event()
        self.go.set()
        self.eval()

    def forward(self, images):
        self.started.set()
        assert self.go.wait(30)
        return self.network(images)

    def hold(self):
        self.go.clear()
        self.started.clear()


class CountingPredictor(Predictor):
    """A predictor that counts its calls."""

    calls = 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        return super().__call__(*arguments, **options)


@dataclass(frozen=True)
class RunningServer:
    """A running server and an HTTP client for it."""

    client: httpx.Client
    server: uvicorn.Server

    def segment(self, content, **options):
        return self.client.post("/v1/segment", content=content, **options)

    def connect(self):
        """Open a socket to the server, for requests that an HTTP client cannot send."""
        parts = urlsplit(str(self.client.base_url))
        return socket.create_connection((parts.hostname, parts.port), timeout=20)

    def metric(self, name, **labels):
        """Return a value of /metrics, or 0 if it is missing."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return sum(
            sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextmanager
def served(*students, teacher=None, prepare=lambda app: None, **options) -> Iterator[RunningServer]:
    """Start a server on a free port of this machine, yield it, and stop it."""
    app = create_app(open_models(students, teacher=teacher, device="cpu"), **options)
    prepare(app)
    listening = listen("127.0.0.1", 0)
    server = make_server(app, timeout=30.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        limits = httpx.Limits(max_connections=100)
        with httpx.Client(base_url=format_url(listening), timeout=30, limits=limits) as client:
            client.get("/healthz").raise_for_status()
            yield RunningServer(client, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_until(condition, seconds=20):
    """Wait until a condition that depends on another thread is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.01)


def pixels(answer):
    """Check that a response is a PNG file, and return its pixels."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)))


@contextmanager
def in_background(server, count, content, **options):
    """Send requests from threads and yield their futures."""
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(server.segment, content, **options) for _ in range(count)]


def accepted(server, count):
    """Wait until the server has accepted this number of requests and not answered them yet."""
    wait_until(lambda: server.metric("bpkd_accepted_requests") == count)
