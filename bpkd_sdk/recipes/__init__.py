"""The paper's table: its rows as data, and functions that reproduce its scores."""

from bpkd_sdk.recipes.estimate import Estimate, estimate
from bpkd_sdk.recipes.plan import Plan, describe_plan, make_plan
from bpkd_sdk.recipes.reproduction import Reproduction, reproduce, score_checkpoint
from bpkd_sdk.recipes.table import RECIPES, Recipe, Score, find_recipe

__all__ = [
    "RECIPES",
    "Estimate",
    "Plan",
    "Recipe",
    "Reproduction",
    "Score",
    "describe_plan",
    "estimate",
    "find_recipe",
    "make_plan",
    "reproduce",
    "score_checkpoint",
]
