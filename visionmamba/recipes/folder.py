"""A small Vim and a DeiT of equal size for your own folder of pictures, under one recipe."""

from pathlib import Path

from visionmamba.data import Augmentation, ImageFolder, Preprocessing
from visionmamba.models import DeiTConfig, VimConfig
from visionmamba.recipes.recipe import Recipe
from visionmamba.training import OptimizerConfig

_PREPROCESSING = Preprocessing(image_size=96, crop_fraction=0.9)
_AUGMENTATION = Augmentation(min_crop_area=0.35, horizontal_flip=True)
_OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_epochs=5, weight_decay=0.05)
_EPOCHS = 50
_BATCH_SIZE = 64


def folder_vim(root: Path | str = "data") -> Recipe:
    """A Vim of 2.3 M parameters at 96 px on `root/{train,val}/CLASS/*`, trained from scratch.

    Run:    visionmamba train folder_vim --data.root PICTURES --out runs/mine
    Here:   not run; made for thousands of pictures, a GPU or patience.
    """
    return Recipe(
        name="folder_vim",
        data=ImageFolder(root=Path(root)),
        model=VimConfig(image_size=96, patch_size=8, d_model=192, depth=8, drop_path=0.05),
        preprocessing=_PREPROCESSING,
        augmentation=_AUGMENTATION,
        optimizer=_OPTIMIZER,
        epochs=_EPOCHS,
        batch_size=_BATCH_SIZE,
    )


def folder_deit(root: Path | str = "data") -> Recipe:
    """A DeiT with as many parameters as `folder_vim`, trained in the same way.

    Run:    visionmamba train folder_deit --data.root PICTURES --out runs/mine
    Here:   not run.
    """
    return Recipe(
        name="folder_deit",
        data=ImageFolder(root=Path(root)),
        model=DeiTConfig(
            image_size=96, patch_size=8, d_model=192, depth=5, num_heads=6, drop_path=0.05
        ),
        preprocessing=_PREPROCESSING,
        augmentation=_AUGMENTATION,
        optimizer=_OPTIMIZER,
        epochs=_EPOCHS,
        batch_size=_BATCH_SIZE,
    )
