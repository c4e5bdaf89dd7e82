"""Cascade Mask R-CNN on COCO as published: Vim-Ti without windows, and DeiT-Ti as its baseline.

Where the paper (arXiv 2401.09417, section 4.3) and the authors' script (det/ of hustvl/Vim,
dd0358a, a fork of detectron2) differ, `variant` chooses. Neither is known to be the one behind the
paper's table.

|                  | script                      | paper           |
|------------------|-----------------------------|-----------------|
| steps            | 184,375                     | 380,000         |
| learning rate    | 1e-4; x0.1 at 8/9 and 26/27 | 1e-4, linear    |
| layer decay      | 0.837                       | not said: none  |
| rotary embedding | input and residual stream   | not said: none  |

All: AdamW, weight decay 0.1, 64 pictures in a step, 250 steps of warm-up from a thousandth of the
rate, pictures of 1024 px cut from one scaled by 0.1 to 2 and mirrored half of the time, the simple
feature pyramid of ViTDet (arXiv 2203.16527), no class token in Vim. A_log is decayed and the
position embedding is not, as in the script; biases and norms, of which the script decays Vim's, are
not. The script computes in float16 with a scaled loss; here it is bfloat16, which needs none.
The data are looked for in ./coco; --data.root says where else.
"""

from pathlib import Path
from typing import Literal

from visionmamba.data import Coco, DetectionAugmentation, DetectionPreprocessing
from visionmamba.models import DeiTConfig, DetectorConfig, VimConfig
from visionmamba.recipes.detection import DetectionRecipe
from visionmamba.training import OptimizerConfig

Variant = Literal["script", "paper"]

_NUM_CLASSES = 80
_IMAGE_SIZE = 1024
_DROP_PATH = 0.1
_SCRIPT_STEPS = 184_375
_SCRIPT_DROPS = (163_889, 177_546)
_EPOCHS = {"script": 59, "paper": 76}  # so that each has a whole number of steps
_EPOCH_STEPS = {"script": 3125, "paper": 5000}
_WINDOW_SIZE = 14


def vim_tiny_cascade_coco(
    variant: Variant = "script", weights: str | None = "vim_tiny_patch16_224"
) -> DetectionRecipe:
    r"""Cascade Mask R-CNN on Vim-Ti, COCO 2017 at 1024 px, 4,096 tokens without windows.

    Source: arXiv 2401.09417, section 4.3 and table 3; the authors' script of Vim-Ti in det/.
    Run:    torchrun --nproc-per-node 4 -m visionmamba train vim_tiny_cascade_coco \
            --data.root coco --out runs/vim_tiny_coco
    Cost:   the authors: 4 GPUs (script), time not stated. Here: not run.
    Paper:  box AP 45.7 (AP50 63.9, AP75 49.6, small 26.1, medium 49.0, large 63.2),
            mask AP 39.2 (60.9, 41.7, 18.2, 41.8, 60.2).
    Here:   not run.

    Args:
        variant: what to follow where the paper and the script differ.
        weights: classification weights for the backbone; None begins with drawn ones.
    """
    return _cascade(
        "vim_tiny_cascade_coco",
        DetectorConfig(
            backbone=VimConfig.tiny(
                image_size=_IMAGE_SIZE,
                readout="mean",
                drop_path=_DROP_PATH,
                rope="tokens+residual" if variant == "script" else "none",
            ),
            num_classes=_NUM_CLASSES,
        ),
        variant=variant,
        layer_decay=0.837,
        weights=weights,
    )


def deit_tiny_cascade_coco(
    variant: Variant = "script", weights: str | None = "timm/deit_tiny_patch16_224.fb_in1k"
) -> DetectionRecipe:
    r"""Cascade Mask R-CNN on DeiT-Ti with ViTDet's windows, trained as `vim_tiny_cascade_coco`.

    Windows of 14 x 14 patches and four blocks that see the whole picture, as in ViTDet, whose
    relative positions are left out. --model.window-size None gives all blocks global attention.

    Source: arXiv 2401.09417, table 3; no script for DeiT: that of Vim-Ti, and the layer decay of
            ViTDet, 0.7 for 12 blocks, which 0.837 is for 24.
    Run:    torchrun --nproc-per-node 4 -m visionmamba train deit_tiny_cascade_coco \
            --data.root coco --out runs/deit_tiny_coco
    Cost:   not run.
    Paper:  box AP 44.4 (AP50 63.0, AP75 47.8, small 26.1, medium 47.4, large 61.8),
            mask AP 38.1 (59.9, 40.5, 18.1, 40.5, 58.4).
    Here:   not run.

    Args:
        variant: what to follow where the paper and the script differ.
        weights: classification weights for the backbone: those that the authors of DeiT published,
            in timm's repository on the Hub; None begins with drawn ones.
    """
    return _cascade(
        "deit_tiny_cascade_coco",
        DetectorConfig(
            backbone=DeiTConfig.tiny(image_size=_IMAGE_SIZE, drop_path=_DROP_PATH),
            num_classes=_NUM_CLASSES,
            window_size=_WINDOW_SIZE,
        ),
        variant=variant,
        layer_decay=0.7,
        weights=weights,
    )


def _optimizer(variant: Variant, layer_decay: float) -> OptimizerConfig:
    is_script = variant == "script"
    return OptimizerConfig(
        lr=1e-4,
        schedule="drops" if is_script else "linear",
        drops_at=tuple(step / _SCRIPT_STEPS for step in _SCRIPT_DROPS) if is_script else (),
        warmup_steps=250,
        warmup_lr=1e-7,
        min_lr=0.0,
        weight_decay=0.1,
        decay_a_log=True,
        layer_decay=layer_decay if is_script else None,
        clip_norm=None,
    )


def _cascade(
    name: str,
    model: DetectorConfig,
    *,
    variant: Variant,
    layer_decay: float,
    weights: str | None,
) -> DetectionRecipe:
    return DetectionRecipe(
        name=name,
        data=Coco(root=Path("coco")),
        model=model,
        weights=weights,
        preprocessing=DetectionPreprocessing(image_size=_IMAGE_SIZE),
        augmentation=DetectionAugmentation(),
        optimizer=_optimizer(variant, layer_decay),
        epochs=_EPOCHS[variant],
        epoch_steps=_EPOCH_STEPS[variant],
        batch_size=64,
        precision="bfloat16",
        log_every_steps=50,
    )
