"""The methods of distillation, one module each, behind the protocol of `base`.

| `type:`        | teacher does                          | student learns                            |
|----------------|---------------------------------------|-------------------------------------------|
| `context`      | answers with a (long) context in view | to answer without it                      |
| `self_critique` | drafts, criticises, revises           | to give the accepted revision directly     |
| `step_by_step` | gives a rationale and a label         | the label, and the rationale as a 2nd task |

Helpers: `template` renders queries from columns, `answers` checks a sample, `parse` cuts the result out of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill_ray import plugins
from distill_ray.config import RecipeConfig
from distill_ray.recipes.base import Answerer, Engines, Recipe
from distill_ray.recipes.context import ContextRecipe
from distill_ray.recipes.self_critique import SelfCritiqueRecipe
from distill_ray.recipes.step_by_step import StepByStepRecipe

RECIPES: dict[str, Callable[[Any], Recipe]] = {
    "context": ContextRecipe,
    "self_critique": SelfCritiqueRecipe,
    "step_by_step": StepByStepRecipe,
}


def make_recipe(config: RecipeConfig) -> Recipe:
    """Build the recipe that `recipe.type` names, here or in another package (`distill_ray.plugins`).

    Raises:
        ConfigError: what the config names (a template, a file) cannot be used.
    """
    if config.type in RECIPES:
        return RECIPES[config.type](config)
    return plugins.make(plugins.Group.RECIPES, config, Recipe)


__all__ = [
    "RECIPES",
    "Answerer",
    "ContextRecipe",
    "Engines",
    "Recipe",
    "SelfCritiqueRecipe",
    "StepByStepRecipe",
    "make_recipe",
]
