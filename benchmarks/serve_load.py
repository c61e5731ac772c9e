"""Many clients against the real server on this machine, with and without batching: errors, latency, throughput, memory.

    python benchmarks/serve_load.py --output benchmarks/results/serve-load.json

Each client keeps one connection and sends the next image as soon as it has the mask of the last: JPEGs of 256x256
pixels, generated scenes, to `bpkd serve` in a process of its own. Clients and server share the machine's cores. The
network is the quickstart's student with random weights, exported to ONNX, unless --student names another. Memory is the
server's resident set as its own metrics state it, once a second after a first tenth of the time, in which it grows to
its working size. It ends with an error if a request has failed, or if the memory of the last quarter of the time is
larger than that of the first by more than GROWTH.
"""

import argparse
import dataclasses
import http.client
import io
import itertools
import json
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
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

import bpkd_sdk
from bpkd_sdk.data.shapes import CLASS_NAMES, PALETTE, render
from bpkd_sdk.export import to_onnx
from bpkd_sdk.quickstart import STUDENT

SIZE = (256, 256)
IMAGES = 16
BATCH_SIZES = (8, 1)
MEGABYTE = 1e6
GROWTH = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--student")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        student = arguments.student or export_student(Path(folder) / "student.onnx")
        results = []
        for batch_size in BATCH_SIZES:
            with serving(student, arguments.device, batch_size) as address:
                result = measure(address, arguments.clients, arguments.seconds)
            results.append({"batch_size": batch_size, **result})
            print(json.dumps(results[-1]))
    report = {
        "setting": f"{arguments.clients} clients, {arguments.seconds:g} s, JPEG of {SIZE[0]}x{SIZE[1]}, masks as PNG",
        "network": arguments.student or f"{STUDENT}, ONNX",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() and arguments.device != "cpu" else None,
        "results": results,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    for result in results:
        memory = result["memory_mb"]
        if result["errors"]:
            sys.exit(f"Requests have failed: {result['errors']}")
        if memory["last_quarter"] > (1 + GROWTH) * memory["first_quarter"]:
            sys.exit(f"The memory has grown: {memory}")


def export_student(path: Path) -> str:
    torch.manual_seed(0)
    model = bpkd_sdk.create_model(STUDENT, len(CLASS_NAMES)).eval()
    model.spec = dataclasses.replace(model.spec, class_names=CLASS_NAMES, palette=PALETTE)
    to_onnx(model, path, input_size=SIZE)
    return str(path)


@contextmanager
def serving(student: str, device: str, batch_size: int) -> Iterator[tuple[str, int]]:
    """Host and port of a server that is ready."""
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
            while ask(http.client.HTTPConnection(*address), "GET", "/readyz")[0] != 200:
                time.sleep(0.1)
            yield address
        finally:
            server.terminate()


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def metrics(connection: http.client.HTTPConnection) -> dict[str, float]:
    lines = ask(connection, "GET", "/metrics")[1].decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def measure(address: tuple[str, int], clients: int, seconds: float) -> dict:
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
                status, _ = ask(connection, "POST", "/v1/segment?format=mask", image)
            except OSError as error:
                status = type(error).__name__
                connection.close()
            times.append(1000 * (time.perf_counter() - start))
            statuses[status] += 1
        raise AssertionError

    def watch() -> None:
        connection = http.client.HTTPConnection(*address, timeout=60)
        time.sleep(seconds / 10)
        while time.monotonic() < end:
            memory.append(metrics(connection)["process_resident_memory_bytes"] / MEGABYTE)
            time.sleep(min(1.0, seconds / 20))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        parts = list(pool.map(client, range(clients)))
    wall = time.perf_counter() - start
    watcher.join()
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
