"""UperNet on ADE20K as published: Vim in two sizes, and DeiT as its baseline.

Where the paper (arXiv 2401.09417, section 4.2) and the authors' scripts (seg/ of hustvl/Vim,
dd0358a) differ, `variant` chooses. Neither is known to be the one behind the paper's table.

|                       | Ti script | S script                  | paper        |
|-----------------------|-----------|---------------------------|--------------|
| pictures in a step    | 4 x 8     | 4 x 8                     | 16           |
| steps                 | 60,000    | 60,000                    | 160,000      |
| learning rate         | 2e-4      | 1e-4                      | 6e-5         |
| weight decay          | 0.1       | 0.05                      | 0.01         |
| layer decay           | 0.92      | 0.95                      | not said     |
| what the head reads   | mixer     | residual                  | not said     |
| rotary embedding      | no        | input and residual stream | not said     |

All: AdamW, 1500 steps of warm-up from a millionth of the rate, a straight line down to 0, pictures
of 512 px cut from one scaled by 0.5 to 2, float32. Vim is without class token; DeiT keeps that of
timm, which no head reads. "script" follows what the scripts ask for and decays A_log and the
position embedding, as their code does; its layer decay, however, misses the blocks:
--optimizer.layer-decay-reach embeddings repeats that.
The data are looked for in ./ADEChallengeData2016; --data.root says where else.
"""

from pathlib import Path
from typing import Literal

from visionmamba.data import ADE20K, SegmentationAugmentation, SegmentationPreprocessing
from visionmamba.models import DeiTConfig, SegmenterConfig, VimConfig
from visionmamba.models.config import FeatureKind
from visionmamba.recipes.segmentation import SegmentationRecipe
from visionmamba.tasks import Inference
from visionmamba.training import OptimizerConfig

Variant = Literal["script", "paper"]

_NUM_CLASSES = 150
_IMAGE_SIZE = 512
_DROP_PATH = 0.1  # the default of the authors' class, which their configurations do not set
_VALIDATION_STEPS = 1000


def vim_tiny_upernet_ade20k(
    variant: Variant = "script", weights: str | None = "vim_tiny_patch16_224"
) -> SegmentationRecipe:
    r"""UperNet on Vim-Ti, ADE20K at 512 px.

    Source: arXiv 2401.09417, section 4.2 and table 2; the authors' script of Vim-Ti in seg/.
    Run:    torchrun --nproc-per-node 4 -m visionmamba train vim_tiny_upernet_ade20k \
            --data.root ADEChallengeData2016 --out runs/vim_tiny_ade20k
    Cost:   the authors: 4 GPUs (script), time not stated. Here: not run.
    Paper:  41.0 mIoU, 13 M parameters.
    Here:   not run.

    Args:
        variant: what to follow where the paper and the script differ.
        weights: classification weights for the backbone; None begins with drawn ones.
    """
    return _upernet(
        "vim_tiny_upernet_ade20k",
        VimConfig.tiny(image_size=_IMAGE_SIZE, readout="mean", drop_path=_DROP_PATH),
        features="mixer" if variant == "script" else "residual",
        variant=variant,
        weights=weights,
    )


def vim_small_upernet_ade20k(
    variant: Variant = "script", weights: str | None = "vim_small_patch16_224"
) -> SegmentationRecipe:
    r"""UperNet on Vim-S, ADE20K at 512 px.

    The script turns positions by a rotary embedding, as the authors' models of January 2024 did and
    the published weights of March do not; variant="paper" has none.

    Source: arXiv 2401.09417, section 4.2 and table 2; the authors' script of Vim-S in seg/.
    Run:    torchrun --nproc-per-node 4 -m visionmamba train vim_small_upernet_ade20k \
            --data.root ADEChallengeData2016 --out runs/vim_small_ade20k
    Cost:   the authors: 4 GPUs (script), time not stated. Here: not run.
    Paper:  44.9 mIoU, 46 M parameters.
    Here:   not run.

    Args:
        variant: what to follow where the paper and the script differ.
        weights: classification weights for the backbone; None begins with drawn ones.
    """
    return _upernet(
        "vim_small_upernet_ade20k",
        VimConfig.small(
            image_size=_IMAGE_SIZE,
            readout="mean",
            drop_path=_DROP_PATH,
            rope="tokens+residual" if variant == "script" else "none",
        ),
        variant=variant,
        weights=weights,
    )


