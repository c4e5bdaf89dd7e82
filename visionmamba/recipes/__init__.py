"""Recipes: functions that return a frozen Recipe; the only place with hyper-parameters of runs."""

from collections.abc import Callable

from visionmamba.recipes.digits import digits_deit, digits_vim
from visionmamba.recipes.folder import folder_deit, folder_vim
from visionmamba.recipes.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits_vim": digits_vim,
    "digits_deit": digits_deit,
    "folder_vim": folder_vim,
    "folder_deit": folder_deit,
}
"""The recipes that `visionmamba train` knows, by name."""

__all__ = ["RECIPES", "Recipe", "digits_deit", "digits_vim", "folder_deit", "folder_vim"]
