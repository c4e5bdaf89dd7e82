"""The folder of a run: names of its files, whose run it holds, and what is left after a failure."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from visionmamba.training.experiment import Experiment, Recipe

CHECKPOINT = "last.ckpt"
RECIPE = "recipe.json"
METRICS = "metrics.csv"
CLASSES = "classes.csv"
PICTURES = "pictures"
"""Folder of what the task draws of validation batches, epoch_NNNN.png."""
CURVES = "curves.png"
UNREADABLE = "unreadable.txt"
LOGS = "tensorboard"
RESULTS = "results.json"
"""Written last: a folder that has it holds a finished run."""

_OWN_FILES = (
    RECIPE, METRICS, CLASSES, CURVES, UNREADABLE,
    "best.safetensors", "last.safetensors", "best_ema.safetensors", "last_ema.safetensors",
)  # fmt: skip
_MAY_DIFFER = ("device_batch_size", "compile")  # of a recipe whose run is taken up again


def identity_of(recipe: Recipe, experiment: Experiment) -> dict[str, Any]:
    """Returns all that decides a run's result, as plain values."""
    assert is_dataclass(recipe) and not isinstance(recipe, type)
    plain: dict[str, Any] = json.loads(
        json.dumps({"recipe": asdict(recipe), "data": experiment.data_summary}, default=str)
    )
    return plain


def refuse_other_recipe(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises ValueError when the run in a folder is not the one that is to go on there."""
    flat_there, flat_here = _flat(there), _flat(here)
    differences = [
        _difference(name, flat_there.get(name, "absent"), flat_here.get(name, "absent"))
        for name in sorted((flat_there.keys() | flat_here.keys()) - set(_MAY_DIFFER))
        if flat_there.get(name, "absent") != flat_here.get(name, "absent")
    ]
    if differences:
        raise ValueError(
            f"{out} holds a run of another recipe ({'; '.join(differences)}); "
            "repeat its options to go on with it, or give another --out"
        )


def _difference(name: str, there: Any, here: Any) -> str:
    if isinstance(there, list) and isinstance(here, list) and max(len(there), len(here)) > 4:
        if len(there) != len(here):
            return f"{name} has {len(there)} entries there and {len(here)} here"
        pairs = enumerate(zip(there, here, strict=True))
        number, (first, second) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        return f"{name}[{number}] is {first} there and {second} here"
    return f"{name} is {there} there and {here} here"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}".removeprefix("recipe.")] = value
    return flat


def refuse_foreign_files(out: Path) -> None:
    """Raises ValueError when files of somebody else would be overwritten."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, wanted a folder for the run; give another --out")
    if (out / RECIPE).exists():
        return
    for name in (*_OWN_FILES, RESULTS, CHECKPOINT, PICTURES):
        if (out / name).exists():
            raise ValueError(
                f"{out} holds a {name} but no {RECIPE}, so it is not a run of ours and is left "
                "alone; give another --out"
            )


def remove_leftovers(out: Path, *, with_folder: bool) -> None:
    """Removes what a run wrote that came to an end before its first checkpoint."""
    for name in (*_OWN_FILES, f"{METRICS}.tmp", f"{RECIPE}.tmp", f"{CHECKPOINT}.tmp"):
        (out / name).unlink(missing_ok=True)
    for folder in (LOGS, PICTURES):
        shutil.rmtree(out / folder, ignore_errors=True)
    if with_folder:
        out.rmdir()
