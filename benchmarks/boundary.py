"""Compare the trimap and the BPKD loss on bit sets with the same on one-hot tensors, in speed and in result.

    python -m benchmarks.boundary

The setting is 2 images, labels of 512x1024, logits of 64x128, a window of 7 pixels, on the CPU and on CUDA if torch
finds a GPU. Times are medians; the loss includes its backward pass. Runs that are in boundary.jsonl are not repeated.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.records import Records, make_parser, markdown_table
from bpkd_sdk.boundary import edge_masks
from bpkd_sdk.losses.bpkd import bpkd_body, bpkd_edge

CLASSES = (19, 150)


def one_hot_masks(labels: Tensor, num_classes: int, size: tuple[int, int], width: int = 7) -> Tensor:
    """Compute the trimap as public re-implementations do: dilation and erosion by max-pooling of a one-hot tensor."""
    void = labels == 255
    one_hot = F.one_hot(labels.masked_fill(void, 0).long(), num_classes).permute(0, 3, 1, 2).float()
    one_hot = one_hot * ~void.unsqueeze(1)
    padded = F.pad(one_hot, (width // 2,) * 4, mode="replicate")
    dilated = F.max_pool2d(padded, width, stride=1)
    eroded = -F.max_pool2d(-padded, width, stride=1)
    return F.adaptive_avg_pool2d((dilated - eroded) * ~void.unsqueeze(1), size)


def median_ms(call: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(2 + repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def measure(classes: int, device: str, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    labels = torch.randint(0, classes, (2, 32, 64)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels[torch.rand(labels.shape) < 0.02] = 255
    labels = labels.to(device, torch.uint8 if classes < 255 else torch.int64)
    student = torch.randn(2, classes, 64, 128, device=device, requires_grad=True)
    teacher = torch.randn(2, classes, 64, 128, device=device)

    def loss(make_masks: Callable[..., Tensor]) -> None:
        student.grad = None
        masks = make_masks(labels, classes, (64, 128))
        (bpkd_edge(student, teacher, masks) + bpkd_body(student, teacher, masks)).backward()

    difference = (edge_masks(labels, classes, (64, 128)) - one_hot_masks(labels, classes, (64, 128))).abs().max().item()
    result = {"classes": classes, "device": device, "largest_difference_of_masks": difference}
    for name, make_masks in {"bit_sets": edge_masks, "one_hot": one_hot_masks}.items():
        count = repeats if name == "bit_sets" else max(2, repeats // 5)
        result[f"{name}_masks_ms"] = median_ms(lambda make=make_masks: make(labels, classes, (64, 128)), device, count)
        result[f"{name}_loss_ms"] = median_ms(lambda make=make_masks: loss(make), device, count)
    for part in ("masks", "loss"):
        result[f"{part}_ratio"] = result[f"one_hot_{part}_ms"] / result[f"bit_sets_{part}_ms"]
    return result


def table(runs: dict[str, dict[str, Any]]) -> str:
    headings = ("device", "classes", "trimap ms, bit sets", "one-hot", "ratio", "loss ms, bit sets", "one-hot", "ratio")
    rows = []
    for run in runs.values():
        cells = [run["device"], str(run["classes"])]
        for part in ("masks", "loss"):
            cells += [f"{run[f'{kind}_{part}_ms']:.1f}" for kind in ("bit_sets", "one_hot")]
            cells.append(f"{run[f'{part}_ratio']:.1f}")
        rows.append(cells)
    return markdown_table(headings, rows)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    setting = {
        "description": "2 images, labels 512x1024, logits 64x128, window 7; median ms; loss: forward and backward",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    records = Records(options.output / "boundary.jsonl", setting)
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for classes in CLASSES:
            key = f"{device} {classes} classes"
            if key not in records.runs:
                records.add(key, measure(classes, device, options.repeats))
    records.write_table(table(records.runs))


if __name__ == "__main__":
    main()
