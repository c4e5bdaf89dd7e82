"""Weights of one Vim fitted to another: classes, channels, picture size; and the report of it.

Knows this package's parameter names only. Reading files is in weights.py and published.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from visionmamba.models.config import VimConfig
from visionmamba.models.embed import (
    class_token_positions,
    insert_tokens,
    num_class_tokens,
    resize_grid,
    split_tokens,
)
from visionmamba.models.vim import Vim
from visionmamba.models.weights import load_strictly

Resize = Literal["grid", "published"]
Origin = Literal["given", "args", "shapes", "header", "assumed"]
Layout = tuple[tuple[int, int], tuple[int, ...]]
"""Grid of patches, and places of class tokens in the sequence."""

_ORIGIN_TITLES: tuple[tuple[Origin, str], ...] = (
    ("header", "said by the file"),
    ("shapes", "read off keys and shapes"),
    ("args", "said by the file's args"),
    ("given", "given"),
    ("assumed", "guessed, as in the released models"),
)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How weights became a model: where each option came from, what was changed, what was left."""

    source: str
    """File, or "the state_dict"."""
    options: Mapping[str, tuple[object, Origin]]
    """Value and origin of every option that was asked for."""
    changes: tuple[str, ...] = ()
    """What was made to fit, in words."""
    unused: tuple[str, ...] = ()
    """Entries of the file that no model needs."""
    notes: tuple[str, ...] = ()
    """What the file says that could not be used, in words."""

    @property
    def guessed(self) -> dict[str, object]:
        """Options that neither the caller nor the file tells."""
        return {
            name: value for name, (value, origin) in self.options.items() if origin == "assumed"
        }

    def __str__(self) -> str:
        lines = [self.source]
        for origin, title in _ORIGIN_TITLES:
            told = [f"{name}={value!r}" for name, (value, o) in self.options.items() if o == origin]
            lines += [f"  {title}: {', '.join(told)}"] if told else []
        lines += [f"  changed: {change}" for change in self.changes]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  not used: {', '.join(self.unused)}"] if self.unused else []
        return "\n".join(lines)


