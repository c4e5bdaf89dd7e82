"""UperNet on Vim-Ti and on DeiT-Ti for CamVid's street scenes, under one recipe.

CamVid (Brostow et al., 2009) has 701 frames of a drive, here at 480x360 px with 11 classes: 367 to
train, 101 to validate, 233 to test. Any folder laid out as `MaskFolder` says can take its place.
The model reads 384 rows of 480 px: the 360 of a frame and what is padded to a multiple of 32.
"""

from pathlib import Path

from visionmamba.data import MaskFolder, SegmentationAugmentation, SegmentationPreprocessing
from visionmamba.models import DeiTConfig, SegmenterConfig, VimConfig
from visionmamba.recipes.segmentation import SegmentationRecipe
from visionmamba.training import OptimizerConfig

_IMAGE_SIZE = (384, 480)
_NUM_CLASSES = 11
_DROP_PATH = 0.1


def vim_camvid(root: Path | str = "camvid", weights: str | None = None) -> SegmentationRecipe:
    """UperNet on Vim-Ti, `root/{train,val}/{images,masks}`, street scenes of 480x360 px.

    Source: ours.
    Run:    visionmamba train vim_camvid --data.root camvid --out runs/vim_camvid
    Cost:   not run to its end; 900 steps took 2.5 minutes of one H200 that trained up to five
            others beside.
    Paper:  none.
    Here:   its 8,000 steps not run. 900 steps at 2e-3 in bfloat16, warm-up of 45 steps and no
            moving average, otherwise this recipe from drawn weights: 42.0 ± 1.0 test mIoU,
            54.5 ± 1.7 on the validation split, three seeds (docs/reproduction.md). The same from
            weights, as described below, not run: the study's pretrained runs have no layer decay.

    Args:
        root: folder of the pictures and masks.
        weights: classification weights for the backbone; the whole model then learns at 2e-4, a
            fifth of the rate, and the backbone slower towards its first blocks. None begins with
            drawn ones.
    """
    backbone = VimConfig.tiny(image_size=_IMAGE_SIZE, readout="mean", drop_path=_DROP_PATH)
    return _camvid("vim_camvid", backbone, root, weights)


def deit_camvid(root: Path | str = "camvid", weights: str | None = None) -> SegmentationRecipe:
    """UperNet on DeiT-Ti, trained in the same way.

    Source: ours.
    Run:    visionmamba train deit_camvid --data.root camvid --out runs/deit_camvid
    Cost:   not run to its end; 900 steps took 2.3 minutes of one H200 that trained up to five
            others beside.
    Paper:  none.
    Here:   its 8,000 steps not run. 900 steps at 2e-3 in bfloat16, warm-up of 45 steps and no
            moving average, otherwise this recipe from drawn weights: 38.3 ± 1.0 test mIoU,
            47.2 ± 0.6 on the validation split, three seeds (docs/reproduction.md).

    Args:
        root: folder of the pictures and masks.
        weights: classification weights for the backbone, as in `vim_camvid`.
    """
    backbone = DeiTConfig.tiny(image_size=_IMAGE_SIZE, drop_path=_DROP_PATH)
    return _camvid("deit_camvid", backbone, root, weights)


def _camvid(
    name: str, backbone: VimConfig | DeiTConfig, root: Path | str, weights: str | None
) -> SegmentationRecipe:
    is_new = weights is None
    return SegmentationRecipe(
        name=name,
        data=MaskFolder(root=Path(root)),
        model=SegmenterConfig(backbone=backbone, num_classes=_NUM_CLASSES),
        weights=weights,
        preprocessing=SegmentationPreprocessing(crop_size=_IMAGE_SIZE),
        augmentation=SegmentationAugmentation(),
        optimizer=OptimizerConfig(
            lr=1e-3 if is_new else 2e-4,
            schedule="linear",
            warmup_steps=400,
            min_lr=0.0,
            weight_decay=0.05,
            layer_decay=None if is_new else 0.9,
            clip_norm=1.0,
        ),
        epochs=20,
        epoch_steps=400,
        batch_size=16,
        ema_decay=0.999,
    )
