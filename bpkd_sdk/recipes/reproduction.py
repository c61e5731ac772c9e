"""One figure of the paper's table, from the data to the number beside the paper's."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch import nn

from bpkd_sdk.data import DATASETS, DatasetSubset, SegmentationDataset
from bpkd_sdk.errors import check_choice
from bpkd_sdk.evaluation import Metrics, evaluate
from bpkd_sdk.evaluation.protocol import EvaluationProtocol
from bpkd_sdk.files import write_json
from bpkd_sdk.losses import METHODS, DistillationLoss
from bpkd_sdk.losses.method import describe as arguments_of
from bpkd_sdk.models import ZOO, create_model, get_spec, load_model
from bpkd_sdk.models.checkpoint import load_state
from bpkd_sdk.recipes.table import Recipe, Score, find_recipe
from bpkd_sdk.training.api import distill, train
from bpkd_sdk.training.config import TrainingConfig


def open_teacher(recipe: Recipe, teacher: nn.Module | str | Path | None) -> nn.Module:
    """The teacher of a row, in eval mode.

    Args:
        recipe: The row.
        teacher: A checkpoint, ours or OpenMMLab's, or a network in eval mode.

    Raises:
        ValueError: If there is none, or it is another network; with where to get the right one.
        FileNotFoundError: If there is no such file.
    """
    get_it = f"Get {recipe.teacher_source}"
    if teacher is None:
        raise ValueError(f"The row {recipe.name!r} needs its teacher, a {recipe.teacher}. {get_it}")
    network = teacher if isinstance(teacher, nn.Module) else load_model(teacher)
    name = get_spec(network).name
    if name != recipe.teacher:
        raise ValueError(f"The row {recipe.name!r} has a {recipe.teacher} as teacher, but got a {name}. {get_it}")
    return network


def create_student(recipe: Recipe, num_classes: int, backbone: str | Path | None) -> nn.Module:
    """The student of a row, with the auxiliary head if its network has one.

    Args:
        recipe: The row.
        num_classes: Of the data set.
        backbone: File of an ImageNet backbone as OpenMMLab has them; "imagenet" for timm's, where those fit; or None
            for random weights, with a warning, since the paper's students do not start from those.

    Raises:
        ValueError: If the file does not fit, or timm has no weights that do.
    """
    from_timm = "imagenet" if backbone == "imagenet" else None
    student = create_model(
        recipe.student, num_classes, aux_head=ZOO[recipe.student].has_aux_head, backbone_weights=from_timm
    )
    if backbone is None:
        warnings.warn(
            f"The student's backbone has random weights; the paper's start from ImageNet. Get {recipe.backbone_source}",
            stacklevel=3,
        )
    elif from_timm is None:
        load_backbone(student.get_submodule("backbone"), backbone)
    return student


def load_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Load an OpenMMLab classifier's weights into a backbone; what belongs to the classifier is left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint, or lacks weights of the backbone.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no backbone at {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle makes torch's reader fail in any way.
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable PyTorch checkpoint ({type(error).__name__}). Fetch it again."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    found = {str(key).removeprefix("backbone."): value for key, value in state.items()}
    own = backbone.state_dict()
    # Old files lack the count of batches, which nothing is computed from.
    fitting = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    load_state(backbone, fitting | {key: found[key] for key in own.keys() & found.keys()}, source=str(path))


# What a row can be trained by: the methods with this package's weights, and with those that were published.
CHOICES: dict[str, Callable[..., DistillationLoss]] = METHODS | {
    f"{name}_paper": method.paper for name, method in METHODS.items() if hasattr(method, "paper")
}

# Options that `describe` tells in words.
_TOLD = {
    "steps", "batch_size", "accumulate", "crop_size", "learning_rate", "optimizer", "weight_decay", "poly_power",
    "final_learning_rate", "scale", "base_size", "max_class_share", "aux_weight", "precision", "evaluate_every",
    "checkpoint_every",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A run that reproduces one figure of the paper's table.

    Attributes:
        recipe: The row.
        method: A name in `CHOICES`, or "none" for the student without a teacher.
        config: Of the training.
        evaluation: How the student is scored.
        limit_steps: Steps of a smoke run, whose figure means nothing; None for a whole one.
    """

    recipe: Recipe
    method: str
    config: TrainingConfig
    evaluation: EvaluationProtocol
    limit_steps: int | None

    @property
    def paper(self) -> Score | None:
        """The figure to reproduce; None where the paper has none."""
        return self.recipe.paper.get(self.method.removesuffix("_paper"))

    @property
    def setting(self) -> str:
        """The method, and whose weights it has."""
        if self.method == "none":
            return "none"
        whose = "published" if self.method.endswith("_paper") else "this package's"
        return f"{self.method}, {whose} weights"

    def create_method(self) -> DistillationLoss | None:
        """The method, with its arguments; None for "none"."""
        if self.method == "none":
            return None
        made = CHOICES[self.method](self.recipe.num_classes)
        made.name = self.method
        return made


