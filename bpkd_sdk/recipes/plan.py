"""What a row and a method come to: every setting of the run, before anything is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bpkd_sdk.errors import check_choice
from bpkd_sdk.evaluation.protocol import Protocol
from bpkd_sdk.losses import METHODS
from bpkd_sdk.recipes.table import Recipe, Score, find_recipe
from bpkd_sdk.training.config import TrainingConfig


@dataclass(frozen=True)
class Plan:
    """A run that reproduces one figure of the paper's table.

    Attributes:
        recipe: The row.
        method: A name in `bpkd_sdk.losses.METHODS`, or "none" for the student without a teacher.
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


def make_plan(row: str, method: str = "bpkd", *, limit_steps: int | None = None, **options: Any) -> Plan:
    """Resolve a row and a method.

    Args:
        row: "<data set>/<student>", one of `RECIPES`.
        method: A name in `METHODS`, or "none". "bpkd" has this package's defaults, "bpkd_paper" the paper's weights.
        limit_steps: Stop after so many steps, to see that everything works.
        **options: Fields of `TrainingConfig` that are to differ from the row's; `base_size` counts for the evaluation
            too.

    Raises:
        ValueError: For an unknown row or method, or a value out of its range.
        TypeError: For an unknown option.
    """
    recipe = find_recipe(row)
    check_choice("method", method, (*METHODS, "none"))
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
    return Plan(recipe, method, config, replace(recipe.evaluation, base_size=config.base_size), limit_steps)


def describe(plan: Plan) -> dict[str, str]:
    """Every setting of a plan in words, by what it is about."""
    recipe, config, scoring = plan.recipe, plan.config, plan.evaluation
    height, width = config.crop_size or recipe.crop_size
    steps = f"{config.steps} steps" + (" (a smoke run)" if plan.limit_steps is not None else "")
    facts = {
        "data set": f"{recipe.dataset}, {recipe.num_classes} classes",
        "teacher": "none" if plan.method == "none" else f"{recipe.teacher}, {recipe.teacher_source}",
        "student": f"{recipe.student}, its backbone from {recipe.backbone_source}",
        "method": plan.method,
        "schedule": f"{steps}, rate {config.learning_rate_at(0):g} falling to {config.final_learning_rate:g}, "
        f"poly {config.poly_power:g}",
        "optimiser": f"{config.optimizer}, weight decay {config.weight_decay:g}, aux loss x {config.aux_weight:g}",
        "batch": f"{config.batch_size} crops of {height}x{width}, in {config.accumulate} part(s), {config.precision}",
        "augmentation": f"fitted into {_size(config.base_size)}, scaled {config.scale[0]:g} to {config.scale[1]:g}, "
        f"crops of which no class fills more than {config.max_class_share:.0%}, mirrored, colours",
        "evaluation": _evaluation(scoring),
        "paper": ", ".join(f"{name} {score.miou:.2f} / {score.macc:.2f}" for name, score in recipe.paper.items()),
    }
    return facts | {f"note {i}": note for i, note in enumerate(recipe.notes, 1)}


def _evaluation(scoring: Protocol) -> str:
    how = "whole images"
    if scoring.crop_size is not None:
        how = f"windows of {scoring.crop_size[0]}x{scoring.crop_size[1]}, stride {scoring.stride}"
    return f"{how}, fitted into {_size(scoring.base_size)}, one scale, not mirrored, labels at their own size"


def _size(size: tuple[int, int] | None) -> str:
    return "nothing" if size is None else f"{size[0]}x{size[1]} (longer x shorter side)"
