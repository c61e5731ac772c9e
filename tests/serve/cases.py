"""Scenes, networks and servers that the tests of this folder share."""

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
    return render(0, "predictor", index, (max(height, 32), max(width, 32)))[0][:height, :width]


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    (Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image).save(
        buffer, file_format, **options
    )
    return buffer.getvalue()


def exact_logits(model, image):
    """float64 (C, H, W), from the weights."""
    twin = tiny(next(reversed(model.state_dict().values())).shape[0]).double().eval()
    twin.load_state_dict(model.state_dict())
    inputs = (image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = twin(torch.from_numpy(inputs.transpose(2, 0, 1)[None]))
    return F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)[0].numpy()


def network(classes=CLASSES, **facts):
    """Random weights, the last of them such that every class wins somewhere."""
    model = tiny(classes).eval()
    logits = exact_logits(model, scene(48, 64)).reshape(classes, -1)
    last = model[-1]
    last.bias.data = torch.from_numpy((last.bias.detach().numpy() - logits.mean(1)) / logits.std(1)).float()
    last.weight.data /= torch.from_numpy(logits.std(1)).float()[:, None, None, None]
    model.spec = bpkd_sdk.NetworkSpec(None, classes, **facts)
    return model


class Held(nn.Module):
    """A network that works while `go` is set, and waits while it is not; `started` tells that it has begun."""

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


class Counted(Predictor):
    """Counts its calls."""

    calls = 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        return super().__call__(*arguments, **options)


@dataclass(frozen=True)
class Served:
    """A running server, and a client of it."""

    client: httpx.Client
    server: uvicorn.Server

    def segment(self, content, **options):
        return self.client.post("/v1/segment", content=content, **options)

    def connect(self):
        """A plain connection, for what no client would send."""
        parts = urlsplit(str(self.client.base_url))
        return socket.create_connection((parts.hostname, parts.port), timeout=20)

    def metric(self, name, **labels):
        """A number of /metrics; 0 for what has not been counted yet."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return sum(
            sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextmanager
def served(*students, teacher=None, prepare=lambda app: None, **options) -> Iterator[Served]:
    """A real server on a free port of this machine."""
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
            yield Served(client, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_until(condition, seconds=20):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def pixels(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)))


@contextmanager
def in_background(server, count, content, **options):
    """Requests under way, as futures."""
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(server.segment, content, **options) for _ in range(count)]


def accepted(server, count):
    wait_until(lambda: server.metric("bpkd_accepted_requests") == count)