def make_plan(row: str, method: str = "bpkd", *, limit_steps: int | None = None, **options: Any) -> Plan:
    """Resolve a row and a method.

    Args:
        row: "<data set>/<student>", one of `RECIPES`.
        method: A name in `METHODS` for this package's weights, such as "cwd"; with "_paper", as in "cwd_paper", for
            those of its paper or official code, where they are another setting; or "none": no teacher.
        limit_steps: Stop after so many steps, to see that everything works.
        **options: Fields of `TrainingConfig` that are to differ from the row's; `base_size` counts for the evaluation
            too.

    Raises:
        ValueError: For an unknown row or method, a value out of its range, or labels="teacher".
        TypeError: For an unknown option.
    """
    recipe = find_recipe(row)
    check_choice("method", method, (*CHOICES, "none"))
    settings = {
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "crop_size": recipe.crop_size,
        "base_size": recipe.base_size,
        "max_class_share": recipe.max_class_share,
        "optimizer": "sgd",
        "learning_rate": recipe.learning_rate,
        "final_learning_rate": recipe.final_learning_rate,
        "poly_power": recipe.poly_power,
        "weight_decay": recipe.weight_decay,
    }
    if limit_steps is not None:
        settings |= {"steps": limit_steps, "check_data": False}
    config = TrainingConfig.from_options(settings | options)
    if config.labels == "teacher":
        raise ValueError("A row's figure is against the data set's labels; leave out labels='teacher'.")
    return Plan(recipe, method, config, replace(recipe.evaluation, base_size=config.base_size), limit_steps)


def describe(plan: Plan) -> dict[str, str]:
    """Every setting of a plan in words, by what it is about."""
    recipe, config, scoring = plan.recipe, plan.config, plan.evaluation
    height, width = config.crop_size or recipe.crop_size
    momentum = ", momentum 0.9" if config.optimizer == "sgd" else ""
    further = {name: value for name, value in config.to_dict().items() if name not in _TOLD}
    steps = f"{config.steps} steps" + (" (a smoke run)" if plan.limit_steps is not None else "")
    facts = {
        "data set": f"{recipe.dataset}, {recipe.num_classes} classes",
        "teacher": "none" if plan.method == "none" else f"{recipe.teacher}, {recipe.teacher_source}",
        "student": f"{recipe.student}, its backbone from {recipe.backbone_source}",
        "method": _method(plan),
        "schedule": f"{steps}, rate {config.learning_rate_at(0):g} falling to {config.final_learning_rate:g}, "
        f"poly {config.poly_power:g}",
        "optimiser": f"{config.optimizer}{momentum}, weight decay {config.weight_decay:g}, "
        f"aux loss x {config.aux_weight:g}",
        "batch": f"{config.batch_size} crops of {height}x{width}, in {config.accumulate} part(s), {config.precision}",
        "augmentation": f"fitted into {_size(config.base_size)}, scaled {config.scale[0]:g} to {config.scale[1]:g}, "
        f"crops of which no class fills more than {config.max_class_share:.0%}, mirrored, colours",
        "evaluation": _evaluation(scoring),
        "intervals": f"scored every {config.evaluation_interval} steps, saved every {config.checkpoint_interval}",
        "further options": ", ".join(f"{name} {value}" for name, value in further.items()),
        "paper": ", ".join(f"{name} {score.miou:.2f} / {score.macc:.2f}" for name, score in recipe.paper.items()),
    }
    return facts | {f"note {i}": note for i, note in enumerate(recipe.notes, 1)}


def _method(plan: Plan) -> str:
    method = plan.create_method()
    arguments = ", ".join(f"{name} {value}" for name, value in arguments_of(method).items() if name != "name")
    return f"{plan.setting}: {arguments}" if arguments else plan.setting


def _evaluation(scoring: EvaluationProtocol) -> str:
    how = "whole images"
    if scoring.crop_size is not None:
        how = f"windows of {scoring.crop_size[0]}x{scoring.crop_size[1]}, stride {scoring.stride}"
    return f"{how}, fitted into {_size(scoring.base_size)}, one scale, not mirrored, labels at their own size"


def _size(size: tuple[int, int] | None) -> str:
    return "nothing" if size is None else f"{size[0]}x{size[1]} (longer x shorter side)"


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
        write_json(result.output_dir / REPORT, _facts(done))
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
        **changes: Fields of `EvaluationProtocol` that are to differ from the row's, for example ``flip=True``.

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
    return evaluate(model, dataset, device=device, protocol=protocol)


def _open_splits(plan: Plan, root: str | Path) -> tuple[SegmentationDataset, SegmentationDataset]:
    entry = DATASETS[plan.recipe.dataset]
    train_set, val_set = (entry.open(root, split) for split in ("train", "val"))
    if plan.limit_steps is not None:
        count = min(len(val_set), plan.limit_steps * plan.config.batch_size)
        return train_set, DatasetSubset(val_set, range(count))
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
