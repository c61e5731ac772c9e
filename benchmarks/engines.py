"""TensorRT engines of one network on this machine's GPU: built, audited, compared with torch, timed against the rest.

    python -m benchmarks.engines --output runs/gpu

Random weights, but for a classifier that is fitted to generated scenes. One engine in each precision by each compiler
that is installed and knows this GPU (TensorRT, TensorRT for RTX); beside them torch eager, torch.compile and ONNX
Runtime. What fails is reported at the end, with an exit code of 1; the rest goes on.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.networks import fitted, to_int8
from bpkd_sdk.export import benchmark, to_onnx, to_tensorrt, verify
from bpkd_sdk.export.benchmark import BenchmarkReport, Environment
from bpkd_sdk.files import write_atomically, write_json
from bpkd_sdk.runtime import Runtime, TorchRuntime
from bpkd_sdk.runtime.manifest import EXTRAS, capability, open_backend, supports

PRECISIONS = ("fp32", "fp16", "int8")
HARDWARE = {"tensorrt": None, "tensorrt_rtx": "current"}
# What int8 costs is for `quantize` to say, with images that the network was made for; here it must not be broken.
LEAST_AGREEMENT = {"fp32": 0.999, "fp16": 0.98, "int8": 0.8}


class Parts:
    """What was tried, and why some of it failed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failures: dict[str, str] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A block whose failure does not stop the rest."""
        print(name, flush=True)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # whatever it is, it shall be told and the next part tried
            self.failures[name] = f"{type(error).__name__}: {error}"
        self.seconds[name] = round(time.perf_counter() - start, 1)


def export(network: nn.Module, size: tuple[int, int], parts: Parts) -> dict[str, Path]:
    """The network's ONNX files by precision, in the current folder."""
    paths = {}
    for precision in ("fp32", "fp16"):
        with parts.part(f"export {precision}"):
            options = {"input_size": size, "dynamic_batch": False, "precision": precision}
            paths[precision] = to_onnx(network, f"{precision}.onnx", **options).path
    with parts.part("export int8"):
        to_int8(paths["fp32"], Path("int8.onnx"))
        paths["int8"] = Path("int8.onnx")
    return paths


def build(network: nn.Module, paths: dict[str, Path], backends: list[str], parts: Parts) -> dict[str, dict[str, Any]]:
    """Every engine, in the current folder: its layers, as parsed and as inspected, and how far it agrees with torch."""
    engines = {}
    for backend in backends:
        for precision, path in paths.items():
            target = Path(f"{backend}.{precision}.engine")
            with parts.part(f"build {target.name}"):
                report = to_tensorrt(path, target, backend=backend, hardware=HARDWARE[backend])
                found = report.manifest
                engines[target.name] = {
                    "seconds": report.seconds,
                    "bytes": report.size,
                    "layers": found.layers,
                    "inspected": found.inspected,
                }
            if target.name not in engines:
                continue
            with parts.part(f"compare {target.name}"):
                worst = verify(target, network, batches=[1]).worst
                engines[target.name]["agreement"] = asdict(worst)
                if worst.whole < LEAST_AGREEMENT[precision]:
                    raise RuntimeError(
                        f"{worst.whole:.4%} of the pixels are torch's, {LEAST_AGREEMENT[precision]} asked"
                    )
    return engines


def usable_backends() -> list[str]:
    """The compilers that can be imported and have engines for this GPU; why not, for the others."""
    found = []
    for name in EXTRAS:
        try:
            _, trt = open_backend(name)
        except ImportError as error:
            print(error)
            continue
        if supports(trt, capability()):
            found.append(name)
        else:
            print(f"{name} {trt.__version__} has no engines for {capability()}.")
    return found


def in_torch(network: nn.Module) -> list[Runtime]:
    """Eager and compiled, in both precisions; each with weights of its own."""
    runtimes: list[Runtime] = []
    for precision, module in (("fp32", copy.deepcopy(network)), ("fp16", copy.deepcopy(network).half())):
        runtimes.append(TorchRuntime(module, "auto", name=f"eager {precision}"))
        runtimes.append(TorchRuntime(torch.compile(copy.deepcopy(module)), "auto", name=f"torch.compile {precision}"))
    return runtimes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of engines.json, .md and .html")
    parser.add_argument("--network", default="deeplabv3plus_mv2")
    parser.add_argument("--size", nargs=2, type=int, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--duration", type=float, default=3.0, help="seconds of calls for each artifact")
    options = parser.parse_args(arguments)
    size, parts = tuple(options.size), Parts()
    network, backends = fitted(options.network, (size[0] // 2, size[1] // 2)), usable_backends()
    report: BenchmarkReport | None = None
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # so that no report names it
        paths = export(network, size, parts)
        engines = build(network, paths, backends, parts)
        with parts.part("benchmark"):
            artifacts = [*in_torch(network), *paths.values(), *engines]
            report = benchmark(artifacts, input_size=size, duration=options.duration)
            parts.failures |= {f"benchmark {row.name}": row.problem for row in report.rows if row.problem is not None}
    found = {
        "network": options.network,
        "environment": asdict(Environment.here()),
        "backends": backends,
        "seconds": parts.seconds,
        "failures": parts.failures,
        "engines": engines,
        "benchmark": report and json.loads(report.to_json()),
    }
    write_json(options.output / "engines.json", found)
    if report is not None:
        write_atomically(options.output / "engines.md", report.to_markdown().encode())
        write_atomically(options.output / "engines.html", report.to_html().encode())
        Console(width=140).print(report)
    for name, problem in parts.failures.items():
        print(f"FAILED {name}: {problem}")
    sys.exit(1 if parts.failures else 0)


if __name__ == "__main__":
    main()
