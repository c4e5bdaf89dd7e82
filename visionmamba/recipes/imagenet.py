"""Training on ImageNet-1k as published: Vim in three sizes, their long fine-tunes, and DeiT.

Where the paper (arXiv 2401.09417) and the authors' scripts (vim/scripts of hustvl/Vim, dd0358a)
differ, `variant` chooses. Neither is known to be the one behind the paper's table.

|                    | pt-vim-t.sh | pt-vim-s.sh | paper        |
|--------------------|-------------|-------------|--------------|
| images in a step   | 8 x 128     | 8 x 64      | 1024         |
| weight decay       | 0.1         | 0.05        | 0.05         |
| drop path          | 0           | 0.05        | not said     |

Learning rates are those of a whole step, scaled by nobody: 1e-3 in all of these. For another
batch_size scale optimizer.lr with it, as the authors' code does (warm-up and end stay).
The data are looked for in ./imagenet/{train,val}/n01440764/*.JPEG; --data.root says where else.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from visionmamba.data import Augmentation, ImageFolder, Mixing, Preprocessing
from visionmamba.models import DeiTConfig, VimConfig
from visionmamba.recipes.recipe import Recipe
from visionmamba.training import OptimizerConfig

Variant = Literal["script", "paper"]

_IMAGENET = ImageFolder(root=Path("imagenet"))
_PREPROCESSING = Preprocessing(image_size=224)  # shorter side to 256 px, the middle 224, bicubic
_AUGMENTATION = Augmentation(
    min_crop_area=0.08,
    horizontal_flip=True,
    auto_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.3,  # without effect beside RandAugment, as in the authors' code
    erase_probability=0.25,
    repeats=3,
)
_MIXING = Mixing(mixup=0.8, cutmix=1.0, probability=1.0, switch_probability=0.5)
_EMA_DECAY = 0.99996


def vim_tiny_imagenet(variant: Variant = "script") -> Recipe:
    """Vim-Ti on ImageNet-1k, 224 px, 300 epochs.

    Source: arXiv 2401.09417, section 4.1 and table 1; vim/scripts/pt-vim-t.sh. variant="paper" has
            a weight decay of 0.05 instead of 0.1.
    Run:    torchrun --nproc-per-node 8 -m visionmamba train vim_tiny_imagenet --out runs/vim_tiny
    Cost:   the authors: 8 A800, time not stated. Here: not run.
    Paper:  76.1 top-1 (93.0 top-5 in the authors' README), 7 M parameters.
    Here:   not run on ImageNet; 2,160 steps of 128 on ten of its classes in bfloat16 stayed finite,
            5,470 images/s in training on one H200 (docs/training.md).
    """
    return _from_scratch(
        "vim_tiny_imagenet",
        VimConfig.tiny(),
        batch_size=1024,
        weight_decay=0.1 if variant == "script" else 0.05,
    )


def vim_small_imagenet(variant: Variant = "script") -> Recipe:
    """Vim-S on ImageNet-1k, 224 px, 300 epochs.

    Source: arXiv 2401.09417, section 4.1 and table 1; vim/scripts/pt-vim-s.sh. variant="paper" has
            1024 images in a step instead of 512, at the same learning rate.
    Run:    torchrun --nproc-per-node 8 -m visionmamba train vim_small_imagenet --out runs/vim_small
    Cost:   the authors: 8 A800, time not stated. Here: not run.
    Paper:  80.3 top-1 (80.5, and 95.1 top-5, in the authors' README), 26 M parameters.
    Here:   not run on ImageNet; 2,050 steps of 128 on ten of its classes in bfloat16 stayed finite,
            2,997 images/s in training on one H200 (docs/training.md).
    """
    return _from_scratch(
        "vim_small_imagenet",
        VimConfig.small(drop_path=0.05),
        batch_size=512 if variant == "script" else 1024,
        weight_decay=0.05,
    )


def vim_base_imagenet() -> Recipe:
    """Vim-B on ImageNet-1k, 224 px, 300 epochs; the authors published no script for it.

    Source: arXiv 2401.09417, section 4.1 and table 1: what the paper says of all sizes. The drop
            path of 0.1 is ours, neither the paper's nor the authors'.
    Run:    torchrun --nproc-per-node 8 -m visionmamba train vim_base_imagenet --out runs/vim_base
    Cost:   the authors: 8 A800, time not stated. Here: not run.
    Paper:  81.9 top-1 (95.8 top-5 in the authors' README), 98 M parameters.
    Here:   not run.
    """
    return _from_scratch(
        "vim_base_imagenet", VimConfig.base(drop_path=0.1), batch_size=1024, weight_decay=0.05
    )


def vim_tiny_long_imagenet(weights: str = "vim_tiny_patch16_224") -> Recipe:
    r"""Vim-Ti fine-tuned on a patch every 8 px: 729 patches instead of 196, 30 epochs.

    Source: arXiv 2401.09417, section 4.1 and table 1 (Vim-Ti, long sequences); ft-vim-t.sh. The
            learning rate is 1e-5 throughout: rate, warm-up and end are the same in the script.
    Run:    torchrun --nproc-per-node 8 -m visionmamba train vim_tiny_long_imagenet \
            --weights runs/vim_tiny/best.safetensors --out runs/vim_tiny_long
    Cost:   the authors: 8 GPUs, time not stated. Here: not run.
    Paper:  78.3 top-1 (94.2 top-5 in the authors' README).
    Here:   not run.

    The position embedding is interpolated with the class token's row kept apart. The authors' code
    takes the first patch's row for it; `visionmamba convert WEIGHTS OUT.safetensors --stride 8
    --resize published` makes the weights they began with.

    Args:
        weights: what to begin with: a file of this package, the authors' .pth, a published name.
    """
    return _long("vim_tiny_long_imagenet", VimConfig.tiny(stride=8), weights)


def vim_small_long_imagenet(weights: str = "vim_small_patch16_224") -> Recipe:
    r"""Vim-S fine-tuned on a patch every 8 px, 30 epochs; see `vim_tiny_long_imagenet`.

    Source: arXiv 2401.09417, section 4.1 and table 1; vim/scripts/ft-vim-s.sh.
    Run:    torchrun --nproc-per-node 8 -m visionmamba train vim_small_long_imagenet \
            --weights runs/vim_small/best.safetensors --out runs/vim_small_long
    Cost:   the authors: 8 GPUs, time not stated. Here: not run.
    Paper:  81.4 top-1 (81.6, and 95.4 top-5, in the authors' README).
    Here:   not run.

    Args:
        weights: what to begin with: a file of this package, the authors' .pth, a published name.
    """
    return _long("vim_small_long_imagenet", VimConfig.small(stride=8), weights)


def vim_base_long_imagenet(weights: str = "vim_base_patch16_224") -> Recipe:
    r"""Vim-B fine-tuned on a patch every 8 px, 30 epochs; see `vim_tiny_long_imagenet`.

    Source: arXiv 2401.09417, section 4.1 and table 1. No script: the smaller sizes' values.
    Run:    torchrun --nproc-per-node 8 -m visionmamba train vim_base_long_imagenet \
            --weights runs/vim_base/best.safetensors --out runs/vim_base_long
    Cost:   not known. Here: not run.
    Paper:  83.2 top-1; the authors published no weights.
    Here:   not run.

    Args:
        weights: what to begin with: a file of this package, the authors' .pth, a published name.
    """
    return _long("vim_base_long_imagenet", VimConfig.base(stride=8), weights)


def deit_tiny_imagenet() -> Recipe:
    """DeiT-Ti on ImageNet-1k, 224 px, 300 epochs: the baseline of Vim-Ti.

    Source: arXiv 2012.12877, table 9, and facebookresearch/deit, main.py, whose fork trains Vim:
            the same but for a drop path of 0.1 and a weight decay of 0.05.
    Run:    torchrun --nproc-per-node 8 -m visionmamba train deit_tiny_imagenet --out runs/deit_tiny
    Cost:   not run.
    Paper:  72.2 top-1, 6 M parameters.
    Here:   not run.
    """
    return _from_scratch(
        "deit_tiny_imagenet", DeiTConfig.tiny(drop_path=0.1), batch_size=1024, weight_decay=0.05
    )


def deit_small_imagenet() -> Recipe:
    """DeiT-S on ImageNet-1k, 224 px, 300 epochs: the baseline of Vim-S; see `deit_tiny_imagenet`.

    Source: arXiv 2012.12877, table 9.
    Run:    torchrun --nproc-per-node 8 -m visionmamba train deit_small_imagenet --out runs/deit_s
    Cost:   not run.
    Paper:  79.8 top-1, 22 M parameters.
    Here:   not run.
    """
    return _from_scratch(
        "deit_small_imagenet", DeiTConfig.small(drop_path=0.1), batch_size=1024, weight_decay=0.05
    )


def _from_scratch(
    name: str, model: VimConfig | DeiTConfig, *, batch_size: int, weight_decay: float
) -> Recipe:
    return Recipe(
        name=name,
        data=_IMAGENET,
        model=model,
        preprocessing=_PREPROCESSING,
        augmentation=_AUGMENTATION,
        mixing=_MIXING,
        optimizer=OptimizerConfig(
            lr=1e-3,
            schedule="published",
            warmup_epochs=5,
            warmup_lr=1e-6,
            min_lr=1e-5,
            weight_decay=weight_decay,
            decay_a_log=True,
            clip_norm=None,
        ),
        epochs=300,
        batch_size=batch_size,
        label_smoothing=0.1,
        ema_decay=_EMA_DECAY,
    )


def _long(name: str, model: VimConfig, weights: str) -> Recipe:
    recipe = _from_scratch(name, model, batch_size=1024, weight_decay=1e-8)
    optimizer = replace(recipe.optimizer, lr=1e-5, warmup_lr=1e-5)
    return replace(recipe, weights=weights, optimizer=optimizer, epochs=30)
