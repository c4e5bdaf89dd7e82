"""Recipes: functions that return a frozen Recipe; the only place with hyper-parameters of runs."""

from collections.abc import Callable

from visionmamba.recipes.ade20k import (
    deit_small_upernet_ade20k,
    deit_tiny_upernet_ade20k,
    vim_small_upernet_ade20k,
    vim_tiny_upernet_ade20k,
)
from visionmamba.recipes.camvid import deit_camvid, vim_camvid
from visionmamba.recipes.coco import deit_tiny_cascade_coco, vim_tiny_cascade_coco
from visionmamba.recipes.dense import DenseRecipe
from visionmamba.recipes.detection import DetectionRecipe
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
from visionmamba.recipes.nuclei import deit_nuclei, vim_nuclei
from visionmamba.recipes.objects import vim_large_objects, vim_objects
from visionmamba.recipes.recipe import Recipe, TaskRecipe
from visionmamba.recipes.scratch import deit_tiny_folder, vim_tiny_folder
from visionmamba.recipes.segmentation import SegmentationRecipe
from visionmamba.recipes.shapes import vim_shapes
from visionmamba.recipes.small_sets import (
    deit_tiny_cifar10,
    deit_tiny_imagenette,
    vim_tiny_cifar10,
    vim_tiny_imagenette,
)

MakeRecipe = (
    Callable[..., Recipe] | Callable[..., SegmentationRecipe] | Callable[..., DetectionRecipe]
)
"""A function whose every argument has a default, and which says what a run is."""

RECIPES: dict[str, MakeRecipe] = {
    make.__name__: make
    for make in (
        finetune,
        folder_vim,
        folder_deit,
        vim_tiny_folder,
        deit_tiny_folder,
        digits_vim,
        digits_deit,
        vim_tiny_cifar10,
        deit_tiny_cifar10,
        vim_tiny_imagenette,
        deit_tiny_imagenette,
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
        vim_objects,
        vim_large_objects,
        vim_nuclei,
        deit_nuclei,
        vim_tiny_cascade_coco,
        deit_tiny_cascade_coco,
    )
}
"""The recipes that `visionmamba train` knows, by name; every argument has a default."""

__all__ = [
    "RECIPES",
    "DenseRecipe",
    "DetectionRecipe",
    "MakeRecipe",
    "Recipe",
    "SegmentationRecipe",
    "TaskRecipe",
    "deit_camvid",
    "deit_nuclei",
    "deit_small_imagenet",
    "deit_small_upernet_ade20k",
    "deit_tiny_cascade_coco",
    "deit_tiny_cifar10",
    "deit_tiny_folder",
    "deit_tiny_imagenet",
    "deit_tiny_imagenette",
    "deit_tiny_upernet_ade20k",
    "digits_deit",
    "digits_vim",
    "finetune",
    "folder_deit",
    "folder_vim",
    "vim_base_imagenet",
    "vim_base_long_imagenet",
    "vim_camvid",
    "vim_large_objects",
    "vim_nuclei",
    "vim_objects",
    "vim_shapes",
    "vim_small_imagenet",
    "vim_small_long_imagenet",
    "vim_small_upernet_ade20k",
    "vim_tiny_cascade_coco",
    "vim_tiny_cifar10",
    "vim_tiny_folder",
    "vim_tiny_imagenet",
    "vim_tiny_imagenette",
    "vim_tiny_long_imagenet",
    "vim_tiny_upernet_ade20k",
]
