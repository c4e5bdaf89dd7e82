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
_AUGMENTATION = Augmentation(rotation_degrees=10, translation=0.1, zoom=0.1)
_OPTIMIZER = OptimizerConfig(lr=2e-3, warmup_epochs=5, weight_decay=0.05)
_EPOCHS = 50
_BATCH_SIZE = 32


def digits_vim() -> Recipe:
    """A Vim of 0.2 M parameters on the handwritten digits, 8x8 px, 16 tokens.

    Run:    visionmamba train digits_vim --out runs/digits_vim
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
