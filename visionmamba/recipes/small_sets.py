"""Vim-Ti and DeiT-Ti from scratch on CIFAR-10 and Imagenette: DeiT's training, scaled down.

For comparing backbones without ImageNet: minutes of one GPU a run. Everything but the model is
equal, and there is no drop path: such small sets are underfitted as it is. Pictures are read from
folders, `root/{train,val}/CLASS/*`, and stay on the device.
"""

from pathlib import Path

from visionmamba.data import Augmentation, ImageFolder, Mixing, Preprocessing
from visionmamba.models import DeiTConfig, VimConfig
from visionmamba.recipes.recipe import Recipe
from visionmamba.training import OptimizerConfig

_MIXING = Mixing(mixup=0.8, cutmix=1.0)


def vim_tiny_cifar10(root: Path | str = "cifar10") -> Recipe:
    """Vim-Ti on CIFAR-10 at 32 px in patches of 4, 64 tokens, 130 epochs.

    Source: ours.
    Run:    visionmamba train vim_tiny_cifar10 --data.root CIFAR10 --out runs/vim_tiny_cifar10
    Here:   not run.
    """
    return _cifar10(
        "vim_tiny_cifar10",
        VimConfig.tiny(image_size=32, patch_size=4),
        root,
    )


def deit_tiny_cifar10(root: Path | str = "cifar10") -> Recipe:
    """DeiT-Ti on CIFAR-10, trained in the same way.

    Source: ours.
    Run:    visionmamba train deit_tiny_cifar10 --data.root CIFAR10 --out runs/deit_tiny_cifar10
    Here:   not run.
    """
    return _cifar10(
        "deit_tiny_cifar10",
        DeiTConfig.tiny(image_size=32, patch_size=4),
        root,
    )


def vim_tiny_imagenette(root: Path | str = "imagenette") -> Recipe:
    """Vim-Ti on Imagenette at 160 px, 100 tokens, 200 epochs.

    Source: ours.
    Run:    visionmamba train vim_tiny_imagenette --data.root IMAGENETTE --out runs/vim_imagenette
    Here:   not run.
    """
    return _imagenette("vim_tiny_imagenette", VimConfig.tiny(image_size=160), root)


def deit_tiny_imagenette(root: Path | str = "imagenette") -> Recipe:
    """DeiT-Ti on Imagenette, trained in the same way.

    Source: ours.
    Run:    visionmamba train deit_tiny_imagenette --data.root IMAGENETTE --out runs/deit_imagenette
    Here:   not run.
    """
    return _imagenette("deit_tiny_imagenette", DeiTConfig.tiny(image_size=160), root)


def _cifar10(name: str, model: VimConfig | DeiTConfig, root: Path | str) -> Recipe:
    return _recipe(name, model, root, min_crop_area=0.4, epochs=130, batch_size=512)


def _imagenette(name: str, model: VimConfig | DeiTConfig, root: Path | str) -> Recipe:
    return _recipe(name, model, root, min_crop_area=0.25, epochs=200, batch_size=256)


def _recipe(
    name: str,
    model: VimConfig | DeiTConfig,
    root: Path | str,
    *,
    min_crop_area: float,
    epochs: int,
    batch_size: int,
) -> Recipe:
    return Recipe(
        name=name,
        data=ImageFolder(root=Path(root)),
        model=model,
        preprocessing=Preprocessing(image_size=model.image_size, crop_fraction=1.0),
        augmentation=Augmentation(
            min_crop_area=min_crop_area,
            horizontal_flip=True,
            color_jitter=0.3,
            erase_probability=0.25,
        ),
        mixing=_MIXING,
        optimizer=OptimizerConfig(lr=1e-3, warmup_epochs=5, weight_decay=0.05),
        epochs=epochs,
        batch_size=batch_size,
        precision="bfloat16",
        resident=True,
    )
