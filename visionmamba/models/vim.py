"""Vim: a plain sequential vision backbone of bidirectional selective state-space blocks.

The file to read first. Not here: configuration (config.py), the mixer (mixer.py), patches and
positions (embed.py), files (weights.py), the Hub (pretrained.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visionmamba.models.config import FeatureKind, Norm, VimConfig, kind_of_each
from visionmamba.models.embed import (
    PatchEmbedding,
    PositionEmbedding,
    class_token_positions,
    insert_tokens,
    num_class_tokens,
    rotate_tokens,
    split_tokens,
)
from visionmamba.models.mixer import BidirectionalMixer
from visionmamba.models.pretrained import Pretrained
from visionmamba.ops import rms_norm


class SequenceLayout(NamedTuple):
    """Where the patches and the class tokens of a sequence are."""

    grid: tuple[int, int]
    """Rows and columns of patches (h, w)."""
    positions: tuple[int, ...]
    """Where the class tokens (or registers) stand, ascending."""
    flipped: bool = False
    """Whether the sequence runs from the picture's last token to its first."""


class ResidualNorm(nn.Module):
    """Add a branch to the float32 residual stream and normalise the sum, in one pass.

    Args:
        d_model: width D.
        kind: "rmsnorm" or "layernorm".
        eps: added to the mean square or variance.
    """

    def __init__(self, d_model: int, *, kind: Norm = "rmsnorm", eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if kind == "layernorm" else None

    def forward(self, branch: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the norm (B, L, D) in the branch's dtype and the new residual in float32."""
        if residual is None:
            wide = torch.promote_types(branch.dtype, torch.float32)
            residual = branch.to(wide)
            if self.bias is None:
                return rms_norm(branch, self.weight, eps=self.eps), residual
        elif self.bias is None:
            return rms_norm(branch, self.weight, eps=self.eps, residual=residual)
        else:
            residual = residual + branch
        normed = F.layer_norm(
            residual,
            self.weight.shape,
            self.weight.to(residual.dtype),
            self.bias.to(residual.dtype),
            self.eps,
        )
        return normed.to(branch.dtype), residual


class RegisterReadout(nn.Module):
    """Turn registers into what the classifier reads, as Mamba-Reg does (arXiv 2405.14858).

    One linear layer without bias reduces each register to D / R values; these are concatenated, the
    first register's first, and, as in its published code, normalised together.

    Args:
        config: of the Vim, with readout "registers".
    """

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        width = config.d_model
        self.reduction = nn.Linear(width, width // config.num_registers, bias=False)
        self.norm = ResidualNorm(width, kind=config.norm, eps=config.norm_eps)
        nn.init.trunc_normal_(self.reduction.weight, std=0.02)

    def forward(self, registers: Tensor) -> Tensor:
        """Return (B, D) for registers after the final norm, in the picture's own order."""
        normed: Tensor = self.norm(self.reduction(registers).flatten(1))[0]
        return normed


class VimBlock(nn.Module):
    """Add, norm, mix: the block of Vim, with the residual stream carried beside the branch.

    `branch, residual = block(branch, residual)`; the block's own output is still to be added:
    the stream after it is `residual + branch`. Feed the tokens themselves to the first block.

    Args:
        mixer: maps (B, L, D) to (B, L, D), e.g. a BidirectionalMixer.
        d_model: width D.
        norm, norm_eps: as in VimConfig.
        drop_path: rate at which the incoming branch of a sample is dropped.
    """

    def __init__(
        self,
        mixer: nn.Module,
        d_model: int,
        *,
        norm: Norm = "rmsnorm",
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = ResidualNorm(d_model, kind=norm, eps=norm_eps)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, branch: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mixer's output (B, L, D) and the residual stream before it, float32."""
        if residual is not None:
            branch = self.drop_path(branch)
        normed, residual = self.norm(branch, residual)
        return self.mixer(normed), residual


class Vim(Pretrained):
    """Vision Mamba (arXiv 2401.09417): patches, a class token, blocks, a norm, a linear head.

    Args:
        config: all options; `Vim(VimConfig.tiny(num_classes=10))`.
    """

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        if not isinstance(config, VimConfig):
            raise TypeError(
                f"Vim takes a VimConfig, e.g. VimConfig.tiny(); got {type(config).__name__}"
            )
        self.config = config
        self.activation_checkpointing = config.activation_checkpointing
        width = config.d_model
        self.patch_embedding = PatchEmbedding(
            config.in_channels,
            width,
            patch_size=config.patch_size,
            stride=config.resolved_stride,
            partial_patches=config.partial_patches,
        )
        native_grid = self.patch_embedding.grid(*config.resolved_image_size)
        num_tokens = num_class_tokens(config)
        self.class_token = nn.Parameter(torch.empty(1, num_tokens, width)) if num_tokens else None
        self.position_embedding = (
            PositionEmbedding(native_grid, config)
            if config.position_embedding == "learned"
            else None
        )
        self.dropout = nn.Dropout(config.dropout)
        last = max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(
            VimBlock(
                BidirectionalMixer(
                    width,
                    d_state=config.d_state,
                    d_conv=config.d_conv,
                    expand=config.expand,
                    dt_rank=config.resolved_dt_rank,
                    kind=config.mixer_kind,
                    halve_directions=config.halve_directions,
                    layer_scale=config.layer_scale,
                    initialization=config.initialization,
                    num_layers=config.depth,
                ),
                width,
                norm=config.norm,
                norm_eps=config.norm_eps,
                # a block drops the branch that comes in, so the rate is its predecessor's
                drop_path=config.drop_path * max(i - 1, 0) / last,
            )
            for i in range(config.depth)
        )
        self.drop_path = DropPath(config.drop_path) if config.drop_path > 0 else nn.Identity()
        self.norm = ResidualNorm(width, kind=config.norm, eps=config.norm_eps)
        self.register_readout = RegisterReadout(config) if config.readout == "registers" else None
        self.head: nn.Linear | nn.Identity = nn.Identity()
        if config.num_classes:
            self.head = make_head(width, config.num_classes)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 without one."""
        return self.config.num_classes

    @property
    def blocks_per_step(self) -> int:
        """Blocks that run from one input: the pair of bidirectional "layer", else one."""
        return 2 if self.config.bidirectional == "layer" else 1

    @property
    def flips_at_random(self) -> bool:
        """Whether a forward may read the sequence from its end, by chance."""
        config = self.config
        return config.bidirectional == "sequence" and config.sequence_flip_probability > 0

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for pictures (B, in_channels, H, W) of any size.

        Without a head (num_classes 0) returns what it would read, (B, d_model).

        Raises:
            ValueError: shape or dtype of the pictures is not what the model takes.
        """
        tokens, layout = self._normed_tokens(images)
        return self._read_out(tokens, layout)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return all tokens (B, L, D) after the final norm, class tokens at their places."""
        return self._normed_tokens(images)[0]

    def features(
        self,
        images: Tensor,
        layers: Sequence[int],
        *,
        kind: FeatureKind | Sequence[FeatureKind] = "residual",
    ) -> list[Tensor]:
        """Return maps (B, D, h, w) after the zero-based blocks `layers`, without class tokens.

        Registers are class tokens here: they are taken out, too.

        Args:
            images: (B, in_channels, H, W).
            layers: blocks, in any order; one map each, in the same order.
            kind: "residual": the stream with the block's output added; "normed": that after the
                final norm; "mixer": the block's output alone. One for all maps, or one for each.

        Raises:
            ValueError: a block that does not exist or, with bidirectional "layer", is the first of
                a pair; an unknown kind, or another number of kinds than of layers.
        """
        kinds = kind_of_each(kind, layers)
        step = self.blocks_per_step
        valid = range(step - 1, len(self.blocks), step)
        wrong = [layer for layer in layers if layer not in valid]
        if wrong:
            raise ValueError(
                f"layers must be among {list(valid)}; got {', '.join(map(str, wrong))}"
            )
        branch, layout = self._embed(images)
        residual: Tensor | None = None
        maps: dict[tuple[int, FeatureKind], Tensor] = {}
        wanted = list(zip(layers, kinds, strict=True))
        for layer in range(step - 1, max(layers, default=-1) + 1, step):
            branch, residual = self._run_step(layer // step, branch, residual, layout)
            for each in dict.fromkeys(wanted):
                if each[0] == layer:
                    maps[each] = self._to_map(branch, residual, layout, each[1])
        return [maps[each] for each in wanted]

    def no_weight_decay(self, *, published: bool = True) -> set[str]:
        """Return names of parameters that get no weight decay, besides biases and 1-D ones.

        Args:
            published: as the authors train: position embedding and class tokens. False adds A_log,
                which they meant to exempt but decay.
        """
        names = {"class_token", "position_embedding.weight"}
        if not published:
            names |= {name for name, _ in self.named_parameters() if name.endswith("A_log")}
        return names & {name for name, _ in self.named_parameters()}

    def _normed_tokens(self, images: Tensor) -> tuple[Tensor, SequenceLayout]:
        branch, layout = self._embed(images)
        residual: Tensor | None = None
        for step in range(len(self.blocks) // self.blocks_per_step):
            branch, residual = self._run_step(step, branch, residual, layout)
        normed, _ = self.norm(self.drop_path(branch), residual)
        return normed, layout

    def _embed(self, images: Tensor) -> tuple[Tensor, SequenceLayout]:
        patches, grid = self.patch_embedding(images)
        positions = class_token_positions(self.config, patches.shape[1])
        tokens = patches
        if self.class_token is not None:
            tokens = insert_tokens(patches, self.class_token.to(patches.dtype), positions)
        if self.position_embedding is not None:
            tokens = tokens + self.position_embedding(grid).to(tokens.dtype)
            tokens = self.dropout(tokens)
        if self.config.bidirectional != "sequence":
            return tokens, SequenceLayout(grid, positions)
        if torch.rand(()).item() >= self.config.sequence_flip_probability:
            return tokens, SequenceLayout(grid, positions)
        # class tokens are read where they stand after the flip; the published code reads their
        # unflipped index, another token unless the sequence is symmetric around it
        flipped_positions = mirror_positions(positions, tokens.shape[1])
        return tokens.flip(1), SequenceLayout(grid, flipped_positions, flipped=True)

    def _run_step(
        self, step: int, branch: Tensor, residual: Tensor | None, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor]:
        first = step * self.blocks_per_step
        blocks = [self.blocks[first + i] for i in range(self.blocks_per_step)]
        recompute = self.activation_checkpointing
        return run_blocks(blocks, branch, residual, layout, self.config, recompute=recompute)

    def _read_out(self, tokens: Tensor, layout: SequenceLayout) -> Tensor:
        """Return logits from normed tokens (B, L, D)."""
        readout, positions = self.config.readout, layout.positions
        if readout == "max":  # published: the head sees every token, then the maximum
            per_token: Tensor = self.head(tokens)
            return per_token.amax(dim=1)
        if readout == "mean":
            read = tokens.mean(dim=1)
        elif self.register_readout is not None:
            in_order = positions[::-1] if layout.flipped else positions
            registers = torch.stack([tokens[:, position] for position in in_order], dim=1)
            read = self.register_readout(registers)
        elif readout == "last":
            read = tokens[:, -1]
        elif readout == "double":
            read = (tokens[:, positions[0]] + tokens[:, positions[1]]) / 2
        else:
            read = tokens[:, positions[0]]
        logits: Tensor = self.head(read)
        return logits

    def _to_map(
        self, branch: Tensor, residual: Tensor, layout: SequenceLayout, kind: FeatureKind
    ) -> Tensor:
        if kind == "mixer":
            sequence = branch.clone()  # an optimized block writes over what it is given
        elif kind == "residual":
            sequence = residual + branch
        else:
            sequence, _ = self.norm(branch, residual)
        return sequence_to_map(sequence, layout)


def make_head(d_model: int, num_classes: int) -> nn.Linear:
    """Return a linear classifier, initialised as published."""
    head = nn.Linear(d_model, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def run_blocks(
    blocks: Sequence[nn.Module],
    branch: Tensor,
    residual: Tensor | None,
    layout: SequenceLayout,
    config: VimConfig,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one block, or the pair of bidirectional "layer", and the rotation that comes before.

    Args:
        blocks: one VimBlock, or a pair that reads the same input from both ends.
        branch, residual: as VimBlock takes and returns them.
        layout: of both.
        config: of the model that the blocks belong to.
        recompute: keep no activations inside the blocks for the backward pass.
    """
    if config.rope != "none":
        branch = _rotate(branch, layout, config)
        if config.rope == "tokens+residual" and residual is not None:
            residual = _rotate(residual, layout, config)
    ahead = _run_block(blocks[0], branch, residual, recompute)
    if len(blocks) == 1:
        return ahead
    reversed_residual = None if residual is None else residual.flip(1)
    back = _run_block(blocks[1], branch.flip(1), reversed_residual, recompute)
    return ahead[0] + back[0].flip(1), ahead[1] + back[1].flip(1)


def sequence_to_map(sequence: Tensor, layout: SequenceLayout) -> Tensor:
    """Return the patches of a sequence (B, L, D) as a map (B, D, h, w)."""
    patches, _ = split_tokens(sequence, layout.positions)
    if layout.flipped:
        patches = patches.flip(1)
    return patches.transpose(1, 2).reshape(len(patches), -1, *layout.grid)


def mirror_positions(positions: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Return where class tokens stand when a sequence of `length` tokens is flipped, ascending."""
    return tuple(length - 1 - position for position in reversed(positions))


def _run_block(
    block: nn.Module, branch: Tensor, residual: Tensor | None, recompute: bool
) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor]
    if recompute and torch.is_grad_enabled():
        is_random = isinstance(block, VimBlock) and isinstance(block.drop_path, DropPath)
        out = checkpoint(block, branch, residual, use_reentrant=False, preserve_rng_state=is_random)
    else:
        out = block(branch, residual)
    return out


def _rotate(sequence: Tensor, layout: SequenceLayout, config: VimConfig) -> Tensor:
    positions = layout.positions
    if layout.flipped:  # angles belong to the picture's own order
        sequence = sequence.flip(1)
        positions = mirror_positions(positions, sequence.shape[1])
    rotated = rotate_tokens(
        sequence,
        layout.grid,
        positions,
        layout=config.rope_layout,
        reference_grid=config.rope_reference_grid,
    )
    return rotated.flip(1) if layout.flipped else rotated
