"""Detectors started from the weights of a classifier; files are read by weights.py and hub.py."""

import math
import os
from dataclasses import asdict

from torch import Tensor

from visionmamba.models.adapt import LoadReport, fit_channels
from visionmamba.models.config import VimConfig
from visionmamba.models.deit import DeiTConfig
from visionmamba.models.detection import DetectionModel
from visionmamba.models.embed import resize_grid
from visionmamba.models.hub import find_weights, from_pretrained
from visionmamba.models.published_file import Which, read_checkpoint
from visionmamba.models.weights import (
    METADATA_KEY,
    config_of,
    load_strictly,
    read_header,
    read_metadata,
    read_tensors,
    weights_file,
)

_UNUSED = ("head.", "norm.", "cls_token")  # of a classifier, by a detector


def load_detector_backbone(
    model: DetectionModel, weights: str | os.PathLike[str], *, which: Which = "model"
) -> LoadReport:
    """Start the backbone of a detector from weights, in place, and return what was changed.

    The position embedding is resized to the detector's image_size, the rows of class tokens apart;
    class tokens that the detector does not have, classifier and final norm are left out.

    Args:
        model: to be started; the rest of it is left as it is.
        weights: of a classifier: a file or folder of this package; for a Vim also a file of its
            authors or a name that `visionmamba models` lists; for a DeiT a file of its authors.
        which: entry of an authors' file: the raw weights or their moving average.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read safely, holds a model of another kind, or does not fit.
    """
    config = model.config.backbone
    if isinstance(config, VimConfig):
        vim = from_pretrained(weights, which=which, **asdict(config))
        assert vim.load_report is not None
        state, report = vim.state_dict(), vim.load_report
        state = {name: t for name, t in state.items() if not name.startswith("norm.")}
    else:
        state, report = _fitted_deit(weights, config, which)
    load_strictly(model.backbone, state, report.source)
    return report


def _fitted_deit(
    weights: str | os.PathLike[str], config: DeiTConfig, which: Which
) -> tuple[dict[str, Tensor], LoadReport]:
    """Return the tensors of a DeiT without class token that fit `config`, and the report."""
    path = weights_file(find_weights(weights))
    if path.suffix == ".safetensors" and METADATA_KEY in read_metadata(path):
        held = config_of(read_header(path), path)
        if not isinstance(held, DeiTConfig):
            raise ValueError(
                f"{path} holds a Vim and the detector's backbone is a DeiT; give a DeiT's weights"
            )
        if held.num_heads != config.num_heads:
            raise ValueError(
                f"{path} has num_heads {held.num_heads} and the detector's backbone has "
                f"{config.num_heads}, which loading cannot change"
            )
        old_grid, state = _grid(held), read_tensors(path)
    else:
        state = read_checkpoint(path, which).state
        rows = state["pos_embed"].shape[-2] - 1 if "pos_embed" in state else 0
        old_grid = (math.isqrt(max(rows, 0)),) * 2
        if not rows or math.prod(old_grid) != rows or state["pos_embed"].dim() != 3:
            raise ValueError(
                f"{path} is no published DeiT: it has no pos_embed of one class token and a square "
                "of patches"
            )
    state = {name: t for name, t in state.items() if not name.startswith(_UNUSED)}
    changes, new_grid = [], _grid(config)
    state["pos_embed"] = state["pos_embed"][:, 1:]
    if old_grid != new_grid:
        state["pos_embed"] = resize_grid(state["pos_embed"], old_grid, new_grid)
        changes.append(f"position embedding resized from {old_grid} to {new_grid} patches")
    filters = state.get("patch_embed.proj.weight")
    if filters is not None and filters.dim() == 4 and filters.shape[1] != config.in_channels:
        state["patch_embed.proj.weight"] = fit_channels(filters, config.in_channels)
        changes.append(f"patch filters fitted from {filters.shape[1]} to {config.in_channels}")
    return state, LoadReport(source=str(path), options={}, changes=tuple(changes))


def _grid(config: DeiTConfig) -> tuple[int, int]:
    size = config.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return height // config.patch_size, width // config.patch_size
