"""Compare the loading of training crops by this package with torchvision v2 and Albumentations as commonly written.

    python -m benchmarks.loader

Each way reads the same images (JPEG) and labels (PNG) from disk, scales them by 0.5 to 2, crops, flips, distorts the
colours and returns batches of tensors, in one process on one thread. There are two settings: images of 512x1024 with
crops of 512x512, and images of 1024x2048 with crops of 512x1024. The ways take turns, in several rounds; times are the
medians over the rounds. "plain" is a torch DataLoader with a data set as users write it, which normalises images
for one network; "train" is the loader of `bpkd_sdk.train`, which seeds every draw, checks every sample and returns
bytes. Runs that are in loader.jsonl are not repeated.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import bpkd_sdk
from benchmarks.records import Records, make_parser, markdown_table
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.spec import IMAGENET_MEAN, IMAGENET_STD
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.loader import training_loader

IMAGES, BATCH, ROUNDS = 32, 8, 9
Size = tuple[int, int]
SETTINGS: tuple[tuple[Size, Size], ...] = (((512, 1024), (512, 512)), ((1024, 2048), (512, 1024)))  # image, crop


class Folder(Dataset[Any]):
    """Pairs of files, read by a function and augmented by another one."""

    def __init__(self, root: Path, read: Callable[[Path, Path], Any], augment: Callable[..., Any] | None) -> None:
        self.images = sorted((root / "images/train").iterdir())
        self.labels = sorted((root / "labels/train").iterdir())
        self.read, self.augment = read, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, label = self.read(self.images[index], self.labels[index])
        return (image, label) if self.augment is None else self.augment(image, label)


def read_pil(image: Path, label: Path) -> tuple[Any, Any]:
    return Image.open(image).convert("RGB"), tv_tensors.Mask(np.array(Image.open(label)))


def read_cv2(image: Path, label: Path) -> tuple[np.ndarray, np.ndarray]:
    return cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB), cv2.imread(str(label), cv2.IMREAD_UNCHANGED)


def torchvision_geometry(size: Size, crop: Size) -> list[Any]:
    fill = {Image.Image: (124, 116, 104), tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: 255}
    return [
        v2.ScaleJitter(size, (0.5, 2.0), antialias=True),
        v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(),
        v2.RandomPhotometricDistort(),
    ]


def albumentations_geometry(crop: Size) -> list[Any]:
    return [
        A.RandomScale((-0.5, 1.0), p=1),
        A.PadIfNeeded(*crop, border_mode=0, fill=(124, 116, 104), fill_mask=255),
        A.RandomCrop(*crop),
        A.HorizontalFlip(),
        A.ColorJitter(0.125, 0.5, 0.5, 0.1),
    ]


def ways(root: Path, size: Size, crop: Size) -> dict[str, Callable[[], Iterable[Any]]]:
    """Return a function for each way that starts one epoch and returns its batches."""
    to_tensor = [v2.ToImage(), v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    torchvision = v2.Compose(
        [*to_tensor[:1], *torchvision_geometry(size, crop), *to_tensor[1:], v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    composed = A.Compose([*albumentations_geometry(crop), A.Normalize(), ToTensorV2()])

    def call(image: np.ndarray, label: np.ndarray) -> tuple[Any, Any]:
        out = composed(image=image, mask=label)
        return out["image"], out["mask"]

    def plain(read: Callable[..., Any], augment: Callable[..., Any]) -> Callable[[], Iterable[Any]]:
        return lambda: DataLoader(Folder(root, read, augment), BATCH, shuffle=True, drop_last=True)

    def train(data: Any, transform: Any) -> Callable[[], Iterable[Any]]:
        config = TrainingConfig(steps=IMAGES // BATCH, batch_size=BATCH)
        return lambda: training_loader(data, config, crop, first_step=0, on_gpu=False, transform=transform)

    ours = bpkd_sdk.open_dataset(root)
    names = ours.class_names
    foreign = bpkd_sdk.as_dataset(Folder(root, read_cv2, None), class_names=names)
    return {
        "train, transform='paper'": train(ours, "paper"),
        "train, transform='light'": train(ours, "light"),
        "plain, torchvision v2": plain(read_pil, torchvision),
        "train, torchvision v2": train(ours, v2.Compose(torchvision_geometry(size, crop))),
        "plain, Albumentations": plain(read_cv2, call),
        "train, Albumentations": train(ours, A.Compose(albumentations_geometry(crop))),
        "train, Albumentations, foreign data set": train(foreign, A.Compose(albumentations_geometry(crop))),
    }


def write_images(root: Path, size: tuple[int, int]) -> None:
    data = ShapesDataset("train", length=IMAGES, size=size)
    for part in ("images/train", "labels/train"):
        (root / part).mkdir(parents=True)
    for index, (image, label) in enumerate(data):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"images/train/{index:03}.jpg", quality=90)
        Image.fromarray(label.numpy()).save(root / f"labels/train/{index:03}.png")
    (root / "classes.json").write_text(json.dumps(data.class_names))


def measure(size: Size, crop: Size, rounds: int) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), size)
        for number in range(rounds + 1):
            entries = list(ways(Path(folder), size, crop).items())
            for name, start in entries if number % 2 else reversed(entries):
                began = time.perf_counter()
                images = sum(len(batch[0]) for batch in start())
                times.setdefault(name, []).append(1000 * (time.perf_counter() - began) / images)
    runs = {}
    for name in ways_in_order(times):
        kept = sorted(times[name][1:])  # the first round is warm-up
        runs[f"{name}, {setting_name(size, crop)}"] = {
            "way": name,
            "ms_per_image": statistics.median(kept),
            "least": kept[0],
            "most": kept[-1],
        }
    return runs


def ways_in_order(times: dict[str, list[float]]) -> list[str]:
    return sorted(times, key=lambda name: (not name.startswith("train, transform"), name.split(", ")[1], name))


def setting_name(size: Size, crop: Size) -> str:
    return f"{size[0]}x{size[1]} to {crop[0]}x{crop[1]}"


def table(runs: dict[str, dict[str, Any]]) -> str:
    tables = []
    for setting in (setting_name(*sizes) for sizes in SETTINGS):
        kept = [run for key, run in runs.items() if key.endswith(setting)]
        rows = [(run["way"], f"{run['ms_per_image']:.1f}", f"{run['least']:.1f}–{run['most']:.1f}") for run in kept]
        tables.append(markdown_table((setting, "ms per image", "all rounds"), rows))
    return "\n".join(tables)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    versions = {"torch": torch.__version__, "albumentations": A.__version__, "opencv": cv2.__version__}
    records = Records(options.output / "loader.jsonl", {"versions": versions, "images": IMAGES})
    for size, crop in SETTINGS:
        if not any(key.endswith(setting_name(size, crop)) for key in records.runs):
            records.update(measure(size, crop, options.rounds))
    records.write_table(table(records.runs))


if __name__ == "__main__":
    main()
