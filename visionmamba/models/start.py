"""Segmenters and detectors that start from the weights of others: a backbone's, or all of them.

Files are read by weights.py and published_file.py; how a Vim's weights are fitted is in adapt.py.
"""

import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from visionmamba.models.adapt import (
    LoadReport,
    Origin,
    build_fitted,
    fit_channels,
    fit_positions,
    patch_grid,
)
from visionmamba.models.config import VimConfig, VimOptions
from visionmamba.models.deit import DeiT, DeiTConfig
from visionmamba.models.detection import DetectionModel, DetectorConfig
from visionmamba.models.hub import find_weights
from visionmamba.models.published import load_published
from visionmamba.models.published_file import Which, read_checkpoint
from visionmamba.models.segmentation import SegmentationModel, SegmenterConfig
from visionmamba.models.vim import RegisterReadout, Vim
from visionmamba.models.weights import (
    METADATA_KEY,
    WeightsHeader,
    backbone_config_of,
    detector_config_of,
    load_strictly,
    read_header,
    read_metadata,
    read_tensors,
    segmenter_config_of,
    weights_file,
)

_PREFIX = "backbone."


def load_backbone(
    model: nn.Module, weights: str | os.PathLike[str], *, which: Which = "model"
) -> LoadReport:
    """Start the backbone of a model from weights, in place, and return what was changed.

    The position embedding is resized to the backbone's image_size with the rows of class tokens
    kept apart, wherever they stand; class tokens that the backbone does not have are dropped with
    their rows, as are a classifier, a norm and a read-out of registers that nothing reads.

    Args:
        model: a SegmentationModel, a DetectionModel or any module with one Vim or DeiT inside, such
            as transformers' models over VimBackbone; all else in it is left as it is.
        weights: a file or folder of this package, with a classifier, a segmenter or a detector; for
            a Vim a file of its authors or a name that `visionmamba models` lists; for a DeiT a file
            of its authors or timm's repository OWNER/NAME on the Hub.
        which: entry of an authors' file: the raw weights or their moving average.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read safely, holds a model of another kind, or does not fit; or the
            module has no backbone, or several.
    """
    backbones = [module for module in model.modules() if isinstance(module, Vim | DeiT)]
    if len(backbones) != 1:
        raise ValueError(
            f"load_backbone takes a model with one Vim or DeiT inside; {type(model).__name__} has "
            f"{len(backbones)}: give the part that is to be started"
        )
    backbone, path = backbones[0], weights_file(find_weights(weights))
    is_ours = path.suffix == ".safetensors" and METADATA_KEY in read_metadata(path)
    if isinstance(backbone, Vim):
        state, report = _start_vim(path, backbone.config, is_ours, which)
    else:
        state, report = _start_deit(path, backbone, is_ours, which)
    wanted = backbone.state_dict()
    left_out = ("head.", "norm.", "register_readout.")  # unless wanted
    fitted = {k: t for k, t in state.items() if k in wanted or not k.startswith(left_out)}
    # a new classifier, if the model has one, stays
    fitted |= {k: t for k, t in wanted.items() if k.startswith("head.")}
    load_strictly(backbone, fitted, path)
    return report


def load_segmenter(model: SegmentationModel, weights: str | os.PathLike[str]) -> WeightsHeader:
    """Load all weights of a segmenter into one of the same configuration; return their header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another model, of another number of classes, or does not fit.
    """
    path = weights_file(find_weights(weights))
    header = read_header(path)
    _load_whole(model, segmenter_config_of(header, path), path)
    return header


def load_detector(model: DetectionModel, weights: str | os.PathLike[str]) -> WeightsHeader:
    """Load all weights of a detector into one of the same configuration; return their header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another model, of another number of classes, or does not fit.
    """
    path = weights_file(find_weights(weights))
    header = read_header(path)
    _load_whole(model, detector_config_of(header, path), path)
    return header


def _load_whole(
    model: SegmentationModel | DetectionModel, held: SegmenterConfig | DetectorConfig, path: Path
) -> None:
    if held.num_classes != model.num_classes:
        name = "segmenter" if isinstance(model, SegmentationModel) else "detector"
        raise ValueError(
            f"{path} holds a {name} of {held.num_classes} classes and the data have "
            f"{model.num_classes}; take its backbone alone, by a recipe's backbone_only or by "
            "visionmamba.models.load_backbone, or give weights of the same classes"
        )
    load_strictly(model, read_tensors(path), path)


_Started = tuple[dict[str, Tensor], LoadReport]


def _start_vim(path: Path, config: VimConfig, is_ours: bool, which: Which) -> _Started:
    """Return the tensors of a Vim with the shapes of `config`, and the report."""
    config = replace(config, num_classes=0)
    if not is_ours:
        vim = load_published(path, which=which, **_options_of_shapes(config))
        assert vim.load_report is not None
        notes = (*vim.load_report.notes, *_differences(vim.config, config))
        return vim.state_dict(), replace(vim.load_report, notes=notes)
    held, state = _read_ours(path)
    if not isinstance(held, VimConfig):
        raise ValueError(f"{path} holds a DeiT and the backbone to start is a Vim; give a Vim's")
    vim, changes = build_fitted(
        state, held, config, source_grid=patch_grid(held), resize="grid", name=path
    )
    return vim.state_dict(), _report(path, held, changes, _differences(held, config))


