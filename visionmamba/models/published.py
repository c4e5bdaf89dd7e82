"""The authors' checkpoints (hustvl/Vim): their options understood, their weights made a Vim.

How their files are read is in published_file.py; files of this package are in weights.py.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Unpack

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from visionmamba.models.adapt import (
    LoadReport,
    Origin,
    Resize,
    build_fitted,
    have_same_tokens,
    patch_grid,
)
from visionmamba.models.config import VimConfig, VimOptions
from visionmamba.models.embed import num_class_tokens
from visionmamba.models.published_file import Checkpoint, Which, read_checkpoint
from visionmamba.models.vim import Vim
from visionmamba.models.weights import WeightsHeader

Facts = dict[str, tuple[Any, Origin]]

_IMAGENET_CLASSES = 1000
_ANGLE_TOLERANCE = 1e-3  # of a cosine, in half precision at worst


def load_published(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    which: Which = "model",
    resize: Resize = "grid",
    **config_overrides: Unpack[VimOptions],
) -> Vim:
    """Return a Vim with weights in the authors' format, in evaluation mode on the CPU.

    Files are read through an allow-list (tensors, plain containers, argparse.Namespace, numpy
    numbers): a pickle that asks for anything else is refused and runs nothing. The configuration
    comes from the overrides, from `args` in the file, from keys and shapes, and from the released
    models' defaults, in this order; `model.load_report` tells which, and what was changed to fit.

    What may differ from the file: num_classes (another number gets a new head, 0 none), in_channels
    (filters summed or repeated as in timm), image_size and stride (the position embedding is
    resized), a readout without class token, and every option that no weights belong to.

    Args:
        source: the authors' .pth file, safetensors with their key names, or such a state_dict.
        which: entry of the file: the raw weights or their moving average.
        resize: "grid" keeps the class token's row apart; "published" is the authors' way, which
            takes the first row for it, only to repeat their fine-tuning.
        config_overrides: fields of VimConfig.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read safely, has no such entry, or does not fit the overrides.
        TypeError: an override that VimConfig does not have.
    """
    checkpoint = read_checkpoint(source, which)
    _check_keys(checkpoint)
    facts, grid, notes = _understand(checkpoint, config_overrides)
    held = VimConfig(**{name: value for name, (value, _) in facts.items()})
    wanted = replace(held, **config_overrides)
    is_told = facts["readout"][1] != "assumed"
    if not is_told and have_same_tokens(wanted, held):
        held = replace(held, readout=wanted.readout)
    model, changes = build_fitted(
        published_to_ours(checkpoint.state),
        held,
        wanted,
        source_grid=grid or patch_grid(wanted),
        resize=resize,
        name=checkpoint.name,
    )
    model.header = _header(wanted, checkpoint.args)
    model.load_report = LoadReport(
        source=checkpoint.name,
        options={**facts, **{name: (value, "given") for name, value in config_overrides.items()}},
        changes=changes,
        unused=checkpoint.unused,
        notes=notes,
    )
    return model


_NEEDED = {  # keys that tell the configuration, and how many dimensions each has
    "patch_embed.proj.weight": 4,
    "norm_f.weight": 1,
    "layers.0.mixer.A_log": 2,
    "layers.0.mixer.conv1d.weight": 3,
    "layers.0.mixer.dt_proj.weight": 2,
}
_OPTIONAL = {"pos_embed": 3, "head.weight": 2, "rope.freqs_cos": 2}


def _check_keys(checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    odd = [key for key, t in state.items() if not t.is_floating_point() or _is_special(t)]
    if odd:
        raise ValueError(
            f"{checkpoint.name} must hold plain floating-point tensors; {odd[0]} is "
            f"{state[odd[0]].dtype} ({state[odd[0]].layout}, {state[odd[0]].device})"
        )
    missing = [key for key in _NEEDED if key not in state]
    if missing:
        raise ValueError(
            f"{checkpoint.name} is not a published Vim: it has no {' and no '.join(missing)}"
        )
    for key, dim in {**_NEEDED, **_OPTIONAL}.items():
        if key in state and state[key].dim() != dim:
            raise ValueError(
                f"{checkpoint.name} is not a published Vim: {key} must have {dim} dimensions; "
                f"got {tuple(state[key].shape)}"
            )


def _is_special(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.layout != torch.strided


def _understand(
    checkpoint: Checkpoint, overrides: VimOptions
) -> tuple[Facts, tuple[int, int] | None, tuple[str, ...]]:
    """Return the options of the weights with their origins, the grid of patches, and notes."""
    state = checkpoint.state
    facts = _facts_from_shapes(state)
    readout, has_rope = facts["readout"][0], "rope.freqs_cos" in state
    grid = None
    if "pos_embed" in state:
        num_patches = state["pos_embed"].shape[1] - num_class_tokens(VimConfig(readout=readout))
        grid = _square(num_patches) or _grid_of_overrides(facts, overrides, num_patches)
        if grid is None:
            raise ValueError(
                f"{checkpoint.name} has position rows for {num_patches} patches, which are no "
                "square; give image_size=(height, width), and stride where it is not the patch size"
            )
    patch = facts["patch_size"][0]
    stride = 8 if (patch, grid) == (16, (27, 27)) else patch  # as in the fine-tuned models
    size = (224, 224) if grid is None else tuple((side - 1) * stride + patch for side in grid)
    facts |= {
        "image_size": (size[0] if size[0] == size[1] else size, "assumed"),
        "stride": (stride, "assumed"),
        # the models of January 2024 rotate, and came before directions were halved
        "halve_directions": (not has_rope, "assumed"),
        "norm_eps": (1e-5, "assumed"),
    }
    if has_rope:
        facts |= {
            "rope": ("tokens+residual", "assumed"),
            "rope_layout": ("published", "assumed"),
            "rope_reference_grid": (14, "assumed"),
        }
    told, notes = _facts_from_args(checkpoint.args or {}, facts, grid)
    if has_rope and not _turns_by(overrides.get("rope_reference_grid", 14), state):
        notes += ("rope.freqs_cos is of another rope_reference_grid: give it, or expect to differ",)
    return {**facts, **told}, grid, notes


def _facts_from_shapes(state: Mapping[str, Tensor]) -> Facts:
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    d_inner, d_state = state["layers.0.mixer.A_log"].shape
    bidirectional = "none"
    if "layers.0.mixer.A_b_log" in state:
        bidirectional = "ssm+conv" if "layers.0.mixer.D_b" in state else "ssm"
    blocks = {found[1] for key in state if (found := re.match(r"layers\.(\d+)\.", key))}
    options: dict[str, Any] = {
        "patch_size": patch,
        "in_channels": channels,
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "d_model": width,
        "depth": len(blocks),
        "d_state": d_state,
        "d_conv": state["layers.0.mixer.conv1d.weight"].shape[-1],
        "expand": d_inner // width,
        "dt_rank": state["layers.0.mixer.dt_proj.weight"].shape[1],
        "bidirectional": bidirectional,
        "norm": "layernorm" if "norm_f.bias" in state else "rmsnorm",
        "layer_scale": 1.0 if "layers.0.mixer.gamma" in state else None,
        "position_embedding": "learned" if "pos_embed" in state else "none",
    }
    facts: Facts = {name: (value, "shapes") for name, value in options.items()}
    if "cls_token_head" in state:
        return {**facts, "readout": ("double", "shapes")}
    if "cls_token" not in state:
        return {**facts, "readout": ("mean", "assumed")}
    # tokens in the middle came with the models that do not rotate
    return {**facts, "readout": ("head" if "rope.freqs_cos" in state else "middle", "assumed")}


def _square(num_patches: int) -> tuple[int, int] | None:
    side = math.isqrt(max(num_patches, 0))
    return (side, side) if side * side == num_patches > 0 else None


def _grid_of_overrides(
    facts: Facts, overrides: VimOptions, num_patches: int
) -> tuple[int, int] | None:
    if "image_size" not in overrides:
        return None
    patch = facts["patch_size"][0]
    stride = overrides.get("stride")
    grid = patch_grid(
        VimConfig(image_size=overrides["image_size"], patch_size=patch, stride=stride)
    )
    return grid if grid[0] * grid[1] == num_patches else None


def _turns_by(reference_grid: int, state: Mapping[str, Tensor]) -> bool:
    """Return whether the second patch of the first row is turned by reference_grid / side."""
    cosines = state["rope.freqs_cos"]  # (h * w, D): D / 2 features of the row, then of the column
    side, first_of_column = math.isqrt(len(cosines)), cosines.shape[1] // 2
    if side < 2:
        return True
    found = cosines[1, first_of_column].item()
    return math.isclose(found, math.cos(reference_grid / side), abs_tol=_ANGLE_TOLERANCE)


_MODEL_NAME = re.compile(
    r"vim_(?:tiny|small|base)_patch(?P<patch>\d+)(?:_stride(?P<stride>\d+))?_(?P<side>\d+)"
    r"_bimambav2_final_pool_mean_abs_pos_embed(?P<rope>_rope)?(?P<residual>_also_residual)?"
    r"(?:_with_(?P<token>cls_token|midclstok|middle_cls_token))?(?P<halved>_div2)?"
)


def _facts_from_args(
    args: Mapping[str, Any], facts: Facts, grid: tuple[int, int] | None
) -> tuple[Facts, tuple[str, ...]]:
    """Return what args.model and args.input_size tell that shapes do not, and notes."""
    name, input_size = args.get("model"), args.get("input_size")
    if not isinstance(name, str):
        return {}, ()
    found = _MODEL_NAME.fullmatch(name)
    if found is None:
        return {}, (f"args.model {name!r} is none of the authors' names and was not used",)
    patch, side = int(found["patch"]), int(found["side"])
    if isinstance(input_size, int) and input_size >= patch:
        side = input_size
    stride = int(found["stride"] or patch)
    cells = (side - patch) // stride + 1  # the authors leave out what no whole patch covers
    readouts = {None: "mean", "cls_token": "head"}
    told: dict[str, Any] = {
        "image_size": (cells - 1) * stride + patch,
        "stride": stride,
        "readout": readouts.get(found["token"], "middle"),
        "halve_directions": found["halved"] is not None,
    }
    if found["rope"]:
        told["rope"] = "tokens+residual" if found["residual"] else "tokens"
        told["rope_layout"] = "published"
    same_tokens = have_same_tokens(
        VimConfig(readout=told["readout"]), VimConfig(readout=facts["readout"][0])
    )
    if patch != facts["patch_size"][0] or not same_tokens or grid not in (None, (cells, cells)):
        return {}, (f"args.model {name!r} does not fit the shapes and was not used",)
    return {option: (value, "args") for option, value in told.items()}, ()


def _header(config: VimConfig, args: Mapping[str, Any] | None) -> WeightsHeader:
    """Return what the released models say of their outputs and of their pictures."""
    is_imagenet = (
        config.num_classes == _IMAGENET_CLASSES and (args or {}).get("data_set", "IMNET") == "IMNET"
    )
    preprocessing = {
        "image_size": list(config.resolved_image_size),
        "crop_fraction": 0.875,
        "interpolation": "bicubic",
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
        "channels": "RGB",
    }
    synsets: list[str] = ImageNetInfo().label_names()  # type: ignore[no-untyped-call]
    return WeightsHeader(
        config=asdict(config),
        class_names=tuple(synsets) if is_imagenet else (),
        preprocessing=preprocessing if config.in_channels == 3 else {},
    )


_NAMES: tuple[tuple[str, str], ...] = (
    (r"^pos_embed$", "position_embedding.weight"),
    (r"^patch_embed\.proj\.", "patch_embedding."),
    (r"^norm_f\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.mixer\.gamma$", ".mixer.layer_scale"),
    (r"\.mixer\.A_b_log$", ".mixer.directions.1.A_log"),
    (r"\.mixer\.D_b$", ".mixer.directions.1.D"),
    (r"\.mixer\.(A_log|D)$", r".mixer.directions.0.\1"),
    (r"\.mixer\.(conv1d|dt_proj|x_proj)_b\.", r".mixer.directions.1.\1."),
    (r"\.mixer\.(conv1d|dt_proj|x_proj)\.", r".mixer.directions.0.\1."),
    (r"\.conv1d\.(weight|bias)$", r".conv_\1"),
    (r"\.dt_proj\.(weight|bias)$", r".dt_\1"),
)


def published_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the authors' tensors under this package's names and shapes."""
    shares_all_but_A = "layers.0.mixer.A_b_log" in state and "layers.0.mixer.D_b" not in state
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith("rope.") or key.startswith("cls_token"):
            continue  # rotations are computed; class tokens are joined below
        name = key
        if shares_all_but_A:
            name = name.replace(".mixer.A_b_log", ".mixer.backward_A_log")
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.squeeze(1) if name.endswith("conv_weight") else tensor
    tokens = [
        state[key] for key in ("cls_token", "cls_token_head", "cls_token_tail") if key in state
    ]
    if tokens:
        renamed["class_token"] = torch.cat(tokens, dim=1)
    return renamed
