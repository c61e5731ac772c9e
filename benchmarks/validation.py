"""Compare the time of all scores of an image, boundary scores included, with the time of its segmentation.

    python -m benchmarks.validation

Each network segments scenes of two sizes in torch on the CPU, one image at a time as `evaluate` does there; after each
image `MetricCounts` compares the mask with the label. The times are medians over the images, and the share is that of
the scores in the time of the segmentation, at most 10 % required. The weights are random, because neither time depends
on them. Networks that are in validation.jsonl are not measured again.
"""

import platform
import statistics
import time

import torch

import bpkd_sdk
from benchmarks.records import Records, make_parser, markdown_table
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.evaluation import EvaluationProtocol, MetricCounts
from bpkd_sdk.runtime import TorchRuntime

NETWORKS = ("pspnet_r18", "hrnetv2p_w18s", "deeplabv3plus_mv2", "smp/PAN/tu-mobilenetv3_small_050")
SIZES = ((360, 480), (512, 1024))
IMAGES = 12


def measure(name: str, size: tuple[int, int]) -> dict[str, float]:
    """Return the milliseconds of the segmentation and of the scores of an image."""
    scenes = ShapesDataset("val", length=IMAGES + 1, size=size)
    torch.manual_seed(0)
    runtime = TorchRuntime(bpkd_sdk.create_model(name, scenes.num_classes).eval(), "cpu")
    counts, protocol = MetricCounts(scenes.class_names), EvaluationProtocol()
    times = []
    for image, label in scenes:
        began = time.perf_counter()
        mask = protocol.segment(runtime, image[None])
        segmented = time.perf_counter()
        counts.update(mask, label[None])
        times.append((segmented - began, time.perf_counter() - segmented))
    segmentation, scores = (1000 * statistics.median(part) for part in zip(*times[1:], strict=True))
    return {"segmentation_ms": segmentation, "scores_ms": scores}


def main() -> None:
    options = make_parser(__doc__).parse_args()
    setting = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    records = Records(options.output / "validation.jsonl", setting)
    for name in NETWORKS:
        for height, width in SIZES:
            if (key := f"{name} {height}x{width}") not in records.runs:
                records.add(key, measure(name, (height, width)))
    records.write_table(table(records.runs))


def table(runs: dict[str, dict[str, float]]) -> str:
    rows = []
    for key, run in runs.items():
        share = run["scores_ms"] / run["segmentation_ms"]
        rows.append((key, f"{run['segmentation_ms']:.0f}", f"{run['scores_ms']:.1f}", f"{share:.1%}"))
    return markdown_table(("network and size", "segmentation ms", "scores ms", "share"), rows)


if __name__ == "__main__":
    main()
