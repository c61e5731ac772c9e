"""One image to its mask on the CPU: torch eager, ONNX FP32, INT8, and the usual way around an ONNX file. As ratios.

    python -m benchmarks.inference

512x1024, batch 1, 19 classes, random weights with settled batch norms: speed does not depend on training. All five ways
take turns in one run of `bpkd_sdk.export.benchmark`; a ratio is that of the medians, with the lowest and the highest of
the rounds.

- torch: the network in torch, eager, with normalisation and argmax in torch.
- fp32: the file of `to_onnx`, uint8 image in, uint8 mask out.
- int8: the same with every layer between the first and the last in int8; our runtime computes in uint8.
- int8 file: the same file, opened by ONNX Runtime as it is.
- usual: a file of the bare network; the image is normalised by numpy in float32, the logits come out at the network's
  stride, are resized by OpenCV and reduced by numpy's argmax. As its share of the time shows, that is little beside a
  network of a hundred GMACs: with nothing around it, the usual way would be 1 / (1 - share) times as fast.

What is in the JSON file is not measured again; the ONNX files are kept in --work. Run it on a machine with nothing else
to do: the file says if there was something.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.networks import settled, to_int8
from bpkd_sdk.export import benchmark, to_onnx
from bpkd_sdk.export.benchmark import BenchmarkReport, Environment
from bpkd_sdk.files import parse_record, write_atomically, write_json
from bpkd_sdk.models import get_spec
from bpkd_sdk.runtime import Accepts, Runtime, TorchRuntime
from bpkd_sdk.runtime.onnx import OnnxRuntime, open_session

ROOT = Path(__file__).parents[1]
NETWORKS = (
    "pspnet_r18",
    "deeplabv3plus_mv2",
    "hrnetv2p_w18s",
    "isanet_r18",
    "smp/PSPNet/resnet18",
    "smp/PSPNet/tu-resnet10t",
    "smp/FPN/tu-mobilenetv3_small_050",
    "smp/PAN/tu-mobilenetv3_small_050",
)
CLASSES = 19
WAYS = ("torch", "fp32", "int8", "int8 file", "usual")
# Slower way, faster way, how many times as fast it shall be.
RATIOS: dict[str, tuple[str, str, float | None]] = {
    "ONNX FP32 to torch eager": ("torch", "fp32", 2.0),
    "INT8 to FP32": ("fp32", "int8", 1.5),
    "INT8 to the same file opened by ONNX Runtime as it is": ("int8 file", "int8", None),
    "pre- and post-processing inside to the usual way": ("usual", "fp32", 1.3),
}


class UsualRuntime(Runtime):
    """An ONNX file of the bare network, with numpy and OpenCV around it."""

    def __init__(self, path: Path, network: nn.Module) -> None:
        facts = {"preprocess": False, "argmax": False}
        super().__init__("usual", get_spec(network), facts, torch.device("cpu"), Accepts((1, 1)))
        self.session = open_session(path, self.device)
        self.mean, self.std = (np.array(values, np.float32) for values in (self.spec.mean, self.spec.std))

    def prepare(self, images: Tensor) -> Tensor:
        self.size = images.shape[2], images.shape[1]
        normalized = (images.numpy().astype(np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(np.ascontiguousarray(normalized.transpose(0, 3, 1, 2)))

    def infer(self, inputs: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: inputs.numpy()})
        return torch.from_numpy(logits)

    def masks(self, outputs: Tensor) -> Tensor:
        logits = cv2.resize(outputs[0].numpy().transpose(1, 2, 0), self.size, interpolation=cv2.INTER_LINEAR)
        return torch.from_numpy(logits.argmax(-1).astype(np.uint8))[None]


def make_ways(name: str, size: tuple[int, int], work: Path) -> list[Runtime | Path]:
    """The ways of one network, in the order of `WAYS`; files that are there are not made again."""
    network = settled(name, CLASSES, size)
    stem = f"{name.replace('/', '-')}-{size[0]}x{size[1]}"
    whole, integer, bare = (work / f"{stem}.{kind}.onnx" for kind in ("fp32", "int8", "bare"))
    work.mkdir(parents=True, exist_ok=True)
    if not whole.is_file():
        to_onnx(network, whole, input_size=size, dynamic_batch=False)
    if not integer.is_file():
        to_int8(whole, integer)
    if not bare.is_file():
        image = torch.zeros(1, 3, *size)
        torch.onnx.export(network, (image,), dynamo=True, verbose=False).save(bare, external_data=False)
    torch_runtime = TorchRuntime(network, "cpu", name="torch")
    as_written = OnnxRuntime(integer, "cpu", as_written=True)
    as_written.name = "int8 file"
    return [torch_runtime, whole, integer, as_written, UsualRuntime(bare, network)]


def ratios(report: BenchmarkReport) -> dict[str, dict[str, float | None]]:
    """How many times as fast, of the medians; and the lowest and highest of the rounds."""
    rows = dict(zip(WAYS, report.rows, strict=True))
    found: dict[str, dict[str, float | None]] = {}
    for name, (slow, fast, target) in RATIOS.items():
        rounds = [a / b for a, b in zip(rows[slow].rounds, rows[fast].rounds, strict=True)]
        ratio = rows[slow].latency.p50 / rows[fast].latency.p50
        found[name] = {"ratio": ratio, "lowest": min(rounds), "highest": max(rounds), "target": target}
    around = rows["usual"].stages
    found["share of pre- and post-processing in the usual way"] = {
        "ratio": (around["pre"].p50 + around["post"].p50) / rows["usual"].latency.p50
    }
    return found


def run(path: Path, names: list[str], size: tuple[int, int], duration: float, work: Path) -> dict[str, Any]:
    """Measure the networks that are not in the file yet; all that is in it then."""
    done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name in names:
        if name in done:
            continue
        report = benchmark(make_ways(name, size, work), input_size=size, duration=duration, device="cpu")
        failed = [row.problem for row in report.rows if row.problem is not None]
        if failed:
            raise SystemExit(f"{name}: {failed}")
        done[name] = {"ratios": ratios(report), "report": json.loads(report.to_json())}
        write_json(path, done)
        print(report.to_markdown())
    write_atomically(path.with_suffix(".md"), table(done).encode())
    return done


def table(done: dict[str, Any]) -> str:
    """Markdown: milliseconds of each way, then the ratios; below, what was wrong with the machine meanwhile."""
    lines = [
        f"| network | {' ms | '.join(WAYS)} ms | {' | '.join(RATIOS)} | share of pre and post in the usual way |",
        f"|---|{'---:|' * (len(WAYS) + len(RATIOS) + 1)}",
    ]
    for name, found in done.items():
        times = [f"{row['latency']['p50']:.0f}" for row in found["report"]["rows"]]
        *told, share = found["ratios"].values()
        lines.append(f"| {name} | {' | '.join([*times, *map(_told, told), format(share['ratio'], '.1%')])} |")
    lines.append("")
    for name, found in done.items():
        lines += [
            f"- {name}: {told}" for told in parse_record(Environment, found["report"]["environment"], name).warnings
        ]
    return "\n".join(lines).rstrip() + "\n"


def _told(ratio: dict[str, Any]) -> str:
    asked = "" if ratio["target"] is None else f"; {ratio['target']} asked"
    return f"{ratio['ratio']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}{asked})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "inference-cpu.json")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--size", nargs=2, type=int, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--duration", type=float, default=40.0, help="seconds of calls for each way")
    parser.add_argument("--work", type=Path, default=Path("runs/inference"), help="folder of the ONNX files")
    options = parser.parse_args(arguments)
    print(table(run(options.output, options.networks, tuple(options.size), options.duration, options.work)))


if __name__ == "__main__":
    main()
