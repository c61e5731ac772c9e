"""What a row and a method come to: every setting of the run, before anything is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bpkd_sdk.errors import check_choice
from bpkd_sdk.evaluation.protocol import Protocol
from bpkd_sdk.losses import METHODS, DistillationLoss
from bpkd_sdk.losses.arguments import describe as arguments_of
from bpkd_sdk.recipes.table import Recipe, Score, find_recipe
from bpkd_sdk.training.config import TrainingConfig

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
    evaluation: Protocol
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


def _evaluation(scoring: Protocol) -> str:
    how = "whole images"
    if scoring.crop_size is not None:
        how = f"windows of {scoring.crop_size[0]}x{scoring.crop_size[1]}, stride {scoring.stride}"
    return f"{how}, fitted into {_size(scoring.base_size)}, one scale, not mirrored, labels at their own size"


def _size(size: tuple[int, int] | None) -> str:
    return "nothing" if size is None else f"{size[0]}x{size[1]} (longer x shorter side)"
