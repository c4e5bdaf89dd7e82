"""ViTDet's DeiT (arXiv 2203.16527): attention inside windows, with a few global blocks.

The last map of a plain backbone only; the classifier is in deit.py, detectors in detection.py.
"""

import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from visionmamba.models.deit import DeiT, DeiTConfig


class WindowedDeiT(DeiT):
    """A DeiT for dense prediction: no class token, no final norm, attention in windows.

    The names of its parameters are those of DeiT. What ViTDet's has besides and this one has not
    are relative positions.

    Args:
        config: of the DeiT; its number of classes is of no effect.
        window_size: side of a window in patches; None makes all blocks global.
        num_global: blocks with global attention, the last of each equal part of the depth.

    Raises:
        ValueError: more global blocks than blocks.
    """

    def __init__(
        self, config: DeiTConfig, *, window_size: int | None = None, num_global: int = 4
    ) -> None:
        super().__init__(config, block=WindowBlock)
        if window_size is not None and not 0 < num_global <= config.depth:
            raise ValueError(
                f"of {config.depth} blocks between 1 and {config.depth} can be global; "
                f"got {num_global}"
            )
        self.cls_token = None
        self.num_prefix_tokens = 0
        assert self.pos_embed is not None
        self.pos_embed = nn.Parameter(self.pos_embed.detach()[:, 1:].clone())
        self.norm, self.head = nn.Identity(), nn.Identity()
        self.window_size = window_size
        self.global_blocks = tuple(
            config.depth * (i + 1) // num_global - 1 for i in range(num_global)
        )

    def last_map(self, images: Tensor) -> Tensor:
        """Return the residual stream after the last block, (B, D, h, w).

        Args:
            images: (B, in_channels, H, W) whose sides are multiples of the patch size.
        """
        patches = self.patch_embed(images)  # (B, h, w, D)
        batch, height, width, d_model = patches.shape
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(patches)))
        for i, block in enumerate(self.blocks):
            window_size = None if i in self.global_blocks else self.window_size
            tokens = block(tokens, window_size=window_size, grid=(height, width))
        last: Tensor = tokens.transpose(1, 2).reshape(batch, d_model, height, width)
        return last


class WindowBlock(Block):
    """timm's block, whose attention can be confined to windows of a map."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        window_size: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the tokens (B, L, D) after the block.

        Args:
            x: the tokens.
            attn_mask, is_causal: of global attention, as timm takes them.
            window_size: side of a window; None is global attention.
            grid: (height, width) of the map that the tokens are, row after row.
        """
        if window_size is None or grid is None:
            causal = (True,) if is_causal else ()  # older timm knows no such argument
            return super().forward(x, attn_mask, *causal)
        normed = self.norm1(x).unflatten(1, grid)
        attended = attend_in_windows(self.attn, normed, window_size).flatten(1, 2)
        x = x + self.drop_path1(self.ls1(attended))
        tokens: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return tokens


def attend_in_windows(attention: nn.Module, x: Tensor, size: int) -> Tensor:
    """Return attention (B, h, w, D) among the tokens of each window of a map (B, h, w, D).

    As in ViTDet, a map that the windows do not divide is padded with zeros below and to the right,
    and these take part.

    Args:
        attention: maps (B, L, D) to (B, L, D).
        x: the map.
        size: side of a window.
    """
    batch, height, width, d_model = x.shape
    down, right = -height % size, -width % size
    x = F.pad(x, (0, 0, 0, right, 0, down))
    rows, columns = (height + down) // size, (width + right) // size
    windows = x.reshape(batch, rows, size, columns, size, d_model).transpose(2, 3)
    attended: Tensor = attention(windows.reshape(-1, size * size, d_model))
    attended = attended.reshape(batch, rows, columns, size, size, d_model).transpose(2, 3)
    return attended.reshape(batch, rows * size, columns * size, d_model)[:, :height, :width]
