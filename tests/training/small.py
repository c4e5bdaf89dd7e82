"""A recipe that trains in seconds, for tests of what happens around the training."""

from dataclasses import replace
from typing import Any

from visionmamba.models import VimConfig
from visionmamba.recipes import Recipe, digits_vim

STEPS_PER_EPOCH = 11


def small_recipe(**changes: Any) -> Recipe:
    """Returns two epochs of a tiny Vim with stochastic depth on the digits, 11 steps each."""
    model = VimConfig(
        image_size=8, patch_size=2, in_channels=1, d_model=16, depth=2, drop_path=0.2, dropout=0.1
    )
    recipe = replace(digits_vim(), model=model, epochs=2, batch_size=128, log_every_steps=3)
    return replace(recipe, **changes)
