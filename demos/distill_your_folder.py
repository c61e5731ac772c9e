r"""Your own images: a teacher learns them, a small student learns from it, and one file comes out that needs no torch.

    python demos/distill_your_folder.py my_data --teacher smp/DeepLabV3Plus/resnet50 --student smp/FPN/mobilenet_v2 \
        --teacher-steps 20000 --student-steps 20000 --crop 512 512

Without a folder a small one is made of generated scenes first; look into it to see how yours must be laid out:

    my_data/classes.json                    {"class_names": ["road", "car", ...]}
    my_data/images/train/*.jpg, images/val/*.jpg
    my_data/labels/train/*.png, labels/val/*.png        class ids of the same names; 255 where not known
"""

import argparse
import json
from pathlib import Path

from PIL import Image

import bpkd_sdk as bpkd
from bpkd_sdk.data import shapes
from bpkd_sdk.export import to_onnx


def write_example(folder: Path, images: dict[str, int]) -> Path:
    """A folder of generated scenes in the layout that `bpkd.open_dataset` reads."""
    for split, count in images.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, label = shapes.render(0, split, index)
            Image.fromarray(image).save(folder / "images" / split / f"{index:03}.png")
            Image.fromarray(label).save(folder / "labels" / split / f"{index:03}.png")
    facts = {"class_names": shapes.CLASS_NAMES, "palette": shapes.PALETTE}
    (folder / "classes.json").write_text(json.dumps(facts))
    return folder


def main(arguments: list[str] | None = None) -> Path:
    """Run the story; returns the path of the exported student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="your folder")
    parser.add_argument("--teacher", default="smp/Unet/tu-test_resnet", help="a network's name, or a checkpoint")
    parser.add_argument("--student", default="smp/Linknet/tu-test_resnet")
    parser.add_argument("--teacher-steps", type=int, default=100, help="0 for a teacher that is trained already")
    parser.add_argument("--student-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--output", type=Path, default=Path("runs/your_folder"))
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
        "resume": True,  # Ctrl+C, and the same command again, goes on
    }
    teacher: Path | str = options.teacher
    if options.teacher_steps:
        run = bpkd.train(teacher, data, steps=options.teacher_steps, output_dir=options.output / "teacher", **common)
        teacher = run.checkpoint
    student = bpkd.distill(
        teacher, options.student, data, steps=options.student_steps, output_dir=options.output / "student", **common
    )

    file = options.output / "student.onnx"
    report = to_onnx(student.model, file, input_size=tuple(options.crop), dynamic_size=True)
    scores = bpkd.evaluate(file, data[1], device="cpu")
    print(f"{file}: {report.size / 1e6:.2f} MB, mIoU {scores.miou:.3f}, boundary IoU {scores.boundary_iou:.3f}")
    print(f"See it beside its teacher: bpkd serve --teacher {teacher} --student {file} --examples {folder}")
    return file


if __name__ == "__main__":
    main()
