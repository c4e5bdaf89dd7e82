"""Cascade Mask R-CNN on Vim-Ti and on DeiT-Ti for crowded pictures of cells, under one recipe.

Made for the nuclei of the 2018 Data Science Bowl in COCO's format: 531 microscope pictures to learn
from, most of them 256x256 px, with up to 375 nuclei of a median 20 px across. Any data in COCO's
format can take their place. Pictures are brought to 512 px, which doubles most of them; anchors
begin at 16 px; as many as 400 objects of a picture are reported; the heads are narrower than those
for COCO's 80 classes, as in the lite model of the authors' code.
"""

from pathlib import Path

from visionmamba.data import Coco, DetectionAugmentation, DetectionPreprocessing
from visionmamba.models import DeiTConfig, DetectorConfig, VimConfig
from visionmamba.recipes.detection import DetectionRecipe
from visionmamba.tasks import DetectionInference
from visionmamba.training import OptimizerConfig

_IMAGE_SIZE = 512
_NUM_CLASSES = 1
_DROP_PATH = 0.1


def vim_nuclei(root: Path | str = "nuclei", weights: str | None = None) -> DetectionRecipe:
    """Cascade Mask R-CNN on Vim-Ti, COCO's format, hundreds of small objects a picture.

    Source: ours.
    Run:    visionmamba train vim_nuclei --data.root nuclei --out runs/vim_nuclei
    Cost:   800 of its 1,200 steps took 5.1 minutes of one H200 that trained three others beside.
    Paper:  none.
    Here:   its 1,200 steps not run. 800 steps in bfloat16 without moving average from drawn
            weights: 52.2 ± 0.1 mask AP, 52.9 ± 0.1 box AP, two seeds (docs/reproduction.md).

    Args:
        root: folder of annotations and pictures.
        weights: classification weights for the backbone; the whole model then learns at 1e-4, a
            fifth of the rate, and the backbone slower towards its first blocks. None begins with
            drawn ones.
    """
    backbone = VimConfig.tiny(image_size=_IMAGE_SIZE, readout="mean", drop_path=_DROP_PATH)
    return _nuclei("vim_nuclei", backbone, root, weights)


def deit_nuclei(root: Path | str = "nuclei", weights: str | None = None) -> DetectionRecipe:
    """Cascade Mask R-CNN on DeiT-Ti with global attention, trained in the same way.

    Source: ours.
    Run:    visionmamba train deit_nuclei --data.root nuclei --out runs/deit_nuclei
    Cost:   800 of its 1,200 steps took 5.1 minutes of one H200 that trained three others beside.
    Paper:  none.
    Here:   its 1,200 steps not run. 800 steps in bfloat16 without moving average from drawn
            weights: 50.3 ± 0.9 mask AP, 51.1 ± 0.9 box AP, two seeds (docs/reproduction.md).

    Args:
        root: folder of annotations and pictures.
        weights: classification weights for the backbone, as in `vim_nuclei`.
    """
    backbone = DeiTConfig.tiny(image_size=_IMAGE_SIZE, drop_path=_DROP_PATH)
    return _nuclei("deit_nuclei", backbone, root, weights)


def _nuclei(
    name: str, backbone: VimConfig | DeiTConfig, root: Path | str, weights: str | None
) -> DetectionRecipe:
    is_new = weights is None
    return DetectionRecipe(
        name=name,
        data=Coco(root=Path(root)),
        model=DetectorConfig(
            backbone=backbone,
            num_classes=_NUM_CLASSES,
            channels=192,
            box_width=768,
            anchor_sizes=(16, 32, 64, 128, 256),
            num_sampled=256,
            max_detections=400,
        ),
        weights=weights,
        preprocessing=DetectionPreprocessing(image_size=_IMAGE_SIZE),
        inference=DetectionInference(crop_size=256, stride=192),  # as large as most pictures
        augmentation=DetectionAugmentation(min_scale=0.5, max_scale=2.0, vertical_flip=0.5),
        optimizer=OptimizerConfig(
            lr=5e-4 if is_new else 1e-4,
            schedule="linear",
            warmup_steps=100,
            min_lr=0.0,
            weight_decay=0.05,
            layer_decay=None if is_new else 0.9,
            clip_norm=1.0,
        ),
        epochs=12,
        epoch_steps=100,
        batch_size=16,
        ema_decay=0.995,
    )
