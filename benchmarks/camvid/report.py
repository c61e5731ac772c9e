"""Report part of the CamVid study: accuracy by edge width, IoU by class, confidence intervals, and pictures."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.camvid.setup import Study
from benchmarks.camvid.training import BUDGETS, part_of
from benchmarks.study.scores import measure_edge_widths
from bpkd_sdk.comparison.run import PER_IMAGE_FILE, read_run
from bpkd_sdk.comparison.statistics import is_significant, paired_bootstrap
from bpkd_sdk.data import FileDataset
from bpkd_sdk.runtime import TorchRuntime
from bpkd_sdk.serve import draw_overlay

EDGE_WIDTHS = (3, 5, 9)  # pixels
SHOWN = ("alone", "cwd", "bpkd")


def report(study: Study) -> None:
    """Analyse the comparisons at equal steps and at equal seconds."""
    _, val = study.open_data()
    teacher = study.load_teacher()
    for part in map(part_of, BUDGETS):
        runs = study.finished_runs(part)
        if not runs:
            continue
        widths = {"teacher": [measure_edge_widths(study.runs / "teacher", teacher, val, EDGE_WIDTHS)]}
        for method, folders in runs.items():
            widths[method] = [
                measure_edge_widths(folder, study.load_student(folder), val, EDGE_WIDTHS) for folder in folders
            ]
        class_iou = {"teacher": [study.records()["teacher"]["metrics"]["per_class_iou"]]}
        class_iou |= {method: [read_run(folder).metrics["per_class_iou"] for folder in runs[method]] for method in runs}
        record = {"edge_widths": widths, "class_iou": class_iou, "bootstrap": bootstrap(runs)}
        study.save({f"{part}/report": record})
        networks = {"teacher": teacher} | {name: study.load_student(runs[name][0]) for name in SHOWN if name in runs}
        path = study.output / "camvid" / f"{part}.webp"
        draw(largest_changes(runs), val, networks).save(path, quality=85)


def bootstrap(runs: dict[str, list[Path]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return differences between methods, with intervals over the images and significance over the seeds."""
    counts = {method: [folder / PER_IMAGE_FILE for folder in folders] for method, folders in runs.items()}
    scores = {method: [read_run(folder).metrics for folder in folders] for method, folders in runs.items()}
    pairs = [(method, "alone") for method in runs if method != "alone"]
    pairs += [("bpkd no edges", "cwd 2")]
    for leader, others in (("bpkd", {"alone", "bpkd"}), ("bpkd with kd", {"alone", "bpkd", "bpkd with kd"})):
        pairs += [(leader, method) for method in runs if method not in others]

    def is_beyond_seeds(one: str, other: str, name: str) -> bool:
        differences = [a[name] - b[name] for a, b in zip(scores[one], scores[other], strict=True)]
        return any(is_significant({seed: sign * value for seed, value in enumerate(differences)}) for sign in (1, -1))

    return {
        f"{one} - {other}": {
            name: asdict(interval) | {"beyond_seeds": is_beyond_seeds(one, other, name)}
            for name, interval in intervals.items()
        }
        for (one, other), intervals in paired_bootstrap(counts, pairs).items()
    }


def largest_changes(runs: dict[str, list[Path]]) -> list[int]:
    """Return the two images with the largest gain of accuracy by BPKD, and the two with the largest loss."""

    def accuracy(method: str) -> Tensor:
        counts = torch.stack([load_file(folder / PER_IMAGE_FILE)["band"] for folder in runs[method]])
        correct, known = counts.sum((0, 2)).unbind(1)
        return correct / known

    order = (accuracy("bpkd") - accuracy("alone")).argsort().tolist()
    return [*order[:-3:-1], *order[:2]]


def draw(indices: list[int], data: FileDataset, networks: dict[str, nn.Module]) -> Image.Image:
    """Draw images with the overlays of their labels and of the networks' masks."""
    figure = Figure(figsize=(3 * (2 + len(networks)), 2.4 * len(indices)), dpi=80, layout="constrained")
    grid = figure.subplots(len(indices), 2 + len(networks), squeeze=False)
    for row, index in zip(grid, indices, strict=True):
        image, label = data[index]
        photo = image.permute(1, 2, 0).numpy()
        masks = {"label": label.numpy()}
        masks |= {name: TorchRuntime(network)(photo[None])[0] for name, network in networks.items()}
        pictures = {"image": photo} | {name: draw_overlay(photo, mask, data.palette) for name, mask in masks.items()}
        for axes, (name, picture) in zip(row, pictures.items(), strict=True):
            axes.imshow(picture)
            axes.set_title(Path(data.sample_name(index)).stem if name == "image" else name, fontsize=9)
            axes.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file).convert("RGB")
