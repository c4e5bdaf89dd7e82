"""A detector learns drawn objects on a CPU; from objects of other pictures it learns nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from visionmamba.recipes import vim_objects
from visionmamba.training import fit

pytestmark = [pytest.mark.once, pytest.mark.slow]


def box_ap50_after(num_steps: int, out: Path, *, shuffled: bool) -> float:
    """The recipe itself, perhaps shorter, with a single validation at its end."""
    recipe = vim_objects()
    recipe = replace(
        recipe, data=replace(recipe.data, shuffled=shuffled), epochs=1, epoch_steps=num_steps
    )
    return fit(recipe, out, device="cpu", progress=False).metrics["val_box_ap50"]


def test_vim_learns_drawn_objects(tmp_path: Path) -> None:
    assert box_ap50_after(256, tmp_path / "run", shuffled=False) > 0.8


def test_vim_learns_nothing_from_objects_of_other_pictures(tmp_path: Path) -> None:
    assert box_ap50_after(100, tmp_path / "run", shuffled=True) < 0.2
