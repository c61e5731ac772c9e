r"""Train a teacher and a small student on a folder of images, and export the student to one ONNX file.

The exported file runs without torch.

    python demos/distill_your_folder.py my_data --teacher smp/DeepLabV3Plus/resnet50 --student smp/FPN/mobilenet_v2 \
        --teacher-steps 20000 --student-steps 20000 --crop 512 512

Without a folder, the program first writes a small folder of generated scenes, which shows the required layout:

    my_data/classes.json                    {"class_names": ["road", "car", ...]}
    my_data/images/train/*.jpg, images/val/*.jpg
    my_data/labels/train/*.png, labels/val/*.png        class ids, with the file names of the images; 255 for void
"""

import argparse
import json
from pathlib import Path

from PIL import Image

import bpkd_sdk as bpkd
from bpkd_sdk.data import shapes
from bpkd_sdk.export import to_onnx


def write_example(path: Path, images: dict[str, int]) -> Path:
    """Write generated scenes into a folder, in the layout that `bpkd.open_dataset` reads.

    Args:
        path: Path of the folder.
        images: Number of images of each split, by the name of the split.
    """
    for split, count in images.items():
        for kind in ("images", "labels"):
            (path / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, label = shapes.render(0, split, index)
            Image.fromarray(image).save(path / "images" / split / f"{index:03}.png")
            Image.fromarray(label).save(path / "labels" / split / f"{index:03}.png")
    classes = {"class_names": shapes.CLASS_NAMES, "palette": shapes.PALETTE}
    (path / "classes.json").write_text(json.dumps(classes))
    return path


def main(arguments: list[str] | None = None) -> Path:
    """Train, distill and export; return the path of the exported student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder of images and labels")
    parser.add_argument("--teacher", default="smp/Unet/tu-test_resnet", help="name of a network, or a checkpoint")
    parser.add_argument("--student", default="smp/Linknet/tu-test_resnet", help="name of a network, or a checkpoint")
    parser.add_argument(
        "--backbone-weights",
        help="weights that encoders start from: imagenet, none, or a file; default: imagenet, none without a folder",
    )
    parser.add_argument(
        "--teacher-steps", type=int, default=100, help="optimiser steps of the teacher; 0 for a trained teacher"
    )
    parser.add_argument("--student-steps", type=int, default=100, help="optimiser steps of the student")
    parser.add_argument("--batch-size", type=int, default=8, help="number of images per optimiser step")
    parser.add_argument(
        "--crop", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"), help="size of training crops"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/your_folder"), help="folder for runs and export")
    options = parser.parse_args(arguments)
    folder = options.data or write_example(options.output / "data", {"train": 64, "val": 8})
    data = (
        bpkd.open_dataset("folder", root=folder, split="train"),
        bpkd.open_dataset("folder", root=folder, split="val"),
    )

    common = {
        "batch_size": options.batch_size,
        "crop_size": tuple(options.crop),
        "optimizer": "adamw",
        "learning_rate": 3e-3,
        "backbone_weights": options.backbone_weights or ("imagenet" if options.data else "none"),
        "resume": True,  # after Ctrl+C, the same command continues the run
    }
    teacher: Path | str = options.teacher
    if options.teacher_steps:
        run = bpkd.train(teacher, data, steps=options.teacher_steps, output_dir=options.output / "teacher", **common)
        teacher = run.checkpoint
    student = bpkd.distill(
        teacher, options.student, data, steps=options.student_steps, output_dir=options.output / "student", **common
    )

    path = options.output / "student.onnx"
    report = to_onnx(student.model, path, input_size=tuple(options.crop), dynamic_size=True)
    scores = bpkd.evaluate(path, data[1], device="cpu")
    print(f"{path}: {report.size / 1e6:.2f} MB, mIoU {scores.miou:.3f}, boundary IoU {scores.boundary_iou:.3f}")
    print(f"Compare with the teacher: bpkd serve {path} --teacher {teacher} --examples {folder}")
    return path


if __name__ == "__main__":
    main()
