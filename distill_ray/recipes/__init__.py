"""The methods of distillation, one module each, behind the protocol of `base`.

| `type:`   | module    | teacher does                          | student learns       |
|-----------|-----------|---------------------------------------|----------------------|
| `context` | `context` | answers with a (long) context in view | to answer without it |

Helpers: `template` renders queries from columns, `parse` cuts the result out of an answer.
"""

from __future__ import annotations

from collections.abc import Callable

from distill_ray.config import RecipeConfig
from distill_ray.recipes.base import Answerer, Engines, Recipe
from distill_ray.recipes.context import ContextRecipe

RECIPES: dict[str, Callable[[RecipeConfig], Recipe]] = {"context": ContextRecipe}


def make_recipe(config: RecipeConfig) -> Recipe:
    """Build the recipe that `recipe.type` names.

    Raises:
        ConfigError: what the config names (a template, a file) cannot be used.
    """
    return RECIPES[config.type](config)


__all__ = ["RECIPES", "Answerer", "ContextRecipe", "Engines", "Recipe", "make_recipe"]
