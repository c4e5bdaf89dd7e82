"""A small Vim that finds drawn shapes: segmentation in a minute of a CPU, without any data."""

from visionmamba.data import SegmentationAugmentation, SegmentationPreprocessing, Shapes
from visionmamba.models import SegmenterConfig, VimConfig
from visionmamba.recipes.segmentation import SegmentationRecipe
from visionmamba.training import OptimizerConfig

_IMAGE_SIZE = 64
_NUM_CLASSES = 4


def vim_shapes() -> SegmentationRecipe:
    """UperNet on a small Vim, drawn discs, squares and triangles on noisy ground.

    Source: ours.
    Run:    visionmamba train vim_shapes --out runs/vim_shapes
    Here:   93.3 mIoU on 128 held-out pictures, seed 0, in 31 s on two cores of an x86-64.
    """
    return SegmentationRecipe(
        name="vim_shapes",
        data=Shapes(image_size=_IMAGE_SIZE),
        model=SegmenterConfig(
            backbone=VimConfig(
                image_size=_IMAGE_SIZE, patch_size=8, d_model=48, depth=4, readout="mean"
            ),
            num_classes=_NUM_CLASSES,
            auxiliary_channels=32,
        ),
        preprocessing=SegmentationPreprocessing(crop_size=_IMAGE_SIZE),
        augmentation=SegmentationAugmentation(
            min_scale=1.0, max_scale=1.0, max_category_share=1.0, photometric=False
        ),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=20, weight_decay=0.05),
        epochs=10,
        batch_size=16,
    )
