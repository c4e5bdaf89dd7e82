"""A trained Vim taught the classes of your own folder of pictures."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from visionmamba.data import Augmentation, ImageFolder, Mixing, Preprocessing
from visionmamba.models import DeiTConfig, VimConfig, WeightsHeader, read_header
from visionmamba.models.hub import find_weights
from visionmamba.models.published import load_published
from visionmamba.models.weights import METADATA_KEY, config_of, read_metadata
from visionmamba.recipes.recipe import Recipe
from visionmamba.training import OptimizerConfig

Size = Literal["tiny", "small", "base"]

PUBLISHED_CONFIGS: dict[str, VimConfig] = {
    "vim_tiny_patch16_224": VimConfig.tiny(),
    "vim_tiny_patch16_stride8_224": VimConfig.tiny(stride=8),
    "vim_small_patch16_224": VimConfig.small(),
    "vim_small_patch16_stride8_224": VimConfig.small(stride=8),
    "vim_base_patch16_224": VimConfig.base(),
}
"""The published weights whose make is known without having them."""

_DROP_PATH = 0.05
_SCRATCH_CONFIGS: dict[Size, VimConfig] = {
    "tiny": VimConfig.tiny(),
    "small": VimConfig.small(),
    "base": VimConfig.base(),
}


def finetune(
    root: Path | str = "data",
    *,
    weights: Path | str | None = "vim_tiny_patch16_224",
    size: Size = "tiny",
    image_size: int | None = None,
) -> Recipe:
    """Your own `root/{train,val}/CLASS/*`, learned from published weights, your own, or none.

    Layer by layer from the head down the learning rate falls by a tenth, so that what the first
    blocks know is kept. Mixup and CutMix are off: they need long runs. The classes are the folders;
    the head is new unless the weights have as many.

    Source: ours; layer-wise decay as in BEiT (arXiv 2106.08254).
    Run:    visionmamba train finetune --data.root PICTURES --out runs/mine
    Cost:   8 s an epoch of 9,469 photographs at 160 px in bfloat16, one H200 and 16 cores.
    Paper:  none.
    Here:   Imagenette, from weights that knew five of its ten classes: 64.6 top-1 after 8 of 12
            epochs (docs/training.md). From published weights: not run.

    Args:
        root: folder of the pictures.
        weights: a file of this package, the authors' .pth, a published name (downloaded at the
            first use); None begins with drawn weights.
        size: of the model without weights.
        image_size: side in pixels; by default what the weights were trained with, or 224.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: they are damaged, or there is no published model of that name.
    """
    if weights is None:
        model: VimConfig | DeiTConfig = _SCRATCH_CONFIGS[size]
        preprocessing = Preprocessing(image_size=224)
        optimizer = OptimizerConfig(lr=1e-3, warmup_epochs=5, weight_decay=0.05)
    else:
        model, preprocessing = _make_of(weights)
        optimizer = OptimizerConfig(
            lr=5e-4, warmup_epochs=2, weight_decay=0.05, layer_decay=0.9, min_lr_share=0.01
        )
    side = preprocessing.image_size if image_size is None else image_size
    return Recipe(
        name="finetune",
        data=ImageFolder(root=Path(root)),
        model=replace(model, image_size=side, drop_path=_DROP_PATH),
        weights=weights,
        preprocessing=replace(preprocessing, image_size=side),
        augmentation=Augmentation(
            min_crop_area=0.35,
            horizontal_flip=True,
            auto_augment="rand-m5-mstd0.5-inc1",
            erase_probability=0.1,
        ),
        mixing=Mixing(),
        optimizer=optimizer,
        epochs=30,
        batch_size=64,
        label_smoothing=0.1,
    )


def _make_of(weights: Path | str) -> tuple[VimConfig | DeiTConfig, Preprocessing]:
    """Returns the configuration of weights, and how pictures are prepared for them."""
    name = os.fspath(weights)
    if name in PUBLISHED_CONFIGS and not Path(name).exists():
        model = PUBLISHED_CONFIGS[name]
        return model, Preprocessing(image_size=model.image_size)
    path = find_weights(weights)
    if path.suffix == ".safetensors" and METADATA_KEY in read_metadata(path):
        header = read_header(path)
        return config_of(header, path), _preparation(header, path)
    published = load_published(path)
    assert published.header is not None
    return published.config, _preparation(published.header, path)


def _preparation(header: WeightsHeader, path: Path) -> Preprocessing:
    if not header.preprocessing:
        raise ValueError(
            f"{path} does not say how pictures are prepared; "
            "save it with visionmamba.save(..., preprocessing=...)"
        )
    return Preprocessing.from_dict(header.preprocessing)
