"""Reproduces one score of the paper's table: trains the student of a row and evaluates it by the row's protocol."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch import nn

from bpkd_sdk.data import DATASETS, DatasetSubset, SegmentationDataset
from bpkd_sdk.errors import warn
from bpkd_sdk.evaluation import Metrics, evaluate
from bpkd_sdk.evaluation.api import Source
from bpkd_sdk.files import write_json
from bpkd_sdk.models import ZOO, create_model, get_spec, load_model
from bpkd_sdk.models.weights import NONE
from bpkd_sdk.recipes.plan import Plan, make_plan
from bpkd_sdk.recipes.table import Recipe, Score, find_recipe
from bpkd_sdk.training.api import distill, train

REPORT_FILE = "reproduction.json"


@dataclass(frozen=True)
class Reproduction:
    """The result of a run that reproduces one score of the table.

    Attributes:
        plan: Plan of the run.
        metrics: Scores of the student by the row's protocol.
        checkpoint: Path of the student's checkpoint.
        output_dir: Folder of the run; the file `reproduction.json` in it contains all of this.
        seconds_per_step: Mean time of a training step in seconds, without evaluations.
    """

    plan: Plan
    metrics: Metrics
    checkpoint: Path
    output_dir: Path
    seconds_per_step: float

    @property
    def ours(self) -> Score:
        """Scores of the student in percent."""
        return Score(100 * self.metrics.miou, 100 * self.metrics.macc)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        plan = self.plan
        return {
            "row": plan.recipe.name,
            "method": plan.method,
            "smoke_run_of_steps": plan.limit_steps,
            "ours": dataclasses.asdict(self.ours),
            "paper": None if plan.paper is None else dataclasses.asdict(plan.paper),
            "evaluation": dataclasses.asdict(plan.protocol),
            "config": plan.config.to_dict(),
            "metrics": self.metrics.to_dict(),
            "checkpoint": self.checkpoint.name,
            "seconds_per_step": self.seconds_per_step,
        }


def reproduce(
    row: str,
    root: str | Path,
    *,
    method: str = "bpkd_paper",
    teacher: nn.Module | str | Path | None = None,
    backbone: str | Path | None = None,
    limit_steps: int | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> Reproduction:
    """Train the student of a row of the paper's table, and evaluate it by the row's protocol.

    Args:
        row: Name of the row, "<data set>/<student>", one of `RECIPES`.
        root: Folder of the data set.
        method: Method of the distillation, or "none", as for `make_plan`.
        teacher: Checkpoint of the teacher, this package's or OpenMMLab's, or a network in eval mode. Not used with
            method="none".
        backbone: File with the ImageNet weights of the student's backbone, "imagenet" for timm's weights if the
            backbone can load them, or None for random weights.
        limit_steps: Number of steps of a smoke run, which executes every stage. It evaluates as many images as
            these steps use. None for a complete run.
        output_dir: Folder of the run; None creates a new one in ``runs``.
        resume: Continue from the state in `output_dir` if there is one.
        **options: Fields of `TrainingConfig` that replace those of the row.

    Raises:
        FileNotFoundError: If data or a file do not exist; with where to get them.
        ValueError: If the row is unknown, if the data are incomplete or cannot be used, or if the teacher or the
            backbone is of another network.
        TypeError: If an option is unknown.
    """
    plan = make_plan(row, method, limit_steps=limit_steps, **options)
    train_set, val_set = _open_splits(plan, root)
    torch.manual_seed(plan.config.seed)
    student = create_student(plan.recipe, train_set.num_classes, backbone)
    settings = dataclasses.asdict(plan.config)
    settings |= {"protocol": plan.protocol, "output_dir": output_dir, "resume": resume}
    loss = plan.create_method()
    if loss is None:
        result = train(student, (train_set, val_set), **settings)
    else:
        network = load_teacher(plan.recipe, teacher)
        result = distill(network, student, (train_set, val_set), method=loss, **settings)
    assert result.metrics is not None  # noqa: S101  (the validation set is not empty)
    seconds = sum(record["seconds"] for record in result.history if "seconds" in record) / plan.config.steps
    reproduction = Reproduction(plan, result.metrics, result.checkpoint, result.output_dir, seconds)
    if PartialState().is_main_process:
        write_json(result.output_dir / REPORT_FILE, reproduction.to_dict())
    return reproduction


def _open_splits(plan: Plan, root: str | Path) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Open the training and validation data of a plan; refuse an incomplete copy unless it is a smoke run."""
    entry = DATASETS[plan.recipe.dataset]
    train_set, val_set = (entry.open(root, split) for split in ("train", "val"))
    if plan.limit_steps is not None:
        count = min(len(val_set), plan.limit_steps * plan.config.batch_size)
        return train_set, DatasetSubset(val_set, range(count))
    for split, dataset in (("train", train_set), ("val", val_set)):
        if problem := entry.count_problem(split, dataset):
            raise ValueError(
                f"{dataset.name} in {root}: {problem}. The scores of the table need all images: unpack the archives "
                "again, see `bpkd data check`, or pass limit_steps for a smoke run."
            )
    return train_set, val_set


