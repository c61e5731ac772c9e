r"""Compare students with their teacher: cost, accuracy, agreement with the teacher, and pictures of their masks.

    make quickstart
    python demos/compare_students.py

    python demos/compare_students.py --teacher teacher.safetensors --students a.safetensors b.onnx c.engine \
        --data my_data --device cuda
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

import bpkd_sdk as bpkd
from bpkd_sdk.serve import draw_difference
from bpkd_sdk.serve.networks import ServedModel, open_models, reorder_models


def format_row(
    model: ServedModel, teacher: ServedModel, data: bpkd.SegmentationDataset, images: list[np.ndarray]
) -> list[str]:
    """Measure one network and format a row of the table."""
    params, macs = model.cost(images[0].shape[:2])
    latency = model.measure(images[0])
    scores = bpkd.evaluate(model.predictor.runtime, data)
    agreement = np.mean([model.predictor(image).mask == teacher.predictor(image).mask for image in images])
    return [
        model.name,
        f"{params / 1e6:.2f} M" if params else "-",
        f"{macs / 1e9:.2f} G" if macs else "-",
        f"{model.file_bytes / 1e6:.2f} MB" if model.file_bytes else "-",
        f"{latency.total:.1f} ms",
        f"{scores.miou:.3f}",
        f"{scores.boundary_iou:.3f}",
        f"{agreement:.1%}",
    ]


def draw_grid(models: Sequence[ServedModel], images: list[np.ndarray]) -> np.ndarray:
    """Draw one row per image: image, overlay of each network, difference between the first and the last network."""
    rows = []
    for image in images:
        predictions = [model.predictor(image) for model in models]
        difference, _ = draw_difference(image, predictions[0].mask, predictions[-1].mask)
        rows.append(np.hstack([image, *(prediction.overlay() for prediction in predictions), difference]))
    return np.vstack(rows)


def main(arguments: list[str] | None = None) -> Path:
    """Print the table, write the picture and return its path."""
    runs = Path("quickstart")
    students = ("student_alone/last.safetensors", "student_bpkd/last.safetensors", "student.onnx")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="shapes-teacher", help="file or name of the teacher")
    parser.add_argument(
        "--students", type=Path, nargs="+", default=[runs / name for name in students], help="files of the students"
    )
    parser.add_argument("--data", default="shapes", help="name of a data set, or a folder")
    parser.add_argument(
        "--images", type=int, default=4, help="number of images in the picture and in the measurement of agreement"
    )
    parser.add_argument("--device", default="auto", help="device: auto, cpu, cuda, ...")
    parser.add_argument("--output", type=Path, default=Path("students.png"), help="path of the picture")
    options = parser.parse_args(arguments)
    data = bpkd.open_dataset(options.data, split="val")
    images = [data[index][0].permute(1, 2, 0).contiguous().numpy() for index in range(min(options.images, len(data)))]
    models = reorder_models(open_models(options.students, teacher=options.teacher, device=options.device))
    for unavailable in models.unavailable:
        print(f"{unavailable.name} was skipped: {unavailable.reason}")
    if models.teacher is None:
        parser.error("This comparison needs a teacher, and the teacher cannot be opened.")

    table = Table()
    table.add_column("network", no_wrap=True)
    for heading in ("params", "MACs", "file size", "latency", "mIoU", "boundary IoU", "agreement with the teacher"):
        table.add_column(heading, justify="right")
    for model in models.available:
        table.add_row(*format_row(model, models.teacher, data, images))
    Console().print(table)
    Image.fromarray(draw_grid(models.available, images)).save(options.output)
    names = ", ".join(model.name for model in models.available)
    print(f"{options.output} shows, from left to right: image, {names}, difference between the first and the last")
    return options.output


if __name__ == "__main__":
    main()
