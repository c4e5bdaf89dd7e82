"""Trains the small recipe as one of several processes; started by torch.distributed.run."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.training.small import small_recipe
from visionmamba.training import fit

if __name__ == "__main__":
    out, strategy = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    recipe = small_recipe(epochs=1, log_every_steps=1, ema_decay=0.9)
    recipe = replace(recipe, model=replace(recipe.model, drop_path=0.0, dropout=0.0))
    fit(recipe, out, device="cpu", strategy=strategy, progress=False)
