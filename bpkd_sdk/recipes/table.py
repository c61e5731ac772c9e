"""The paper's table as data: one row for each data set and each pair of teacher and student.

The settings are from the configurations that the paper's authors released (github.com/AkideLiu/BPKD, eval/configs) and
from OpenMMLab's data set and schedule files, which these configurations include. The scores are from the authors'
README, in percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bpkd_sdk.errors import check_choice
from bpkd_sdk.evaluation.protocol import EvaluationProtocol

OPENMMLAB = "https://download.openmmlab.com/"
SEGMENTATION = f"{OPENMMLAB}mmsegmentation/v0.5/"
COLUMNS = ("teacher", "none", "skds", "ifvd", "cirkd", "cwd", "bpkd")  # "none": the student without a teacher


@dataclass(frozen=True)
class Score:
    """Mean IoU and mean accuracy over the classes, in percent."""

    miou: float
    macc: float


@dataclass(frozen=True)
class Recipe:
    """One row of the table: the training and the evaluation of a student.

    Attributes:
        name: Name of the row, "<data set>/<student>".
        dataset: Name of the data set, as `open_dataset` accepts it.
        num_classes: Number of classes of the data set.
        teacher: Name of the teacher's network in the zoo.
        student: Name of the student's network in the zoo. On Cityscapes, DeepLabV3+ is the narrower network of the
            released configuration.
        crop_size: (height, width) of the training crops.
        base_size: (longer side, shorter side) that images are fitted into before they are scaled by 0.5 to 2.
        batch_size: Number of images per optimiser step, over all GPUs.
        learning_rate: Learning rate of SGD at the first step.
        weight_decay: Weight decay of SGD.
        protocol: Evaluation protocol of the student.
        teacher_source: Address of the teacher's checkpoint.
        backbone_source: Address of the ImageNet weights of the student's backbone.
        paper: The paper's scores: of the teacher, of the student without a teacher ("none"), and of each method.
        notes: Ambiguities and contradictions in the table and the released configurations.
        steps: Number of optimiser steps.
        poly_power: Exponent of the schedule: the learning rate falls as (1 - step / steps) ** poly_power to
            `final_learning_rate`.
        final_learning_rate: Learning rate at the last step.
        max_class_share: Largest share of one class in a crop; other crops are drawn again.
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
    protocol: EvaluationProtocol
    teacher_source: str
    backbone_source: str
    paper: Mapping[str, Score]
    notes: tuple[str, ...] = ()
    steps: int = 80_000
    poly_power: float = 0.9
    final_learning_rate: float = 1e-4
    max_class_share: float = 0.75


@dataclass(frozen=True)
class _DatasetSettings:
    """The settings that the rows of one data set have in common."""

    num_classes: int
    crop_size: tuple[int, int]
    base_size: tuple[int, int]
    batch_size: int
    learning_rate: float
    weight_decay: float


_SETTINGS = {
    "cityscapes": _DatasetSettings(19, (512, 1024), (2048, 1024), 8, 0.01, 5e-4),
    "ade20k": _DatasetSettings(150, (512, 512), (2048, 512), 8, 0.01, 5e-4),
    "pascal_context_59": _DatasetSettings(59, (480, 480), (520, 520), 16, 0.004, 1e-4),
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

# Architecture, configuration, date and hash of each teacher; OpenMMLab builds its file names from these.
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

# Only these two rows slide a window over the images; all others segment whole images.
_WINDOWS = {"pascal_context_59/pspnet_r18": (480, 480), "pascal_context_59/hrnetv2p_w18s": (512, 512)}
_WINDOW_STRIDE = (320, 320)

_NOTES = {
    "cityscapes/pspnet_r18": (
        "The paper's student without a teacher is pspnet_r18b (7x7 stem), its distilled students are pspnet_r18.",
    ),
    "cityscapes/deeplabv3plus_mv2": (
        "The student is that of the released configuration, with 128 and 64 channels. The paper's parameters and "
        "FLOPs, and its student without a teacher, belong to the network with 512 and 256 channels.",
        "The paper links a DeepLabV3 as teacher; this row uses OpenMMLab's DeepLabV3+ with 80.97 mIoU.",
    ),
    "cityscapes/isanet_r18": (
        "The paper's teacher (80.61 mIoU) was trained on crops of 769x769 with other resizing; this row uses "
        "OpenMMLab's teacher for crops of 512x1024, with 80.32 mIoU.",
    ),
    "pascal_context_59/isanet_r18": (
        "The released configuration has 40k steps, but its name and the table have 80k; this row uses 80k.",
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


def _row(name: str, scores: list[float]) -> Recipe:
    dataset, student = name.split("/")
    settings, window = _SETTINGS[dataset], _WINDOWS.get(name)
    return Recipe(
        name=name,
        dataset=dataset,
        num_classes=settings.num_classes,
        teacher=_TEACHERS[student],
        student="deeplabv3plus_mv2_ch128" if name == "cityscapes/deeplabv3plus_mv2" else student,
        crop_size=settings.crop_size,
        base_size=settings.base_size,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        protocol=EvaluationProtocol(
            crop_size=window,
            stride=_WINDOW_STRIDE if window else None,
            base_size=settings.base_size,
        ),
        teacher_source=_teacher_source(name),
        backbone_source=_BACKBONES[student],
        paper=dict(zip(COLUMNS, map(Score, scores[::2], scores[1::2]), strict=True)),
        notes=_NOTES.get(name, ()),
    )


RECIPES: dict[str, Recipe] = {
    name: _row(name, [float(score) for score in scores])
    for name, *scores in map(str.split, _PAPER.strip().splitlines())
}


def find_recipe(name: str) -> Recipe:
    """Return a row by its name; raise ValueError with the nearest name if there is none."""
    check_choice("row", name, RECIPES)
    return RECIPES[name]
