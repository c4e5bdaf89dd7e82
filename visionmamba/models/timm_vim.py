"""Vim behind timm's model interface.

Class tokens come first in every sequence returned here, as timm has them; inside the model they
stay where the read-out wants them. Not here: names and addresses of weights (timm.py), stages for
timm's feature nets (timm_stages.py).
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from inspect import signature
from typing import Any, Literal, Unpack, get_args, get_type_hints

import torch
from timm.layers.pool1d import global_pool_nlc
from timm.models import register_notrace_module
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn

from visionmamba.models import load_published
from visionmamba.models.config import VimConfig, VimInnerOptions, refuse_unknown_options
from visionmamba.models.embed import (
    PatchEmbedding,
    PositionEmbedding,
    num_class_tokens,
    split_tokens,
)
from visionmamba.models.mixer import BidirectionalMixer
from visionmamba.models.vim import ResidualNorm, SequenceLayout, Vim, make_head

GlobalPool = Literal["token", "avg", "avgmax", "max", ""]
OutputFormat = Literal["NCHW", "NLC"]
Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]

# what looks at shapes, dtypes or devices stays whole in a graph that torch.fx traces
for one in (PatchEmbedding, PositionEmbedding, ResidualNorm, BidirectionalMixer):
    register_notrace_module(one)


class TimmVim(Vim):
    """A Vim with timm's methods and conventions; what timm.create_model returns.

    Tensors and their names in the state_dict are a Vim's, and so are the logits.

    Args:
        config: all options, with a read-out of class tokens or the mean of all tokens.
        global_pool: what the classifier reads: the class tokens' mean or what their read-out makes
            of registers, a pool over the patches (not beside registers), or every token (""); None
            follows the read-out.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self, config: VimConfig, *, global_pool: GlobalPool | None = None, drop_rate: float = 0.0
    ) -> None:
        super().__init__(config)
        if config.readout in ("max", "last"):
            raise ValueError(
                f"timm has no counterpart of readout {config.readout!r}; use 'middle', 'head', "
                "'double' or 'mean', or visionmamba.Vim"
            )
        self.embed_dim = self.num_features = self.head_hidden_size = config.d_model
        self.num_prefix_tokens = num_class_tokens(config)
        self.has_class_token = self.num_prefix_tokens > 0
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {
                "module": f"blocks.{last}",
                "num_chs": config.d_model,
                "reduction": config.resolved_stride,
            }
            for last in range(self.blocks_per_step - 1, config.depth, self.blocks_per_step)
        ]
        self.global_pool: GlobalPool = "token" if self.has_class_token else "avg"
        if global_pool is not None:
            self._set_global_pool(global_pool)

    @property
    def in_chans(self) -> int:
        """Channels of the pictures."""
        return self.config.in_channels

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for pictures (B, in_chans, H, W) of any size.

        Without a classifier returns what it would read, (B, D); without global pool one row for
        every token.

        Raises:
            ValueError: shape or dtype of the pictures is not what the model takes.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return all tokens (B, num_prefix_tokens + h * w, D) after the final norm.

        Class tokens come first, then the patches row by row.
        """
        tokens, layout = self._normed_tokens(images)
        return _class_tokens_first(tokens, layout)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits for what forward_features returns.

        Args:
            tokens: (B, num_prefix_tokens + h * w, D).
            pre_logits: return what the classifier would read instead.
        """
        if self.register_readout is not None and self.global_pool == "token":
            tokens = self.register_readout(tokens[:, : self.num_prefix_tokens])
        elif self.global_pool == "token":
            tokens = tokens[:, : self.num_prefix_tokens].mean(dim=1)
        else:
            tokens = global_pool_nlc(tokens, self.global_pool, self.num_prefix_tokens)
        tokens = self.head_drop(tokens)
        return tokens if pre_logits else self.head(tokens)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: OutputFormat = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Intermediates | tuple[Tensor, Intermediates] | dict[str, Any]:
        """Return the residual stream after some blocks, and the output of forward_features.

        Args:
            images: (B, in_chans, H, W).
            indices: entries of feature_info, from the end where negative; a number n means the
                last n, None all.
            return_prefix_tokens: pair each map with its class tokens (B, num_prefix_tokens, D).
            norm: apply the final norm to each.
            stop_early: run no block after the last one wanted.
            output_fmt: "NCHW": maps (B, D, h, w); "NLC": the patches (B, h * w, D).
            intermediates_only: leave the output of forward_features out.
            output_dict: return a dictionary: "image_intermediates", "image_features" and
                "image_intermediates_prefix", the last two where asked for.

        Raises:
            ValueError: another output_fmt.
            AssertionError: an index that does not exist.
        """
        if output_fmt not in get_args(OutputFormat):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC'; got {output_fmt!r}")
        num_steps = len(self.blocks) // self.blocks_per_step
        wanted, last = feature_take_indices(num_steps, indices)  # type: ignore[arg-type]
        branch, layout = self._embed(images)
        dtype = self.patch_embedding.weight.dtype
        residual: Tensor | None = None
        taken: dict[int, tuple[Tensor, Tensor]] = {}
        for step in range(last + 1 if stop_early or intermediates_only else num_steps):
            branch, residual = self._run_step(step, branch, residual, layout)
            if step in wanted:
                stream = self.norm(branch, residual)[0] if norm else residual + branch
                taken[step] = _split(stream.to(dtype), layout)
        prefixes = [taken[step][0] for step in wanted]
        maps = [taken[step][1] for step in wanted]
        if output_fmt == "NCHW":
            maps = [one.transpose(1, 2).reshape(len(one), -1, *layout.grid) for one in maps]
        returns_prefix = return_prefix_tokens and self.has_class_token
        if output_dict:
            answer: dict[str, Any] = {"image_intermediates": maps}
            if returns_prefix:
                answer["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                answer["image_features"] = self._finish(branch, residual, layout)
            return answer
        intermediates: Intermediates = maps
        if returns_prefix:
            intermediates = list(zip(maps, prefixes, strict=True))
        if intermediates_only:
            return intermediates
        return self._finish(branch, residual, layout), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the blocks after the last one wanted and return `indices` counted from the start.

        Args:
            indices: as in forward_intermediates.
            prune_norm: remove the final norm.
            prune_head: remove the classifier, the pooling and a read-out of registers.
        """
        num_steps = len(self.blocks) // self.blocks_per_step
        wanted, last = feature_take_indices(num_steps, indices)  # type: ignore[arg-type]
        depth = (last + 1) * self.blocks_per_step
        self.blocks = self.blocks[:depth]
        self.config = replace(self.config, depth=depth)
        if prune_norm:
            self.add_module("norm", ResidualSum())
        if prune_head:
            self.reset_classifier(0, "")
            self.register_readout = None
        return list(wanted)

    def get_classifier(self) -> nn.Linear | nn.Identity:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the classifier by a fresh one, or by nothing where num_classes is 0.

        Args:
            num_classes: outputs.
            global_pool: as in the constructor; None keeps it.

        Raises:
            ValueError: a negative number of classes or an unknown pool.
        """
        self.config = replace(self.config, num_classes=num_classes)
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.head = nn.Identity()
        if num_classes:
            like = self.patch_embedding.weight
            self.head = make_head(self.embed_dim, num_classes).to(like.device, like.dtype)
        self.head.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names, from input to output, for layer-wise decay.

        Args:
            coarse: one group for all blocks instead of one for each.
        """
        blocks = r"^blocks" if coarse else r"^blocks\.(\d+)"
        return {
            # a group around it would become a part of the order
            "stem": r"^patch_embedding|^position_embedding|^class_token",
            "blocks": [(blocks, None), (r"^norm", MATCH_PREV_GROUP)],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations, or not."""
        self.activation_checkpointing = enable

    def load_pretrained(self, checkpoint_path: str | os.PathLike[str]) -> None:
        """Load a weights file, fitted to this model's classes, channels and picture size.

        Args:
            checkpoint_path: the authors' .pth, read through an allow-list, or a file of save.

        Raises:
            FileNotFoundError, ValueError: as Vim.from_pretrained.
        """
        fitted = Vim.from_pretrained(checkpoint_path, **_options(self.config))
        self.load_state_dict(fitted.state_dict())

    def _set_global_pool(self, global_pool: GlobalPool) -> None:
        choices: tuple[str, ...] = get_args(GlobalPool)
        if self.register_readout is not None:
            choices = ("token", "")
        elif not self.has_class_token or self.config.readout == "registers":
            choices = ("avg", "avgmax", "max", "")
        if global_pool not in choices:
            raise ValueError(
                f"global_pool must be one of {', '.join(map(repr, choices))} with readout "
                f"{self.config.readout!r}; got {global_pool!r}"
            )
        self.global_pool = global_pool

    def _finish(self, branch: Tensor, residual: Tensor | None, layout: SequenceLayout) -> Tensor:
        normed, _ = self.norm(self.drop_path(branch), residual)
        return _class_tokens_first(normed, layout)


class ResidualSum(nn.Module):
    """What stands in for a norm that was pruned: the residual stream itself."""

    def forward(self, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + branch
        return total.to(branch.dtype), total


def build_vim(
    *,
    img_size: int | Sequence[int] = 224,
    patch_size: int = 16,
    stride: int | None = None,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: GlobalPool | None = None,
    embed_dim: int = 192,
    depth: int = 24,
    drop_rate: float = 0.0,
    pos_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options: Unpack[VimInnerOptions],
) -> TimmVim:
    """Return a freshly initialised TimmVim for timm's names of options.

    Args:
        img_size, patch_size, stride, in_chans, num_classes, embed_dim, depth: image_size,
            patch_size, stride, in_channels, num_classes, d_model and depth of VimConfig.
        global_pool, drop_rate: as in TimmVim.
        pos_drop_rate, drop_path_rate: dropout and drop_path of VimConfig.
        device, dtype: of the parameters.
        options: further fields of VimConfig.

    Raises:
        TypeError: an unknown option; the message names the valid ones.
        ValueError: an option's value is wrong.
    """
    refuse_unknown_options("a Vim in timm", options, _OPTIONS)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    config = VimConfig(
        image_size=(height, width),
        patch_size=patch_size,
        stride=stride,
        in_channels=in_chans,
        num_classes=num_classes,
        d_model=embed_dim,
        depth=depth,
        dropout=pos_drop_rate,
        drop_path=drop_path_rate,
        **options,
    )
    with nullcontext() if device is None else torch.device(device):
        model = TimmVim(config, global_pool=global_pool, drop_rate=drop_rate)
    return model if dtype is None else model.to(dtype)


def adapt_weights(state_dict: Mapping[str, Tensor], model: TimmVim) -> dict[str, Tensor]:
    """Return a state_dict of ours or of the authors with our names and this model's positions.

    The patches' rows of a position embedding for another square grid are interpolated. Channels
    and classes are left to timm.
    """
    if "norm_f.weight" in state_dict:
        options = _options(model.config)
        del options["in_channels"], options["num_classes"]
        return load_published(state_dict, **options).state_dict()
    adapted, key = dict(state_dict), "position_embedding.weight"
    wanted = model.position_embedding
    if wanted is not None and key in adapted and adapted[key].shape != wanted.weight.shape:
        side = math.isqrt(adapted[key].shape[1] - model.num_prefix_tokens)
        held = PositionEmbedding((side, side), model.config)
        held.load_state_dict({"weight": adapted[key]})
        with torch.no_grad():
            adapted[key] = held(wanted.grid)
    return adapted


def spread_evenly(count: int, steps: int) -> tuple[int, ...]:
    """Return at most `count` of the indices 0..steps-1, the last of each equal share."""
    return tuple(sorted({max(steps * (i + 1) // count - 1, 0) for i in range(count)}))


def _options(config: VimConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _split(sequence: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """Return class tokens (B, n, D) and patches (B, h * w, D) in the picture's own order."""
    patches, tokens = split_tokens(sequence, layout.positions)
    return (tokens.flip(1), patches.flip(1)) if layout.flipped else (tokens, patches)


def _class_tokens_first(sequence: Tensor, layout: SequenceLayout) -> Tensor:
    return torch.cat(_split(sequence, layout), dim=1)


_OPTIONS = (
    *(name for name, one in signature(build_vim).parameters.items() if one.kind != one.VAR_KEYWORD),
    *get_type_hints(VimInnerOptions),
)
