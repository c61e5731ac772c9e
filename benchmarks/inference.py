"""Compare five ways from an image to its mask on the CPU: torch eager, ONNX FP32, ONNX INT8, and bare ONNX files.

    python -m benchmarks.inference

The setting is one image of 512x1024 and 19 classes. The weights are random, with batch norms adapted to the scenes,
because speed does not depend on training. All five ways take turns in one run of `bpkd_sdk.export.benchmark`. A ratio
is the ratio of the medians, with its lowest and highest value over the rounds.

- torch: the network in torch, eager, with normalisation and argmax in torch.
- fp32: the file that `to_onnx` writes, with a uint8 image as input and a uint8 mask as output.
- int8: the same file with every layer between the first and the last in int8; our runtime computes in uint8.
- int8 file: the same int8 file, which ONNX Runtime opens without our changes.
- usual: a file of the network without pre- and post-processing. numpy normalises the image in float32, OpenCV resizes
  the logits from the network's stride to the image, and numpy computes the argmax. Without pre- and post-processing
  this way would be 1 / (1 - share) times as fast, where share is their share of the time; the share is small for a
  network of a hundred GMACs.

Networks that are in inference-cpu.jsonl are not measured again; the ONNX files stay in --work. The machine should run
nothing else meanwhile: the table lists where it was busy.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from benchmarks.networks import settled, to_int8
from benchmarks.records import Records, add_size, make_parser, markdown_table
from bpkd_sdk.arrays import to_numpy
from bpkd_sdk.export import benchmark, to_onnx
from bpkd_sdk.export.benchmark import BenchmarkReport, Environment
from bpkd_sdk.files import parse_record
from bpkd_sdk.models import get_spec
from bpkd_sdk.runtime import AcceptedImages, Runtime, TorchRuntime
from bpkd_sdk.runtime.onnx import OnnxRuntime, open_session

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
# The slower way, the faster way, and the ratio that is required (None: no requirement).
RATIOS: dict[str, tuple[str, str, float | None]] = {
    "ONNX FP32 to torch eager": ("torch", "fp32", 2.0),
    "INT8 to FP32": ("fp32", "int8", 1.5),
    "INT8 to the same file opened by ONNX Runtime as it is": ("int8 file", "int8", None),
    "pre- and post-processing inside to the usual way": ("usual", "fp32", 1.3),
}


class UsualRuntime(Runtime):
    """A runtime for an ONNX file of the network alone, with pre- and post-processing by numpy and OpenCV."""

    def __init__(self, path: Path, network: nn.Module) -> None:
        facts = {"preprocess": False, "argmax": False}
        super().__init__("usual", get_spec(network), facts, torch.device("cpu"), AcceptedImages((1, 1)))
        self.session = open_session(path, self.device)
        self.mean, self.std = (np.array(values, np.float32) for values in (self.spec.mean, self.spec.std))

    def prepare(self, images: Any) -> np.ndarray:
        self.size = images.shape[2], images.shape[1]
        normalized = (to_numpy(images).astype(np.float32) / 255 - self.mean) / self.std
        return np.ascontiguousarray(normalized.transpose(0, 3, 1, 2))

    def infer(self, inputs: np.ndarray) -> np.ndarray:
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: inputs})
        return np.asarray(logits)

    def masks(self, outputs: np.ndarray) -> np.ndarray:
        logits = cv2.resize(outputs[0].transpose(1, 2, 0), self.size, interpolation=cv2.INTER_LINEAR)
        return logits.argmax(-1).astype(np.uint8)[None]


def make_ways(name: str, input_size: tuple[int, int], work: Path) -> list[Runtime | Path]:
    """Return the ways of one network in the order of `WAYS`; files that exist are not written again."""
    network = settled(name, CLASSES, input_size)
    stem = f"{name.replace('/', '-')}-{input_size[0]}x{input_size[1]}"
    whole, integer, bare = (work / f"{stem}.{kind}.onnx" for kind in ("fp32", "int8", "bare"))
    work.mkdir(parents=True, exist_ok=True)
    if not whole.is_file():
        to_onnx(network, whole, input_size=input_size, dynamic_batch=False)
    if not integer.is_file():
        to_int8(whole, integer)
    if not bare.is_file():
        image = torch.zeros(1, 3, *input_size)
        torch.onnx.export(network, (image,), dynamo=True, verbose=False).save(bare, external_data=False)
    torch_runtime = TorchRuntime(network, "cpu", name="torch")
    as_written = OnnxRuntime(integer, "cpu", as_written=True)
    as_written.name = "int8 file"
    return [torch_runtime, whole, integer, as_written, UsualRuntime(bare, network)]


def ratios(report: BenchmarkReport) -> dict[str, dict[str, float | None]]:
    """Return the ratios of the median times, with the lowest and the highest over the rounds."""
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


def run(
    folder: Path, names: list[str], input_size: tuple[int, int], duration: float, work: Path
) -> dict[str, dict[str, Any]]:
    """Measure the networks that are not in the file yet, and return all runs by network."""
    records = Records(folder / "inference-cpu.jsonl", {"size": input_size})
    for name in names:
        if name in records.runs:
            continue
        report = benchmark(make_ways(name, input_size, work), input_size=input_size, duration=duration, device="cpu")
        if failed := [row.problem for row in report.rows if row.problem is not None]:
            raise SystemExit(f"{name}: {failed}")
        records.add(name, {"ratios": ratios(report), "report": json.loads(report.to_json())})
        print(report.to_markdown())
    records.write_table(table(records.runs))
    return records.runs


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return the milliseconds of each way and the ratios as Markdown, with the warnings about the machine below."""
    headings = ["network", *(f"{way} ms" for way in WAYS), *RATIOS, "share of pre and post in the usual way"]
    rows, warnings = [], []
    for name, run in runs.items():
        times = [f"{row['latency']['p50']:.0f}" for row in run["report"]["rows"]]
        *found, share = run["ratios"].values()
        rows.append([name, *times, *map(format_ratio, found), format(share["ratio"], ".1%")])
        environment = parse_record(Environment, run["report"]["environment"], name)
        warnings += [f"- {name}: {warning}" for warning in environment.warnings]
    return "\n".join([markdown_table(headings, rows), *warnings]).rstrip() + "\n"


def format_ratio(ratio: dict[str, Any]) -> str:
    required = "" if ratio["target"] is None else f"; {ratio['target']} required"
    return f"{ratio['ratio']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}{required})"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    add_size(parser, 512, 1024)
    parser.add_argument("--duration", type=float, default=40.0, help="seconds of calls for each way")
    parser.add_argument("--work", type=Path, default=Path("runs/inference"), help="folder of the ONNX files")
    options = parser.parse_args()
    run(options.output, options.networks, tuple(options.size), options.duration, options.work)


if __name__ == "__main__":
    main()
