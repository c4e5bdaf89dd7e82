"""Vim-Ti and DeiT-Ti from scratch on a folder of pictures, under one short plain recipe."""

from pathlib import Path

from visionmamba.data import Augmentation, ImageFolder, Preprocessing
from visionmamba.models import DeiTConfig, VimConfig
from visionmamba.recipes.recipe import Recipe
from visionmamba.training import OptimizerConfig

_IMAGE_SIZE = 160


def vim_tiny_folder(root: Path | str = "data") -> Recipe:
    """Vim-Ti at 160 px on `root/{train,val}/CLASS/*`, 100 tokens, drawn weights.

    What a segmenter's backbone learns first when no weights are at hand: some thousand pictures,
    minutes of a GPU. Mixup, CutMix and RandAugment are left out, as they need long runs.

    Source: ours.
    Run:    visionmamba train vim_tiny_folder --data.root PICTURES --out runs/vim_tiny
    Here:   not run to its end.
    """
    return _from_scratch(
        "vim_tiny_folder", VimConfig.tiny(image_size=_IMAGE_SIZE, drop_path=0.05), root
    )


def deit_tiny_folder(root: Path | str = "data") -> Recipe:
    """DeiT-Ti at 160 px, trained in the same way.

    Source: ours.
    Run:    visionmamba train deit_tiny_folder --data.root PICTURES --out runs/deit_tiny
    Here:   not run to its end.
    """
    return _from_scratch(
        "deit_tiny_folder", DeiTConfig.tiny(image_size=_IMAGE_SIZE, drop_path=0.05), root
    )


def _from_scratch(name: str, model: VimConfig | DeiTConfig, root: Path | str) -> Recipe:
    return Recipe(
        name=name,
        data=ImageFolder(root=Path(root)),
        model=model,
        preprocessing=Preprocessing(image_size=_IMAGE_SIZE),
        augmentation=Augmentation(min_crop_area=0.25, horizontal_flip=True),
        optimizer=OptimizerConfig(lr=1e-3, warmup_epochs=3, weight_decay=0.05),
        epochs=30,
        batch_size=256,
        precision="bfloat16",
    )
