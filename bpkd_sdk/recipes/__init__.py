"""The paper's table: its rows as data, and what reproduces a figure of it."""

from bpkd_sdk.recipes.estimate import Estimate, estimate
from bpkd_sdk.recipes.reproduction import Plan, Reproduction, describe, make_plan, reproduce, score_checkpoint
from bpkd_sdk.recipes.table import RECIPES, Recipe, Score, find_recipe

__all__ = [
    "RECIPES",
    "Estimate",
    "Plan",
    "Recipe",
    "Reproduction",
    "Score",
    "describe",
    "estimate",
    "find_recipe",
    "make_plan",
    "reproduce",
    "score_checkpoint",
]
