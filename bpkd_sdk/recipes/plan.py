"""Resolves a row of the paper's table and a method into a training plan, and describes the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bpkd_sdk.errors import check_choice
from bpkd_sdk.evaluation.protocol import EvaluationProtocol
from bpkd_sdk.losses import METHODS, DistillationLoss
from bpkd_sdk.losses.method import method_arguments
from bpkd_sdk.recipes.table import Recipe, Score, find_recipe
from bpkd_sdk.training.config import TrainingConfig

# The methods with this package's weights, and with "_paper" the methods with published weights.
METHOD_CHOICES: dict[str, Callable[..., DistillationLoss]] = METHODS | {
    f"{name}_paper": method.paper for name, method in METHODS.items() if hasattr(method, "paper")
}


@dataclass(frozen=True)
class Plan:
    """A training run that reproduces one score of the paper's table.

    Attributes:
        recipe: Row of the table.
        method: Name in `METHOD_CHOICES`, or "none" for the student without a teacher.
        config: Options of the training.
        protocol: Evaluation protocol of the student.
        limit_steps: Number of steps of a smoke run, whose score is not a result; None for a complete run.
    """

    recipe: Recipe
    method: str
    config: TrainingConfig
    protocol: EvaluationProtocol
    limit_steps: int | None

    @property
    def paper(self) -> Score | None:
        """The paper's score; None if the paper has none for this method."""
        return self.recipe.paper.get(self.method.removesuffix("_paper"))

    @property
    def method_title(self) -> str:
        """Name of the method and the origin of its weights, for reports."""
        if self.method == "none":
            return "none"
        origin = "published" if self.method.endswith("_paper") else "this package's"
        return f"{self.method}, {origin} weights"

    def create_method(self) -> DistillationLoss | None:
        """Create the method with its arguments; return None for "none"."""
        if self.method == "none":
            return None
        method = METHOD_CHOICES[self.method](self.recipe.num_classes)
        method.name = self.method
        return method


def make_plan(row: str, method: str = "bpkd_paper", *, limit_steps: int | None = None, **options: Any) -> Plan:
    """Resolve a row of the table and a method into a plan.

    Args:
        row: Name of the row, "<data set>/<student>", one of `RECIPES`.
        method: Name in `METHODS`, such as "cwd", for this package's weights; the name with "_paper", such as
            "cwd_paper", for the weights of the method's paper or official code, if they differ; or "none" for the
            student without a teacher.
        limit_steps: Number of steps of a smoke run, which executes every stage; None for a complete run.
        **options: Fields of `TrainingConfig` that replace those of the row. `base_size` applies to the evaluation too.

    Raises:
        ValueError: If the row or the method is unknown, a value is out of range, or labels="teacher" is passed.
        TypeError: If an option is unknown.
    """
    recipe = find_recipe(row)
    check_choice("method", method, (*METHOD_CHOICES, "none"))
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
        raise ValueError("The scores of the table need the labels of the data set; do not pass labels='teacher'.")
    return Plan(recipe, method, config, replace(recipe.protocol, base_size=config.base_size), limit_steps)


# Options that `describe_plan` describes in sentences; it lists all others by name.
_DESCRIBED = {
    "steps", "batch_size", "accumulate", "crop_size", "learning_rate", "optimizer", "weight_decay", "poly_power",
    "final_learning_rate", "scale", "base_size", "max_class_share", "aux_weight", "precision", "evaluate_every",
    "checkpoint_every",
}  # fmt: skip


def describe_plan(plan: Plan) -> dict[str, str]:
    """Return a description of every setting of a plan, by topic."""
    recipe, config = plan.recipe, plan.config
    height, width = config.crop_size or recipe.crop_size
    momentum = ", momentum 0.9" if config.optimizer == "sgd" else ""
    others = {name: value for name, value in config.to_dict().items() if name not in _DESCRIBED}
    steps = f"{config.steps} steps" + (" (a smoke run)" if plan.limit_steps is not None else "")
    topics = {
        "data set": f"{recipe.dataset}, {recipe.num_classes} classes",
        "teacher": "none" if plan.method == "none" else f"{recipe.teacher}, {recipe.teacher_source}",
        "student": f"{recipe.student}, backbone weights from {recipe.backbone_source}",
        "method": _describe_method(plan),
        "schedule": f"{steps}, learning rate from {config.learning_rate_at(0):g} to {config.final_learning_rate:g}, "
        f"poly {config.poly_power:g}",
        "optimiser": f"{config.optimizer}{momentum}, weight decay {config.weight_decay:g}, "
        f"auxiliary loss x {config.aux_weight:g}",
        "batch": f"{config.batch_size} crops of {height}x{width}, in {config.accumulate} part(s), {config.precision}",
        "augmentation": f"fitted into {_describe_size(config.base_size)}, scaled by {config.scale[0]:g} to "
        f"{config.scale[1]:g}, crops in which no class fills more than {config.max_class_share:.0%}, flip, "
        "photometric distortion",
        "evaluation": _describe_evaluation(plan.protocol),
        "intervals": f"evaluated every {config.evaluation_interval} steps, saved every {config.checkpoint_interval}",
        "further options": ", ".join(f"{name} {value}" for name, value in others.items()),
        "paper": ", ".join(f"{name} {score.miou:.2f} / {score.macc:.2f}" for name, score in recipe.paper.items()),
    }
    return topics | {f"note {i}": note for i, note in enumerate(recipe.notes, 1)}


def _describe_method(plan: Plan) -> str:
    method = plan.create_method()
    arguments = ", ".join(f"{name} {value}" for name, value in method_arguments(method).items() if name != "name")
    return f"{plan.method_title}: {arguments}" if arguments else plan.method_title


def _describe_evaluation(protocol: EvaluationProtocol) -> str:
    images = "whole images"
    if protocol.crop_size is not None:
        images = f"windows of {protocol.crop_size[0]}x{protocol.crop_size[1]}, stride {protocol.stride}"
    return f"{images}, fitted into {_describe_size(protocol.base_size)}, one scale, no flip, labels at their own size"


def _describe_size(size: tuple[int, int] | None) -> str:
    return "nothing" if size is None else f"{size[0]}x{size[1]} (longer x shorter side)"
