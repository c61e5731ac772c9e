r"""Several students of one teacher: what they cost, how good they are, how far they agree with it, and how they look.

    make quickstart
    python demos/compare_students.py

    python demos/compare_students.py --teacher teacher.safetensors --students a.safetensors b.onnx c.engine \
        --data my_data --device cuda
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

import bpkd_sdk as bpkd
from bpkd_sdk.serve import draw_difference, draw_overlay
from bpkd_sdk.serve.networks import Network, match_networks, open_networks


def row(network: Network, teacher: Network, data: bpkd.SegmentationDataset, images: list[np.ndarray]) -> list[str]:
    """The figures of one network, ready for the table."""
    assert network.predictor is not None  # noqa: S101  (only open networks are compared)
    assert teacher.predictor is not None  # noqa: S101
    params, macs = network.cost(images[0].shape[:2])
    latency = network.measure(images[0])
    scores = bpkd.evaluate(network.predictor.runtime, data)
    agreement = np.mean([network.predictor(image).mask == teacher.predictor(image).mask for image in images])
    return [
        network.name,
        f"{params / 1e6:.2f} M" if params else "-",
        f"{macs / 1e9:.2f} G" if macs else "-",
        f"{network.bytes / 1e6:.2f} MB" if network.bytes else "-",
        f"{latency.total:.1f} ms",
        f"{scores.miou:.3f}",
        f"{scores.boundary_iou:.3f}",
        f"{agreement:.1%}",
    ]


def picture(networks: list[Network], images: list[np.ndarray]) -> np.ndarray:
    """A row for each image: the image, what each network sees in it, where the last differs from the first."""
    rows = []
    for image in images:
        predictions = [network.predictor(image) for network in networks if network.predictor]
        overlays = [draw_overlay(image, one.mask, one.palette) for one in predictions]
        difference, _ = draw_difference(image, predictions[0].mask, predictions[-1].mask)
        rows.append(np.hstack([image, *overlays, difference]))
    return np.vstack(rows)


def main(arguments: list[str] | None = None) -> Path:
    """Print the table and write the picture; returns its path."""
    made = Path("quickstart")
    students = ("student_alone/last.safetensors", "student_bpkd/last.safetensors", "student.onnx")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=made / "teacher/last.safetensors")
    parser.add_argument("--students", type=Path, nargs="+", default=[made / name for name in students])
    parser.add_argument("--data", default="shapes", help="a data set's name, or a folder")
    parser.add_argument("--images", type=int, default=4, help="in the picture, and to measure agreement on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("students.png"))
    options = parser.parse_args(arguments)
    data = bpkd.open_dataset(options.data, split="val")
    images = [data[index][0].permute(1, 2, 0).contiguous().numpy() for index in range(min(options.images, len(data)))]
    networks = match_networks(open_networks([options.teacher, *options.students], options.device))
    for network in networks:
        if network.problem:
            print(f"{network.name} is left out: {network.problem}")
    teacher, *students = opened = [network for network in networks if network.predictor]

    table = Table()
    table.add_column("network", no_wrap=True)
    for heading in ("params", "MACs", "file", "latency", "mIoU", "boundary IoU", "as the teacher"):
        table.add_column(heading, justify="right")
    for network in opened:
        table.add_row(*row(network, teacher, data, images))
    Console().print(table)
    Image.fromarray(picture(opened, images)).save(options.output)
    print(f"{options.output}: image, teacher, {', '.join(one.name for one in students)}, teacher and the last differ")
    return options.output


if __name__ == "__main__":
    main()
