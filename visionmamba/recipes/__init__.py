"""Recipes: functions that return a frozen Recipe; the only place with hyper-parameters of runs."""

from collections.abc import Callable

from visionmamba.recipes.ade20k import (
    deit_small_upernet_ade20k,
    deit_tiny_upernet_ade20k,
    vim_small_upernet_ade20k,
    vim_tiny_upernet_ade20k,
)
from visionmamba.recipes.camvid import deit_camvid, vim_camvid
from visionmamba.recipes.digits import digits_deit, digits_vim
from visionmamba.recipes.finetuning import finetune
from visionmamba.recipes.folder import folder_deit, folder_vim
from visionmamba.recipes.imagenet import (
    deit_small_imagenet,
    deit_tiny_imagenet,
    vim_base_imagenet,
    vim_base_long_imagenet,
    vim_small_imagenet,
    vim_small_long_imagenet,
    vim_tiny_imagenet,
    vim_tiny_long_imagenet,
)
from visionmamba.recipes.recipe import Recipe, TaskRecipe
from visionmamba.recipes.scratch import deit_tiny_folder, vim_tiny_folder
from visionmamba.recipes.segmentation import SegmentationRecipe
from visionmamba.recipes.shapes import vim_shapes

RECIPES: dict[str, Callable[..., Recipe] | Callable[..., SegmentationRecipe]] = {
    make.__name__: make
    for make in (
        finetune,
        folder_vim,
        folder_deit,
        vim_tiny_folder,
        deit_tiny_folder,
        digits_vim,
        digits_deit,
        vim_tiny_imagenet,
        vim_small_imagenet,
        vim_base_imagenet,
        vim_tiny_long_imagenet,
        vim_small_long_imagenet,
        vim_base_long_imagenet,
        deit_tiny_imagenet,
        deit_small_imagenet,
        vim_shapes,
        vim_camvid,
        deit_camvid,
        vim_tiny_upernet_ade20k,
        vim_small_upernet_ade20k,
        deit_tiny_upernet_ade20k,
        deit_small_upernet_ade20k,
    )
}
"""The recipes that `visionmamba train` knows, by name; every argument has a default."""

__all__ = [
    "RECIPES",
    "Recipe",
    "SegmentationRecipe",
    "TaskRecipe",
    "deit_camvid",
    "deit_small_imagenet",
    "deit_small_upernet_ade20k",
    "deit_tiny_folder",
    "deit_tiny_imagenet",
    "deit_tiny_upernet_ade20k",
    "digits_deit",
    "digits_vim",
    "finetune",
    "folder_deit",
    "folder_vim",
    "vim_base_imagenet",
    "vim_base_long_imagenet",
    "vim_camvid",
    "vim_shapes",
    "vim_small_imagenet",
    "vim_small_long_imagenet",
    "vim_small_upernet_ade20k",
    "vim_tiny_folder",
    "vim_tiny_imagenet",
    "vim_tiny_long_imagenet",
    "vim_tiny_upernet_ade20k",
]
