"""Compare `bpkd serve` with and without batching under many clients: errors, latency, throughput, memory.

    python -m benchmarks.serve_load

The server runs in its own process, and shares the machine's cores with the clients. Each client keeps one connection,
and sends the next image when it has received the mask of the last one. The images are JPEGs of 256x256 pixels of
generated scenes. The network is the quickstart's student with random weights, exported to ONNX, unless --student names
another one. Memory is the server's resident set, as its metrics state it, sampled once per second; the first tenth of
the time is left out, because the server then grows to its working size. Runs that are in serve-load.jsonl are not
repeated.

The exit code is 1 if a request failed, or if the memory in the last quarter of the time exceeds that in the first
quarter by more than GROWTH.
"""

import dataclasses
import http.client
import io
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

import bpkd_sdk
from benchmarks.records import Records, make_parser, markdown_table
from bpkd_sdk.data.shapes import CLASS_NAMES, PALETTE, render
from bpkd_sdk.export import to_onnx
from bpkd_sdk.quickstart import STUDENT

SIZE = (256, 256)
IMAGES = 16
BATCH_SIZES = (8, 1)
MEGABYTE = 1e6
GROWTH = 0.05


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--student")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    setting = {
        "description": f"{options.clients} clients, {options.seconds:g} s, JPEG of {SIZE[0]}x{SIZE[1]}, masks as PNG",
        "network": options.student or f"{STUDENT}, ONNX",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() and options.device != "cpu" else None,
    }
    records = Records(options.output / "serve-load.jsonl", setting)
    with tempfile.TemporaryDirectory() as folder:
        student = options.student or export_student(Path(folder) / "student.onnx")
        for batch_size in BATCH_SIZES:
            key = f"batch size {batch_size}"
            if key not in records.runs:
                with serving(student, options.device, batch_size) as address:
                    records.add(key, {"batch_size": batch_size} | measure(address, options.clients, options.seconds))
    records.write_table(table(records.runs))
    for run in records.runs.values():
        memory = run["memory_mb"]
        if run["errors"]:
            sys.exit(f"Requests failed: {run['errors']}")
        if memory["last_quarter"] > (1 + GROWTH) * memory["first_quarter"]:
            sys.exit(f"The memory grew: {memory}")


def table(runs: dict[str, dict[str, Any]]) -> str:
    headings = (
        *("batch size", "requests", "errors", "requests/s", "p50 ms", "p90 ms", "p99 ms", "images per batch"),
        *("MB, first quarter", "MB, last quarter", "MB, most"),
    )
    rows = []
    for run in runs.values():
        counts = (run["batch_size"], run["requests"], sum(run["errors"].values()), run["requests_per_second"])
        rows.append([*map(str, (*counts, *run["latency_ms"].values(), run["images_per_batch"]))])
        rows[-1] += [str(run["memory_mb"][part]) for part in ("first_quarter", "last_quarter", "most")]
    return markdown_table(headings, rows, text_columns=())


def export_student(path: Path) -> str:
    torch.manual_seed(0)
    model = bpkd_sdk.create_model(STUDENT, len(CLASS_NAMES)).eval()
    model.spec = dataclasses.replace(model.spec, class_names=CLASS_NAMES, palette=PALETTE)
    to_onnx(model, path, input_size=SIZE)
    return str(path)


@contextmanager
def serving(student: str, device: str, batch_size: int) -> Iterator[tuple[str, int]]:
    """Start a server, and yield its host and port when it is ready."""
    command = [sys.executable, "-m", "bpkd_sdk.cli", "serve", "--student", student, "--no-demo", "--port", "0"]
    command += ["--device", device, "--batch-size", str(batch_size)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        lines = iter(server.stdout.readline, "")
        url = next((found[0] for line in lines if (found := re.search(r"http://127.0.0.1:\d+", line))), None)
        if url is None:
            log.seek(0)
            sys.exit(log.read().decode())
        address = (urlsplit(url).hostname, urlsplit(url).port)
        try:
            while request(http.client.HTTPConnection(*address), "GET", "/readyz")[0] != 200:
                time.sleep(0.1)
            yield address
        finally:
            server.terminate()


def request(connection: http.client.HTTPConnection, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    connection.request(method, path, body)
    response = connection.getresponse()
    return response.status, response.read()


def metrics(connection: http.client.HTTPConnection) -> dict[str, float]:
    lines = request(connection, "GET", "/metrics")[1].decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def measure(address: tuple[str, int], clients: int, seconds: float) -> dict[str, Any]:
    images = [jpeg(index) for index in range(IMAGES)]
    end = time.monotonic() + seconds
    memory: list[float] = []

    def client(number: int) -> tuple[list[float], Counter]:
        connection = http.client.HTTPConnection(*address, timeout=60)
        times, statuses = [], Counter()
        for image in itertools.islice(itertools.cycle(images), number, None):
            if time.monotonic() >= end:
                return times, statuses
            start = time.perf_counter()
            try:
                status, _ = request(connection, "POST", "/v1/segment?format=mask", image)
            except OSError as error:
                status = type(error).__name__
                connection.close()
            times.append(1000 * (time.perf_counter() - start))
            statuses[status] += 1
        raise AssertionError

    def sample_memory() -> None:
        connection = http.client.HTTPConnection(*address, timeout=60)
        time.sleep(seconds / 10)
        while time.monotonic() < end:
            memory.append(metrics(connection)["process_resident_memory_bytes"] / MEGABYTE)
            time.sleep(min(1.0, seconds / 20))

    sampler = threading.Thread(target=sample_memory)
    sampler.start()
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        parts = list(pool.map(client, range(clients)))
    wall = time.perf_counter() - start
    sampler.join()
    counted = metrics(http.client.HTTPConnection(*address))
    times = np.concatenate([part for part, _ in parts])
    statuses = sum((part for _, part in parts), Counter())
    batches = {key.partition("{")[0]: value for key, value in counted.items() if key.startswith("bpkd_batch_images_")}
    quarter = max(1, len(memory) // 4)
    return {
        "requests": len(times),
        "errors": {str(status): count for status, count in statuses.items() if status != 200},
        "requests_per_second": round(statuses[200] / wall, 1),
        "latency_ms": {f"p{share}": round(float(np.percentile(times, share)), 1) for share in (50, 90, 99)},
        "images_per_batch": round(batches["bpkd_batch_images_sum"] / batches["bpkd_batch_images_count"], 2),
        "memory_mb": {
            "first_quarter": round(float(np.mean(memory[:quarter])), 1),
            "last_quarter": round(float(np.mean(memory[-quarter:])), 1),
            "most": round(max(memory), 1),
        },
    }


def jpeg(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(0, "load", index, SIZE)[0]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
