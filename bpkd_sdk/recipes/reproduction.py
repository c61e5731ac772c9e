"""One figure of the paper's table, from the data to the number beside the paper's."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch import nn

from bpkd_sdk.data import DATASETS, DatasetPart, SegmentationDataset
from bpkd_sdk.evaluation import Metrics, evaluate
from bpkd_sdk.models.checkpoint import write_atomically
from bpkd_sdk.recipes.networks import create_student, open_teacher
from bpkd_sdk.recipes.plan import Plan, make_plan
from bpkd_sdk.recipes.table import Score, find_recipe
from bpkd_sdk.training.api import distill, train

REPORT = "reproduction.json"


@dataclass(frozen=True)
class Reproduction:
    """One figure, ours and the paper's.

    Attributes:
        plan: What was run.
        metrics: Of the student, by the row's protocol.
        checkpoint: The student.
        output_dir: The folder of the run; `reproduction.json` in it holds all this.
        seconds_per_step: Mean over the run, without evaluations.
    """

    plan: Plan
    metrics: Metrics
    checkpoint: Path
    output_dir: Path
    seconds_per_step: float

    @property
    def ours(self) -> Score:
        """In percent."""
        return Score(100 * self.metrics.miou, 100 * self.metrics.macc)


def reproduce(
    row: str,
    root: str | Path,
    *,
    method: str = "bpkd",
    teacher: nn.Module | str | Path | None = None,
    backbone: str | Path | None = None,
    limit_steps: int | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> Reproduction:
    """Train the student of a row, and score it by the row's protocol.

    Args:
        row: "<data set>/<student>", one of `RECIPES`.
        root: Where the data set lies.
        method: As for `make_plan`.
        teacher: A checkpoint, ours or OpenMMLab's, or a network in eval mode. Not needed for "none".
        backbone: File of the student's ImageNet backbone, "imagenet" for timm's where they fit, or None for random
            weights.
        limit_steps: Train so many steps and score as many images as they hold, to see that everything works.
        output_dir: The folder of the run; None: a new one below ``runs``.
        resume: Go on from the state in `output_dir`, if there is one.
        **options: Fields of `TrainingConfig` that are to differ from the row's.

    Raises:
        FileNotFoundError: If data or a file is not there; with where to get it.
        ValueError: For an unknown row, unusable or incomplete data, or a teacher or backbone of another network.
        TypeError: For an unknown option.
    """
    plan = make_plan(row, method, limit_steps=limit_steps, **options)
    train_set, val_set = _open_splits(plan, root)
    torch.manual_seed(plan.config.seed)
    student = create_student(plan.recipe, train_set.num_classes, backbone)
    settings = dataclasses.asdict(plan.config) | {"protocol": plan.evaluation}
    settings |= {"output_dir": output_dir, "resume": resume}
    distillation = plan.create_method()
    if distillation is None:
        result = train(student, (train_set, val_set), **settings)
    else:
        guide = open_teacher(plan.recipe, teacher)
        result = distill(guide, student, (train_set, val_set), method=distillation, **settings)
    assert result.metrics is not None  # noqa: S101  (there are validation images)
    seconds = sum(record["seconds"] for record in result.history if "seconds" in record) / plan.config.steps
    done = Reproduction(plan, result.metrics, result.checkpoint, result.output_dir, seconds)
    if PartialState().is_main_process:
        write_atomically(result.output_dir / REPORT, json.dumps(_facts(done), indent=1).encode())
    return done


def score_checkpoint(
    row: str, root: str | Path, model: nn.Module | str | Path, *, device: str | None = None, **changes: Any
) -> Metrics:
    """Score any network by a row's protocol: a released student, the teacher, an exported file.

    Args:
        row: "<data set>/<student>", one of `RECIPES`.
        root: Where the data set lies.
        model: What `evaluate` takes.
        device: Where to run; None as for `evaluate`.
        **changes: Fields of `Protocol` that are to differ from the row's, for example ``flip=True``.

    Raises:
        FileNotFoundError: If data or file is not there.
        ValueError: For an unknown row, unusable data, or a network of other classes.
    """
    recipe = find_recipe(row)
    protocol = dataclasses.replace(recipe.evaluation, **changes)
    entry = DATASETS[recipe.dataset]
    dataset = entry.open(root, "val")
    if problem := entry.count_problem("val", dataset):
        warnings.warn(f"{dataset.name} in {root}: {problem}. This is the score of part of the data.", stacklevel=2)
    return evaluate(model, dataset, device=device, **dataclasses.asdict(protocol))


def _open_splits(plan: Plan, root: str | Path) -> tuple[SegmentationDataset, SegmentationDataset]:
    entry = DATASETS[plan.recipe.dataset]
    train_set, val_set = (entry.open(root, split) for split in ("train", "val"))
    if plan.limit_steps is not None:
        count = min(len(val_set), plan.limit_steps * plan.config.batch_size)
        return train_set, DatasetPart(val_set, range(count))
    for split, dataset in (("train", train_set), ("val", val_set)):
        if problem := entry.count_problem(split, dataset):
            raise ValueError(
                f"{dataset.name} in {root}: {problem}. A figure of part of the data is not the row's: unpack the "
                "archives again, see `bpkd data check`, or pass limit_steps for a smoke run."
            )
    return train_set, val_set


def _facts(done: Reproduction) -> dict[str, Any]:
    plan = done.plan
    return {
        "row": plan.recipe.name,
        "method": plan.method,
        "smoke_run_of_steps": plan.limit_steps,
        "ours": dataclasses.asdict(done.ours),
        "paper": None if plan.paper is None else dataclasses.asdict(plan.paper),
        "evaluation": dataclasses.asdict(plan.evaluation),
        "config": plan.config.to_dict(),
        "metrics": done.metrics.to_dict(),
        "checkpoint": done.checkpoint.name,
        "seconds_per_step": done.seconds_per_step,
    }
