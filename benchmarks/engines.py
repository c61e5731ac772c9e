"""Compare TensorRT engines of one network on this machine's GPU with torch and ONNX Runtime, in output and in speed.

    python -m benchmarks.engines --output runs/gpu

The network has random weights and a classifier fitted to generated scenes. Every compiler that is installed and
supports this GPU (TensorRT, TensorRT for RTX) builds one engine in each precision; each engine is audited and
compared with torch. Then the engines, torch eager, torch.compile and ONNX Runtime are timed in turns. If a part fails,
the others continue; the failures are printed at the end, and the exit code is 1. A network that is in engines.jsonl
without failures is not measured again.
"""

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
from benchmarks.records import Records, add_size, make_parser
from bpkd_sdk.export import benchmark, to_onnx, to_tensorrt, verify
from bpkd_sdk.export.benchmark import BenchmarkReport, Environment
from bpkd_sdk.files import write_atomically
from bpkd_sdk.runtime import Runtime, TorchRuntime
from bpkd_sdk.runtime.manifest import EXTRAS, capability, open_backend, supports

PRECISIONS = ("fp32", "fp16", "int8")
HARDWARE = {"tensorrt": None, "tensorrt_rtx": "current"}
# `quantize` measures the cost of int8, on images of the network's domain; here the int8 engine must only not be broken.
LEAST_AGREEMENT = {"fp32": 0.999, "fp16": 0.98, "int8": 0.8}


class Parts:
    """The parts of the run: their durations in seconds, and the reasons of those that failed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failures: dict[str, str] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a block whose failure does not stop the others."""
        print(name, flush=True)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # a compiler may raise any error, and the next part must still run
            self.failures[name] = f"{type(error).__name__}: {error}"
        self.seconds[name] = round(time.perf_counter() - start, 1)


def export(network: nn.Module, input_size: tuple[int, int], parts: Parts) -> dict[str, Path]:
    """Write the network's ONNX files to the current folder, and return them by precision."""
    paths = {}
    for precision in ("fp32", "fp16"):
        with parts.part(f"export {precision}"):
            options = {"input_size": input_size, "dynamic_batch": False, "precision": precision}
            paths[precision] = to_onnx(network, f"{precision}.onnx", **options).path
    with parts.part("export int8"):
        to_int8(paths["fp32"], Path("int8.onnx"))
        paths["int8"] = Path("int8.onnx")
    return paths


def build(network: nn.Module, paths: dict[str, Path], backends: list[str], parts: Parts) -> dict[str, dict[str, Any]]:
    """Build every engine in the current folder, and return its layers and its agreement with torch."""
    engines: dict[str, dict[str, Any]] = {}
    for backend in backends:
        for precision, path in paths.items():
            target = Path(f"{backend}.{precision}.engine")
            with parts.part(f"build {target.name}"):
                report = to_tensorrt(path, target, backend=backend, hardware=HARDWARE[backend])
                engines[target.name] = {
                    "seconds": report.seconds,
                    "bytes": report.size,
                    "layers": report.manifest.layers,
                    "inspected": report.manifest.inspected,
                }
            if target.name not in engines:
                continue
            with parts.part(f"compare {target.name}"):
                worst = verify(target, network, batch_sizes=[1]).worst
                engines[target.name]["agreement"] = asdict(worst)
                if worst.whole < LEAST_AGREEMENT[precision]:
                    raise RuntimeError(
                        f"{worst.whole:.4%} of the pixels agree with torch; {LEAST_AGREEMENT[precision]:.4%} required"
                    )
    return engines


def usable_backends() -> list[str]:
    """Return the compilers that can be imported and support this GPU, and print why the others cannot be used."""
    usable = []
    for name in EXTRAS:
        try:
            _, trt = open_backend(name)
        except ImportError as error:
            print(error)
            continue
        if supports(trt, capability()):
            usable.append(name)
        else:
            print(f"{name} {trt.__version__} does not support {capability()}.")
    return usable


def torch_runtimes(network: nn.Module) -> list[Runtime]:
    """Return the network in torch, eager and compiled, in both precisions, each with its own weights."""
    runtimes: list[Runtime] = []
    for precision, module in (("fp32", copy.deepcopy(network)), ("fp16", copy.deepcopy(network).half())):
        runtimes.append(TorchRuntime(module, "auto", name=f"eager {precision}"))
        runtimes.append(TorchRuntime(torch.compile(copy.deepcopy(module)), "auto", name=f"torch.compile {precision}"))
    return runtimes


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--network", default="deeplabv3plus_mv2")
    add_size(parser, 512, 1024)
    parser.add_argument("--duration", type=float, default=3.0, help="seconds of calls for each artifact")
    options = parser.parse_args()
    records = Records(options.output / "engines.jsonl")
    if options.network in records.runs and not records.runs[options.network]["failures"]:
        return
    input_size, parts = tuple(options.size), Parts()
    network, backends = fitted(options.network, (input_size[0] // 2, input_size[1] // 2)), usable_backends()
    report: BenchmarkReport | None = None
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # the report then has names without a folder
        paths = export(network, input_size, parts)
        engines = build(network, paths, backends, parts)
        with parts.part("benchmark"):
            artifacts = [*torch_runtimes(network), *paths.values(), *engines]
            report = benchmark(artifacts, input_size=input_size, duration=options.duration)
            parts.failures |= {f"benchmark {row.name}": row.problem for row in report.rows if row.problem is not None}
    run = {
        "environment": asdict(Environment.here()),
        "backends": backends,
        "seconds": parts.seconds,
        "failures": parts.failures,
        "engines": engines,
        "benchmark": report and json.loads(report.to_json()),
    }
    records.add(options.network, run)
    if report is not None:
        write_atomically(records.path.with_suffix(".md"), report.to_markdown().encode())
        write_atomically(records.path.with_suffix(".html"), report.to_html().encode())
        Console(width=140).print(report)
    for name, problem in parts.failures.items():
        print(f"FAILED {name}: {problem}")
    sys.exit(1 if parts.failures else 0)


if __name__ == "__main__":
    main()
