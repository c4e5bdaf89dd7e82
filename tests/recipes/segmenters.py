"""Recipes that learn drawn shapes in seconds, for tests of what happens around the training."""

from dataclasses import replace
from typing import Any

from visionmamba.models import VimConfig
from visionmamba.recipes import SegmentationRecipe, vim_shapes

STEPS_PER_EPOCH = 3


def small_recipe(**changes: Any) -> SegmentationRecipe:
    """Returns two epochs, of three steps each, of a tiny Vim with UperNet."""
    recipe = vim_shapes()
    backbone = VimConfig(
        image_size=32, patch_size=8, d_model=16, depth=2, readout="mean", drop_path=0.2
    )
    recipe = replace(
        recipe,
        data=replace(recipe.data, num_train=10, num_val=6, image_size=32),
        model=replace(recipe.model, backbone=backbone, auxiliary_channels=8),
        preprocessing=replace(recipe.preprocessing, crop_size=32),
        augmentation=replace(recipe.augmentation, photometric=True),
        epochs=2,
        epoch_steps=STEPS_PER_EPOCH,
        batch_size=4,
        log_every_steps=1,
    )
    return replace(recipe, **changes)