def deit_tiny_upernet_ade20k(
    variant: Variant = "script", weights: str | None = "timm/deit_tiny_patch16_224.fb_in1k"
) -> SegmentationRecipe:
    r"""UperNet on DeiT-Ti, trained as `vim_tiny_upernet_ade20k`: its baseline.

    Source: arXiv 2401.09417, table 2; no script for DeiT: that of Vim-Ti.
    Run:    torchrun --nproc-per-node 4 -m visionmamba train deit_tiny_upernet_ade20k \
            --data.root ADEChallengeData2016 --out runs/deit_tiny_ade20k
    Cost:   not run.
    Paper:  39.2 mIoU, 11 M parameters.
    Here:   not run.

    Args:
        variant: what to follow where the paper and the script differ.
        weights: classification weights for the backbone: those that the authors of DeiT published,
            in timm's repository on the Hub; None begins with drawn ones.
    """
    return _upernet(
        "deit_tiny_upernet_ade20k",
        DeiTConfig.tiny(image_size=_IMAGE_SIZE, drop_path=_DROP_PATH),
        variant=variant,
        weights=weights,
    )


def deit_small_upernet_ade20k(
    variant: Variant = "script", weights: str | None = "timm/deit_small_patch16_224.fb_in1k"
) -> SegmentationRecipe:
    r"""UperNet on DeiT-S, trained as `vim_small_upernet_ade20k`: its baseline.

    Source: arXiv 2401.09417, table 2; no script for DeiT: that of Vim-S.
    Run:    torchrun --nproc-per-node 4 -m visionmamba train deit_small_upernet_ade20k \
            --data.root ADEChallengeData2016 --out runs/deit_small_ade20k
    Cost:   not run.
    Paper:  44.0 mIoU, 43 M parameters.
    Here:   not run.

    Args:
        variant: what to follow where the paper and the script differ.
        weights: classification weights for the backbone: those that the authors of DeiT published,
            in timm's repository on the Hub; None begins with drawn ones.
    """
    return _upernet(
        "deit_small_upernet_ade20k",
        DeiTConfig.small(image_size=_IMAGE_SIZE, drop_path=_DROP_PATH),
        variant=variant,
        weights=weights,
    )


def _optimizer(variant: Variant, *, is_small: bool) -> OptimizerConfig:
    lr, weight_decay, layer_decay = 6e-5, 0.01, None
    if variant == "script":
        lr, weight_decay, layer_decay = (1e-4, 0.05, 0.95) if is_small else (2e-4, 0.1, 0.92)
    return OptimizerConfig(
        lr=lr,
        schedule="linear",
        warmup_steps=1500,
        warmup_lr=lr * 1e-6,
        min_lr=0.0,
        weight_decay=weight_decay,
        decay_a_log=True,
        decay_embeddings=True,
        layer_decay=layer_decay,
        clip_norm=None,
    )


def _upernet(
    name: str,
    backbone: VimConfig | DeiTConfig,
    *,
    variant: Variant,
    weights: str | None,
    features: FeatureKind = "residual",
) -> SegmentationRecipe:
    num_steps = 60_000 if variant == "script" else 160_000
    return SegmentationRecipe(
        name=name,
        data=ADE20K(root=Path("ADEChallengeData2016")),
        model=SegmenterConfig(backbone=backbone, num_classes=_NUM_CLASSES, features=features),
        weights=weights,
        preprocessing=SegmentationPreprocessing(
            crop_size=_IMAGE_SIZE, short_side=_IMAGE_SIZE, max_long_side=2048
        ),
        augmentation=SegmentationAugmentation(),
        optimizer=_optimizer(variant, is_small="small" in name),
        epochs=num_steps // _VALIDATION_STEPS,
        epoch_steps=_VALIDATION_STEPS,
        batch_size=32 if variant == "script" else 16,
        inference=Inference(mode="slide", crop_size=_IMAGE_SIZE, stride=341),
        log_every_steps=50,
    )