def _start_deit(path: Path, deit: DeiT, is_ours: bool, which: Which) -> _Started:
    """Return tensors with the shapes of a DeiT's, and the report."""
    held: DeiTConfig | None = None
    config = deit.config
    if is_ours:
        found, state = _read_ours(path)
        if not isinstance(found, DeiTConfig):
            raise ValueError(
                f"{path} holds a Vim and the backbone to start is a DeiT; give a DeiT's"
            )
        held = found
        for option in ("patch_size", "d_model", "depth", "num_heads"):
            if getattr(held, option) != getattr(config, option):
                raise ValueError(
                    f"{path} has {option} {getattr(held, option)} and the backbone to start has "
                    f"{getattr(config, option)}, which loading cannot change"
                )
    else:
        state = read_checkpoint(path, which).state
    rows = state.get("pos_embed")
    side = math.isqrt(max(rows.shape[1] - 1, 1)) if rows is not None and rows.dim() == 3 else 1
    old_grid = (side, side) if held is None else held.grid
    # a detector's DeiT has no class token, all others have
    old_places: tuple[int, ...] = (0,) if held is None or "cls_token" in state else ()
    num_rows = math.prod(old_grid) + len(old_places)
    if rows is None or rows.shape != (1, num_rows, config.d_model):
        kind, patches = ("published DeiT", "a square of") if held is None else ("DeiT", "its")
        tokens = " and one class token" if old_places else ""
        raise ValueError(
            f"{path} is not a {kind} {config.d_model} wide: it has no pos_embed of {patches} "
            f"patches{tokens}"
        )
    new_places: tuple[int, ...] = (0,) if deit.cls_token is not None else ()
    if new_places and not old_places:
        raise ValueError(
            f"{path} holds a DeiT without class token, which the backbone to start has; give "
            "weights of a classifier or of a segmenter"
        )
    changes = []
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    new_grid = config.grid
    if (old_grid, old_places) != (new_grid, new_places):
        state["pos_embed"] = fit_positions(rows, (old_grid, old_places), (new_grid, new_places))
    if old_grid != new_grid:
        changes.append(f"position embedding resized from {old_grid} to {new_grid} patches")
    if old_places and not new_places:
        state.pop("cls_token", None)
        changes.append("class token dropped")
    key = "patch_embed.proj.weight"
    channels = state[key].shape[1] if key in state and state[key].dim() == 4 else 0
    if channels not in (0, config.in_channels):
        state[key] = fit_channels(state[key], config.in_channels)
        changes.append(f"patch filters fitted from {channels} to {config.in_channels}")
    return state, _report(path, held, tuple(changes), ())


def _read_ours(path: Path) -> tuple[VimConfig | DeiTConfig, dict[str, Tensor]]:
    """Return configuration and tensors of the backbone in a file of this package, without head.

    A norm and a read-out of registers that a segmenter or a detector did not have are fresh.
    """
    header, state = read_header(path), read_tensors(path)
    held = backbone_config_of(header, path)
    if header.architecture in ("segmenter", "detector"):
        state = {k.removeprefix(_PREFIX): t for k, t in state.items() if k.startswith(_PREFIX)}
    plain = replace(held, num_classes=0)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    with torch.device("meta"):
        norm = plain.build().norm.state_dict()
    for name, tensor in norm.items():
        fill = torch.ones if name == "weight" else torch.zeros
        state.setdefault(f"norm.{name}", fill(tensor.shape))
    if isinstance(plain, VimConfig) and plain.readout == "registers":
        fresh = RegisterReadout(plain).state_dict()
        state = {f"register_readout.{name}": tensor for name, tensor in fresh.items()} | state
    return plain, state


def _options_of_shapes(config: VimConfig) -> VimOptions:
    """Return the options that weights have shapes of, and those that they can be fitted to."""
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "stride": config.stride,
        "in_channels": config.in_channels,
        "num_classes": 0,
        "d_model": config.d_model,
        "depth": config.depth,
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": config.expand,
        "dt_rank": config.dt_rank,
        "bidirectional": config.bidirectional,
        "inner_mixer": config.inner_mixer,
        "readout": config.readout,
        "num_registers": config.num_registers,
        "norm": config.norm,
        "layer_scale": config.layer_scale,
        "position_embedding": config.position_embedding,
    }


def _differences(held: VimConfig, wanted: VimConfig) -> tuple[str, ...]:
    """Return in words what no shape tells and the weights were trained with otherwise."""
    options = ["halve_directions", "norm_eps", "rope"]
    if held.rope != "none" and wanted.rope != "none":
        options += ["rope_layout", "rope_reference_grid"]
    return tuple(
        f"the weights are of {option}={getattr(held, option)!r} and run with "
        f"{option}={getattr(wanted, option)!r}"
        for option in options
        if getattr(held, option) != getattr(wanted, option)
    )


def _report(
    path: Path,
    held: VimConfig | DeiTConfig | None,
    changes: tuple[str, ...],
    notes: tuple[str, ...],
) -> LoadReport:
    told: dict[str, tuple[object, Origin]] = {}
    if held is not None:
        told = {name: (value, "header") for name, value in asdict(held).items()}
    return LoadReport(source=str(path), options=told, changes=changes, notes=notes)
