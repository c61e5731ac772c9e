"""The paper's table as data: one row for each data set and each pair of networks.

Settings are those of the configurations that the paper's authors released (github.com/AkideLiu/BPKD, eval/configs) and
of OpenMMLab's data set and schedule files that these build on. Scores are those of the authors' README, in percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bpkd_sdk.errors import check_choice
from bpkd_sdk.evaluation.protocol import EvaluationProtocol

OPENMMLAB = "https://download.openmmlab.com/"
SEGMENTATION = f"{OPENMMLAB}mmsegmentation/v0.5/"
SCORED = ("teacher", "none", "skds", "ifvd", "cirkd", "cwd", "bpkd")  # "none": the student without a teacher


@dataclass(frozen=True)
class Score:
    """Mean IoU and mean accuracy over classes, in percent."""

    miou: float
    macc: float


@dataclass(frozen=True)
class Recipe:
    """One row of the table: how a student is trained and scored.

    Attributes:
        name: "<data set>/<student>".
        dataset: What `open_dataset` takes.
        num_classes: Of the data set.
        teacher: A name in the zoo.
        student: A name in the zoo; on Cityscapes the narrower DeepLabV3+ of the released configuration.
        crop_size: (height, width) of the training crops.
        base_size: (longer side, shorter side) that images are fitted into before they are scaled by 0.5 to 2.
        batch_size: Images a step, on all GPUs together.
        learning_rate: Of SGD at the first step.
        weight_decay: Of SGD.
        evaluation: How the student is scored.
        teacher_source: Where the teacher's checkpoint can be had.
        backbone_source: Where the student's ImageNet backbone can be had.
        paper: The paper's scores: "teacher", "none" (the student alone), and by method.
        notes: What the table and the released configurations leave open, or contradict each other in.
        steps: Optimiser steps.
        poly_power: The rate falls as (1 - step / steps) ** poly_power to `final_learning_rate`.
        final_learning_rate: At the last step.
        max_class_share: Crops that one class fills beyond this share are drawn again.
    """

    name: str
    dataset: str
    num_classes: int
    teacher: str
    student: str
    crop_size: tuple[int, int]
    base_size: tuple[int, int]
    batch_size: int
    learning_rate: float
    weight_decay: float
    evaluation: EvaluationProtocol
    teacher_source: str
    backbone_source: str
    paper: Mapping[str, Score]
    notes: tuple[str, ...] = ()
    steps: int = 80_000
    poly_power: float = 0.9
    final_learning_rate: float = 1e-4
    max_class_share: float = 0.75


@dataclass(frozen=True)
class _Setting:
    """What the rows of one data set share."""

    num_classes: int
    crop_size: tuple[int, int]
    base_size: tuple[int, int]
    batch_size: int
    learning_rate: float
    weight_decay: float


_SETTINGS = {
    "cityscapes": _Setting(19, (512, 1024), (2048, 1024), 8, 0.01, 5e-4),
    "ade20k": _Setting(150, (512, 512), (2048, 512), 8, 0.01, 5e-4),
    "pascal_context_59": _Setting(59, (480, 480), (520, 520), 16, 0.004, 1e-4),
}

_TEACHERS = {
    "pspnet_r18": "pspnet_r101",
    "hrnetv2p_w18s": "hrnetv2p_w48",
    "deeplabv3plus_mv2": "deeplabv3plus_r101",
    "isanet_r18": "isanet_r101",
}

_R18 = f"{OPENMMLAB}pretrain/third_party/resnet18_v1c-b5776b93.pth"
_MV2 = f"{OPENMMLAB}mmclassification/v0/mobilenet_v2/mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth"
_BACKBONES = {
    "pspnet_r18": _R18,
    "hrnetv2p_w18s": f"{OPENMMLAB}pretrain/third_party/hrnetv2_w18_small-b5a04e21.pth",
    "deeplabv3plus_mv2": _MV2,
    "isanet_r18": _R18,
}

# The configuration of each teacher, its date and hash: file and folder names of OpenMMLab are made of these.
_TEACHER_FILES = {
    "cityscapes/pspnet_r18": ("pspnet", "pspnet_r101-d8_512x1024_80k_cityscapes", "20200606_112211-e1e1100f"),
    "cityscapes/hrnetv2p_w18s": ("hrnet", "fcn_hr48_512x1024_160k_cityscapes", "20200602_190946-59b7973e"),
    "cityscapes/deeplabv3plus_mv2": (
        "deeplabv3plus",
        "deeplabv3plus_r101-d8_512x1024_80k_cityscapes",
        "20200606_114143-068fcfe9",
    ),
    "cityscapes/isanet_r18": ("isanet", "isanet_r101-d8_512x1024_80k_cityscapes", "20210901_145243-5b99c9b2"),
    "ade20k/pspnet_r18": ("pspnet", "pspnet_r101-d8_512x512_160k_ade20k", "20200615_100650-967c316f"),
    "ade20k/hrnetv2p_w18s": ("hrnet", "fcn_hr48_512x512_160k_ade20k", "20200614_214407-a52fc02c"),
    "ade20k/deeplabv3plus_mv2": (
        "deeplabv3plus",
        "deeplabv3plus_r101-d8_512x512_160k_ade20k",
        "20200615_123232-38ed86bb",
    ),
    "ade20k/isanet_r18": ("isanet", "isanet_r101-d8_512x512_160k_ade20k", "20210903_211431-a7879dcd"),
    "pascal_context_59/pspnet_r18": (
        "pspnet",
        "pspnet_r101-d8_480x480_80k_pascal_context_59",
        "20210416_114418-fa6caaa2",
    ),
    "pascal_context_59/hrnetv2p_w18s": (
        "hrnet",
        "fcn_hr48_480x480_80k_pascal_context_59",
        "20210411_003240-3ae7081e",
    ),
    "pascal_context_59/deeplabv3plus_mv2": (
        "deeplabv3plus",
        "deeplabv3plus_r101-d8_480x480_80k_pascal_context_59",
        "20210416_111127-7ca0331d",
    ),
}
_ISANET_CONTEXT = (
    "https://github.com/AkideLiu/BPKD/releases/download/v0.0.3/raw_80k_isanet_r18_pascal_context_59_teacher.pth"
)

# Only these two slide a window; all others see whole images.
_WINDOWS = {"pascal_context_59/pspnet_r18": (480, 480), "pascal_context_59/hrnetv2p_w18s": (512, 512)}
_WINDOW_STRIDE = (320, 320)

_NOTES = {
    "cityscapes/pspnet_r18": (
        "The paper's student without a teacher is pspnet_r18b (7x7 stem), its distilled students are pspnet_r18.",
    ),
    "cityscapes/deeplabv3plus_mv2": (
        "The student is the released configuration's, 128 and 64 channels wide; the paper's parameters and FLOPs, and "
        "its student without a teacher, are those of 512 and 256.",
        "The paper links a DeepLabV3 as teacher; named here is OpenMMLab's DeepLabV3+ of 80.97 mIoU.",
    ),
    "cityscapes/isanet_r18": (
        "The paper's teacher (80.61 mIoU) was trained on crops of 769x769 with other resizing; named here is "
        "OpenMMLab's of 512x1024, 80.32 mIoU.",
    ),
    "pascal_context_59/isanet_r18": (
        "The released configuration says 40k steps, its name and the table say 80k: 80k here.",
    ),
}

_PAPER = """
cityscapes/pspnet_r18                79.74 86.56  74.23 81.45  76.13 82.58  76.24 82.81  76.03 82.56  76.26 83.04  77.57 84.47
cityscapes/hrnetv2p_w18s             80.65 87.39  75.31 83.71  77.27 84.77  77.18 84.74  77.36 84.97  77.87 84.98  78.58 85.78
cityscapes/deeplabv3plus_mv2         80.98 88.70  75.29 83.11  76.05 84.14  76.97 84.85  77.71 85.33  77.97 86.68  78.59 86.45
cityscapes/isanet_r18                80.61 88.29  73.62 80.36  74.99 82.61  75.35 82.86  75.41 82.92  75.43 82.64  75.72 83.65
ade20k/pspnet_r18                    44.39 54.75  33.30 42.58  34.49 44.28  34.54 44.26  35.07 45.38  37.02 46.33  38.51 47.70
ade20k/hrnetv2p_w18s                 42.02 53.52  31.38 41.39  32.57 43.22  32.66 43.23  33.06 44.30  34.00 42.76  35.31 46.11
ade20k/deeplabv3plus_mv2             45.47 56.41  31.56 45.14  32.49 46.47  32.11 46.07  32.24 46.09  35.12 49.76  35.49 53.84
ade20k/isanet_r18                    43.80 54.39  31.15 41.21  32.16 41.80  32.78 42.61  32.82 42.71  37.56 45.79  38.73 47.92
pascal_context_59/pspnet_r18         52.47 63.15  43.79 54.46  45.08 55.56  45.97 56.60  45.62 56.15  45.99 55.56  46.82 56.29
pascal_context_59/hrnetv2p_w18s      51.12 61.39  40.62 51.43  41.54 52.18  41.55 52.24  42.02 52.88  42.89 53.37  43.96 54.51
pascal_context_59/deeplabv3plus_mv2  53.20 64.04  41.01 52.92  42.07 55.06  41.73 54.34  42.25 55.12  43.74 56.37  46.23 58.12
pascal_context_59/isanet_r18         53.41 64.04  44.05 54.67  45.69 56.27  46.75 56.40  45.83 56.11  46.76 56.48  47.25 56.81
"""  # noqa: E501


def _teacher_source(name: str) -> str:
    if name not in _TEACHER_FILES:
        return _ISANET_CONTEXT
    family, config, version = _TEACHER_FILES[name]
    return f"{SEGMENTATION}{family}/{config}/{config}_{version}.pth"


def _row(name: str, figures: list[float]) -> Recipe:
    dataset, student = name.split("/")
    setting, window = _SETTINGS[dataset], _WINDOWS.get(name)
    return Recipe(
        name=name,
        dataset=dataset,
        num_classes=setting.num_classes,
        teacher=_TEACHERS[student],
        student="deeplabv3plus_mv2_ch128" if name == "cityscapes/deeplabv3plus_mv2" else student,
        crop_size=setting.crop_size,
        base_size=setting.base_size,
        batch_size=setting.batch_size,
        learning_rate=setting.learning_rate,
        weight_decay=setting.weight_decay,
        evaluation=EvaluationProtocol(
            mode="slide" if window else "whole",
            crop_size=window,
            stride=_WINDOW_STRIDE if window else None,
            base_size=setting.base_size,
        ),
        teacher_source=_teacher_source(name),
        backbone_source=_BACKBONES[student],
        paper=dict(zip(SCORED, map(Score, figures[::2], figures[1::2]), strict=True)),
        notes=_NOTES.get(name, ()),
    )


RECIPES: dict[str, Recipe] = {
    name: _row(name, [float(figure) for figure in figures])
    for name, *figures in map(str.split, _PAPER.strip().splitlines())
}


def find_recipe(name: str) -> Recipe:
    """A row by its name; ValueError names the nearest."""
    check_choice("row", name, RECIPES)
    return RECIPES[name]