def patch_grid(config: VimConfig) -> tuple[int, int]:
    """Return rows and columns of patches at the configuration's own image size."""
    patch, stride = config.patch_size, config.resolved_stride
    rows, columns = (-(-(side - patch) // stride) + 1 for side in config.resolved_image_size)
    return rows, columns


def build_fitted(
    state: Mapping[str, Tensor],
    held: VimConfig,
    wanted: VimConfig,
    *,
    source_grid: tuple[int, int],
    resize: Resize,
    name: object,
) -> tuple[Vim, tuple[str, ...]]:
    """Return a model in evaluation mode with weights fitted to it, and what was changed, in words.

    A head for another number of classes is new, initialised as in training.

    Args:
        state: tensors by this package's names.
        held, wanted: what the weights are and what they shall be.
        source_grid: rows and columns of patches that the position embedding was learned for.
        resize: "grid" interpolates the patches' rows and puts the class tokens' rows back where the
            tokens stand; "published" is the authors' code, which takes the first row for the class
            token's: right for a token at the head only.
        name: of the weights, for messages.

    Raises:
        ValueError: the weights cannot be fitted; the message says where.
    """
    if resize not in get_args(Resize):
        raise ValueError(f"resize must be 'grid' or 'published'; got {resize!r}")
    _refuse_other_blocks(held, wanted)
    model = wanted.build()
    fitted, changes = dict(state), []
    if wanted.num_classes != held.num_classes:
        for key in ("head.weight", "head.bias"):
            fitted.pop(key, None)
        fitted |= {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
        changes.append(_head_change(held.num_classes, wanted.num_classes))
    if wanted.in_channels != held.in_channels:
        key = "patch_embedding.weight"
        fitted[key] = fit_channels(fitted[key], wanted.in_channels)
        changes.append(_channels_change(held.in_channels, wanted.in_channels))
    if not have_same_tokens(held, wanted):
        needed, found = _tokens_in_words(wanted), _tokens_in_words(held)
        if num_class_tokens(wanted):
            raise ValueError(
                f"readout {wanted.readout!r} needs {needed} and {name} holds {found}; take a "
                "readout without class token, or train one"
            )
        parts = ("class_token", "register_readout.")
        fitted = {key: t for key, t in fitted.items() if not key.startswith(parts)}
        what = found if held.readout == "registers" else "class token"
        changes.append(f"{what} dropped for readout {wanted.readout!r}")
    key = "position_embedding.weight"
    if key in fitted:
        old = source_grid, class_token_positions(held, math.prod(source_grid))
        grid = patch_grid(wanted)
        new = grid, class_token_positions(wanted, math.prod(grid))
        if old != new:
            fitted[key] = fit_positions(fitted[key], old, new, resize)
        if grid != source_grid:
            way = " in the authors' way" if resize == "published" else ""
            changes.append(f"position embedding resized{way} from {source_grid} to {grid} patches")
    load_strictly(model, fitted, name)
    return model.eval(), tuple(changes)


def have_same_tokens(one: VimConfig, other: VimConfig) -> bool:
    """Return whether the class tokens of one can be the other's, or its registers the other's."""
    return _tokens_in_words(one) == _tokens_in_words(other)


def fit_positions(rows: Tensor, old: Layout, new: Layout, resize: Resize = "grid") -> Tensor:
    """Return rows (1, L', D) for a layout from rows (1, L, D) for another; see build_fitted."""
    (old_grid, old_places), (new_grid, new_places) = old, new
    if resize == "published" and old_grid != new_grid:
        extra = rows[:, : len(new_places)]
        rest = rows[:, len(old_places) :]
        return torch.cat((extra, resize_grid(rest, old_grid, new_grid)), dim=1)
    patches, tokens = split_tokens(rows, old_places)
    if old_grid != new_grid:
        patches = resize_grid(patches, old_grid, new_grid)
    return insert_tokens(patches, tokens[:, : len(new_places)], new_places)


def fit_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Return filters (D, in_channels, p, p) from (D, C, p, p), as timm does.

    One channel gets the sum of all filters; more get them in turn, scaled to keep the response.
    """
    channels = weight.shape[1]
    if in_channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeats = -(-in_channels // channels)
    repeated = weight.float().repeat(1, repeats, 1, 1)[:, :in_channels]
    return (repeated * (channels / in_channels)).to(weight.dtype)


_FIXED: tuple[tuple[str, str], ...] = (  # option, and where its resolved value is
    ("patch_size", "patch_size"),
    ("d_model", "d_model"),
    ("depth", "depth"),
    ("d_state", "d_state"),
    ("d_conv", "d_conv"),
    ("expand", "expand"),
    ("dt_rank", "resolved_dt_rank"),
    ("bidirectional", "mixer_kind"),
    ("norm", "norm"),
    ("position_embedding", "position_embedding"),
)


def _refuse_other_blocks(source: VimConfig, target: VimConfig) -> None:
    for option, attribute in _FIXED:
        held, wanted = getattr(source, attribute), getattr(target, attribute)
        if held != wanted:
            raise ValueError(
                f"the weights have {option} {held!r}, which loading cannot change; got "
                f"{wanted!r}: leave {option} out, or train a model of your own"
            )
    if (source.layer_scale is None) != (target.layer_scale is None):
        held = "no layer scale" if source.layer_scale is None else "a layer scale"
        raise ValueError(
            f"the weights have {held}, which loading cannot change; got layer_scale "
            f"{target.layer_scale!r}: leave layer_scale out"
        )


def _tokens_in_words(config: VimConfig) -> str:
    what = "register(s)" if config.readout == "registers" else "class token(s)"
    return f"{num_class_tokens(config)} {what}"


def _head_change(old: int, new: int) -> str:
    if not new:
        return f"head of {old} classes dropped"
    if not old:
        return f"new head of {new} classes, to be trained: the weights hold none"
    return f"head of {old} classes replaced by a new one of {new}, to be trained"


def _channels_change(old: int, new: int) -> str:
    how = "summed" if new == 1 else "repeated and scaled"
    return f"patch filters of {old} channels {how} for {new}"