def load_teacher(recipe: Recipe, teacher: nn.Module | str | Path | None) -> nn.Module:
    """Return the teacher of a row in eval mode.

    Args:
        recipe: Row of the table.
        teacher: Checkpoint, this package's or OpenMMLab's, or a network in eval mode.

    Raises:
        ValueError: If `teacher` is None or another network than the row's; with where to get the right one.
        FileNotFoundError: If the file does not exist.
    """
    advice = f"Get {recipe.teacher_source}"
    if teacher is None:
        raise ValueError(f"The row {recipe.name!r} needs its teacher, a {recipe.teacher}. {advice}")
    network = teacher if isinstance(teacher, nn.Module) else load_model(teacher)
    name = get_spec(network).name
    if name != recipe.teacher:
        raise ValueError(f"The teacher of the row {recipe.name!r} is a {recipe.teacher}, but got a {name}. {advice}")
    return network


def create_student(recipe: Recipe, num_classes: int, backbone: str | Path | None) -> nn.Module:
    """Create the student of a row, with its auxiliary head if the network has one.

    Args:
        recipe: Row of the table.
        num_classes: Number of classes of the data set.
        backbone: File with OpenMMLab's ImageNet weights of the backbone; "imagenet" for timm's weights if the backbone
            can load them; or None for random weights, with a warning, since the paper's students use ImageNet weights.

    Raises:
        ValueError: If the file does not fit the backbone, or timm has no weights that fit.
    """
    student = create_model(
        recipe.student,
        num_classes,
        aux_head=ZOO[recipe.student].has_aux_head,
        backbone_weights=NONE if backbone is None else backbone,
    )
    if backbone is None:
        warn(
            "The student's backbone has random weights, but the paper's students start from ImageNet weights. "
            f"Get {recipe.backbone_source}"
        )
    return student


def score_checkpoint(
    row: str, root: str | Path, source: Source, *, device: str | None = None, **changes: Any
) -> Metrics:
    """Evaluate any network by a row's protocol: a released student, the teacher, or an exported file.

    Args:
        row: Name of the row, "<data set>/<student>", one of `RECIPES`.
        root: Folder of the data set.
        source: Network, as `evaluate` accepts it.
        device: Device to run on; None as for `evaluate`.
        **changes: Fields of `EvaluationProtocol` that replace those of the row, for example ``flip=True``.

    Raises:
        FileNotFoundError: If the data or the file do not exist.
        ValueError: If the row is unknown, the data cannot be used, or the network has other classes.
    """
    recipe = find_recipe(row)
    protocol = dataclasses.replace(recipe.protocol, **changes)
    entry = DATASETS[recipe.dataset]
    dataset = entry.open(root, "val")
    if problem := entry.count_problem("val", dataset):
        warn(f"{dataset.name} in {root}: {problem}. This is the score on part of the data.")
    return evaluate(source, dataset, device=device, protocol=protocol)
