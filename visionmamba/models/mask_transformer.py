"""The decoder of Segmenter (arXiv 2105.05633): patches and class tokens attend to each other.

The head of the ablation of directions in the Vim paper (table 4), there with two layers.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

_HEAD_WIDTH = 64


class MaskTransformer(nn.Module):
    """Score every patch by its likeness to a token of each class, after joint self-attention.

    Args:
        in_channels: channels of the map that comes in.
        channels: width of the tokens.
        num_classes: classes K, each with a token.
        depth: layers of attention and MLP.
        dropout: inside attention's output and the MLPs.
    """

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, *, depth: int = 2, dropout: float
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(in_channels, channels)
        self.class_tokens = nn.Parameter(torch.empty(1, num_classes, channels))
        self.layers = nn.ModuleList(
            Block(channels, _num_heads(channels), qkv_bias=True, proj_drop=dropout)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(channels)
        self.patch_projection = nn.Linear(channels, channels, bias=False)
        self.class_projection = nn.Linear(channels, channels, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.class_tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for projection in (self.patch_projection, self.class_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Return scores (B, K, h, w) for a map (B, in_channels, h, w)."""
        batch, _, height, width = features.shape
        patches = self.projection(features.flatten(2).transpose(1, 2))  # (B, L, channels)
        num_patches = patches.shape[1]
        classes = self.class_tokens.to(patches.dtype).expand(batch, -1, -1)
        tokens = torch.cat((patches, classes), dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.norm(tokens)
        patches = F.normalize(self.patch_projection(tokens[:, :num_patches]), dim=-1)
        classes = F.normalize(self.class_projection(tokens[:, num_patches:]), dim=-1)
        scores: Tensor = self.mask_norm(patches @ classes.transpose(1, 2))  # (B, L, K)
        return scores.transpose(1, 2).reshape(batch, -1, height, width)

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters that get no weight decay, besides biases and 1-D ones."""
        return {"class_tokens"}


def _num_heads(channels: int) -> int:
    """Return how many heads of about 64 channels divide the width."""
    return next(n for n in range(max(channels // _HEAD_WIDTH, 1), 0, -1) if channels % n == 0)
