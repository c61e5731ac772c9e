"""Compare the speed of draw_overlay with OpenCV, supervision and torchvision, at 1920x1080.

    pip install 'bpkd-sdk[bench]'
    python -m benchmarks.overlay

Every call has an RGB image and a map of class ids as input, and returns a new picture: once with colours only, and once
also with white lines around the classes (torchvision draws no lines). supervision and torchvision need a binary mask
per class; their time with existing masks is measured too, as "masks given". In every round each call runs five times in
a row, and the fastest run counts, because the first run allocates memory that the previous call returned to the system.
The result is the median of the rounds, with its quartiles. Tasks that are in overlay.jsonl are not measured again.

The exit code is 1 if draw_overlay is slower than the fastest alternative by more than TOLERANCE; unlike OpenCV's two
calls, it checks every id before it draws.
"""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np
import supervision
import torch
from torchvision.utils import draw_segmentation_masks

from benchmarks.records import Records, add_size, make_parser, markdown_table
from bpkd_sdk.data import shapes
from bpkd_sdk.serve import draw_overlay

ALPHA, WHITE = 0.5, (255, 255, 255)
TOLERANCE = 0.05
Call = Callable[[], object]


class Alternatives:
    """The same picture, drawn by other libraries.

    Args:
        image: RGB image, uint8 (H, W, 3).
        mask: Class ids, uint8 (H, W).
        palette: RGB colour of each class.
    """

    def __init__(self, image: np.ndarray, mask: np.ndarray, palette: tuple[tuple[int, int, int], ...]) -> None:
        self.image, self.mask, self.palette = image, mask, palette
        self.classes = np.unique(mask)
        self.colors = np.array(palette, np.uint8)
        self.table = np.zeros((256, 1, 3), np.uint8)
        self.table[: len(palette), 0] = palette
        self.tensor, self.mask_tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)
        colors = supervision.ColorPalette([supervision.Color(*color) for color in palette])
        self.fill = supervision.MaskAnnotator(colors, opacity=ALPHA)
        self.outline = supervision.PolygonAnnotator(supervision.Color.WHITE, thickness=1)

    def opencv_lookup(self) -> np.ndarray:
        return cv2.addWeighted(self.image, 1 - ALPHA, self.colors[self.mask], ALPHA, 0)

    def opencv_color_map(self) -> np.ndarray:
        return cv2.addWeighted(self.image, 1 - ALPHA, cv2.applyColorMap(self.mask, self.table), ALPHA, 0)

    def opencv_contours(self) -> np.ndarray:
        picture = self.opencv_color_map()
        for class_id in self.classes:
            area = (self.mask == class_id).view(np.uint8)
            lines, _ = cv2.findContours(area, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(picture, lines, -1, WHITE, 1)
        return picture

    def detections(self) -> supervision.Detections:
        masks = np.stack([self.mask == class_id for class_id in self.classes])
        return supervision.Detections(supervision.mask_to_xyxy(masks), masks, class_id=self.classes.astype(int))

    def supervision_fill(self, detections: supervision.Detections | None = None) -> np.ndarray:
        return self.fill.annotate(self.image.copy(), detections or self.detections())

    def supervision_outlines(self, detections: supervision.Detections | None = None) -> np.ndarray:
        detections = detections or self.detections()
        return self.outline.annotate(self.fill.annotate(self.image.copy(), detections), detections)

    def masks(self) -> torch.Tensor:
        return torch.stack([self.mask_tensor == class_id for class_id in self.classes.tolist()])

    def torchvision_fill(self, masks: torch.Tensor | None = None) -> torch.Tensor:
        masks = self.masks() if masks is None else masks
        colors = [self.palette[class_id] for class_id in self.classes]
        return draw_segmentation_masks(self.tensor, masks, alpha=ALPHA, colors=colors)


def rounds_ms(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            times[name].append(min(timed_ms(call) for _ in range(5)))
    return {name: values[1:] for name, values in times.items()}


def timed_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def compare(ours: Call, others: dict[str, Call], rounds: int) -> dict[str, Any]:
    quartiles = {
        name: statistics.quantiles(values, n=4)
        for name, values in rounds_ms({"draw_overlay": ours, **others}, rounds).items()
    }
    times = {name: median for name, (_, median, _) in quartiles.items()}
    best = min(others, key=lambda name: times[name])
    spread = {name: [low, high] for name, (low, _, high) in quartiles.items()}
    ratio = times[best] / times["draw_overlay"]
    return {"ms": times, "quartiles_ms": spread, "best_other": best, "best_other_over_ours": ratio}


def table(runs: dict[str, dict[str, Any]]) -> str:
    rows = []
    for task, run in runs.items():
        for name, ms in run["ms"].items():
            low, high = run["quartiles_ms"][name]
            ratio = f"{ms / run['ms']['draw_overlay']:.2f}"
            rows.append((task, name, f"{ms:.2f}", f"{low:.2f} to {high:.2f}", ratio))
    return markdown_table(("task", "function", "ms", "quartiles", "time / draw_overlay"), rows, text_columns=(0, 1))


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="number of threads of OpenCV and of torch")
    add_size(parser, 1080, 1920)
    options = parser.parse_args(arguments)
    cv2.setNumThreads(options.threads)
    torch.set_num_threads(options.threads)
    image, mask = shapes.render(0, "val", 0, tuple(options.size))
    image, palette = np.ascontiguousarray(image), shapes.PALETTE
    other = Alternatives(image, mask, palette)
    detections, masks = other.detections(), other.masks()
    same = draw_overlay(image, mask, palette, boundaries=False, alpha=ALPHA)
    if not np.array_equal(same, other.opencv_color_map()):
        raise SystemExit("The pictures differ, so their times cannot be compared.")
    tasks: dict[str, tuple[Call, dict[str, Call]]] = {
        "colours": (
            lambda: draw_overlay(image, mask, palette, boundaries=False, alpha=ALPHA),
            {
                "OpenCV, palette[mask]": other.opencv_lookup,
                "OpenCV, applyColorMap": other.opencv_color_map,
                "supervision": other.supervision_fill,
                "supervision, masks given": lambda: other.supervision_fill(detections),
                "torchvision": other.torchvision_fill,
                "torchvision, masks given": lambda: other.torchvision_fill(masks),
            },
        ),
        "colours and lines": (
            lambda: draw_overlay(image, mask, palette, alpha=ALPHA),
            {
                "OpenCV, drawContours": other.opencv_contours,
                "supervision": other.supervision_outlines,
                "supervision, masks given": lambda: other.supervision_outlines(detections),
            },
        ),
    }
    setting = {
        "size": options.size,
        "classes": len(other.classes),
        "rounds": options.rounds,
        "threads": options.threads,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("opencv-python", "supervision", "torchvision", "numpy")},
    }
    records = Records(options.output / "overlay.jsonl", setting)
    for task, (ours, others) in tasks.items():
        if task not in records.runs:
            records.add(task, compare(ours, others, options.rounds))
    records.write_table(table(records.runs))
    slow = [task for task, run in records.runs.items() if run["best_other_over_ours"] < 1 - TOLERANCE]
    if slow:
        raise SystemExit(f"draw_overlay is not the fastest at: {', '.join(slow)}.")


if __name__ == "__main__":
    main()
