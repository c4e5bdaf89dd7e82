"""A small Vim and a DeiT of equal size on scikit-learn's handwritten digits, under one recipe."""

from visionmamba.data import Augmentation, Digits, Preprocessing
from visionmamba.models import DeiTConfig, VimConfig
from visionmamba.recipes.recipe import Recipe
from visionmamba.training import OptimizerConfig

_PREPROCESSING = Preprocessing(
    image_size=8,
    crop_fraction=1.0,
    interpolation="bilinear",
    mean=(0.305,),
    std=(0.376,),
    channels="L",
)
_AUGMENTATION = Augmentation(rotation_degrees=7, translation=0.07, zoom=0.07)
_OPTIMIZER = OptimizerConfig(lr=2e-3, warmup_epochs=5, weight_decay=0.05)
_EPOCHS = 50
_BATCH_SIZE = 32


def digits_vim() -> Recipe:
    """A Vim of 0.2 M parameters on the handwritten digits, 8x8 px, 16 tokens.

    Run:    visionmamba train digits_vim --out runs/digits_vim
    Here:   356 of 360 test digits (98.9 %) after the last epoch, seed 0; 152 seconds of one core
            of an x86-64 with AVX-512, one thread.
    """
    return Recipe(
        name="digits_vim",
        data=Digits(),
        model=VimConfig(
            image_size=8, patch_size=2, in_channels=1, num_classes=10, d_model=72, depth=4
        ),
        preprocessing=_PREPROCESSING,
        augmentation=_AUGMENTATION,
        optimizer=_OPTIMIZER,
        epochs=_EPOCHS,
        batch_size=_BATCH_SIZE,
    )


def digits_deit() -> Recipe:
    """A DeiT with as many parameters as `digits_vim`, trained in the same way.

    Run:    visionmamba train digits_deit --out runs/digits_deit
    Here:   350 of 360 test digits (97.2 %) after the last epoch with seed 0, 355 (98.6 %) with
            seed 1; 108 seconds of one core of an x86-64 with AVX-512, one thread.
    """
    return Recipe(
        name="digits_deit",
        data=Digits(),
        model=DeiTConfig(
            image_size=8,
            patch_size=2,
            in_channels=1,
            num_classes=10,
            d_model=64,
            depth=4,
            num_heads=4,
        ),
        preprocessing=_PREPROCESSING,
        augmentation=_AUGMENTATION,
        optimizer=_OPTIMIZER,
        epochs=_EPOCHS,
        batch_size=_BATCH_SIZE,
    )
