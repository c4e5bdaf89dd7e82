"""Feature pyramids: a plain backbone, whose maps all have one stride, gives strides 4, 8, 16, 32.

Two designs: the one of segmentation heads, which rescales maps of four depths, and the simple
pyramid of ViTDet (arXiv 2203.16527), which makes all levels from the last map. No heads here.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmamba.models.config import VimConfig
from visionmamba.models.deit import DeiT, DeiTConfig
from visionmamba.models.vim import Vim

PyramidKind = Literal["segmentation", "detection"]

STRIDES_PX = (4, 8, 16, 32)


class OverBackbone:
    """What the configuration of a model over a backbone says of the backbone."""

    backbone: VimConfig | DeiTConfig

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side or (height, width) in pixels that the position embedding is learned for."""
        return self.backbone.image_size

    @property
    def in_channels(self) -> int:
        """Channels of the pictures."""
        return self.backbone.in_channels

    @property
    def d_model(self) -> int:
        """Channels of the backbone's maps."""
        return self.backbone.d_model

    @property
    def stride(self) -> int:
        """Pixels from one patch of the backbone to the next."""
        return stride_of(self.backbone)


class FeaturePyramid(nn.Module):
    """Make maps at strides 4, 8, 16 and 32 from maps at stride 16, or at 8 or 4.

    Args:
        d_model: channels D of the backbone's maps.
        kind: "segmentation": four maps in, from shallow to deep, each rescaled to its level, D
            channels out; "detection": one map in, rescaled to all levels, then a 1x1 and a 3x3
            convolution, each with a norm over channels.
        out_channels: channels of the levels of a "detection" pyramid.
        stride: of the maps that come in, in pixels; a "detection" pyramid takes 16 only.

    Raises:
        ValueError: another stride.
    """

    def __init__(
        self,
        d_model: int,
        *,
        kind: PyramidKind = "detection",
        out_channels: int = 256,
        stride: int = 16,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.num_inputs = len(STRIDES_PX) if kind == "segmentation" else 1
        self.out_channels = d_model if kind == "segmentation" else out_channels
        strides = (4, 8, 16) if kind == "segmentation" else (16,)
        if stride not in strides:
            raise ValueError(
                f"a {kind} pyramid takes maps at stride {' or '.join(map(str, strides))}; got "
                f"{stride}: choose patches of another size"
            )
        if kind == "segmentation":
            levels = [_rescale(d_model, stride, level) for level in STRIDES_PX]
        else:
            levels = _detection_levels(d_model, out_channels)
        self.levels = nn.ModuleList(levels)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return four levels (B, C, h, w), from stride 4 to stride 32.

        Sides that come in at stride 16 become 4h, 2h, h and h/2, rounded down.

        Args:
            maps: `num_inputs` maps (B, D, h, w).

        Raises:
            ValueError: another number of maps.
        """
        if len(maps) != self.num_inputs:
            raise ValueError(
                f"a {self.kind} pyramid takes {self.num_inputs} maps, got {len(maps)}; give the "
                "backbone as many layers"
            )
        sources = maps if self.num_inputs > 1 else [maps[0]] * len(self.levels)
        return tuple(level(source) for level, source in zip(self.levels, sources, strict=True))


class PyramidBackbone(nn.Module):
    """A Vim or DeiT with a feature pyramid on top; pictures in, maps of four strides out.

    Args:
        backbone: its patches are 16 pixels wide, or the strides are others.
        kind, out_channels: as in FeaturePyramid. "segmentation" reads the residual stream after
            every quarter of the blocks, "detection" that after the last.
    """

    def __init__(
        self, backbone: Vim | DeiT, *, kind: PyramidKind = "detection", out_channels: int = 256
    ) -> None:
        super().__init__()
        self.backbone = backbone
        d_model = backbone.config.d_model
        self.pyramid = FeaturePyramid(d_model, kind=kind, out_channels=out_channels)
        self.layers = layers_of_levels(backbone, self.pyramid.num_inputs)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of the pyramid for pictures (B, 3, H, W).

        Raises:
            ValueError: the backbone does not take the pictures.
        """
        maps = self.backbone.features(images, self.layers)
        levels: tuple[Tensor, ...] = self.pyramid([one.to(images.dtype) for one in maps])
        return levels


def stride_of(config: VimConfig | DeiTConfig) -> int:
    """Return the pixels from one patch of a backbone to the next."""
    return config.resolved_stride


def layers_of_levels(backbone: Vim | DeiT, count: int) -> list[int]:
    """Return `count` blocks, the last of each equal part of the depth; some twice when few.

    With bidirectional "layer" each is the second of a pair.
    """
    step = backbone.blocks_per_step if isinstance(backbone, Vim) else 1
    num_steps = len(backbone.blocks) // step
    return [max(num_steps * (i + 1) // count, 1) * step - 1 for i in range(count)]


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every pixel of a map (B, C, h, w)."""

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed map in the same dtype, under autocast too."""
        channels_last = x.permute(0, 2, 3, 1)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # which would make it float32
            normed = F.layer_norm(channels_last, weight.shape, weight, bias, self.eps)
        return normed.permute(0, 3, 1, 2)


def _double(channels_in: int, channels_out: int) -> nn.Module:
    return nn.ConvTranspose2d(channels_in, channels_out, kernel_size=2, stride=2)


def _rescale(d_model: int, stride: int, level: int) -> nn.Module:
    """Return what takes a map from one stride to another, as the published segmentation does."""
    if stride == 4 * level:
        norm, activation = nn.BatchNorm2d(d_model), nn.GELU()
        return nn.Sequential(_double(d_model, d_model), norm, activation, _double(d_model, d_model))
    if stride == 2 * level:
        return _double(d_model, d_model)
    return nn.Identity() if stride == level else nn.MaxPool2d(level // stride)


def _detection_levels(d_model: int, out_channels: int) -> list[nn.Module]:
    half, quarter = d_model // 2, d_model // 4
    quadruple = (_double(d_model, half), ChannelNorm(half), nn.GELU(), _double(half, quarter))
    scales: tuple[tuple[tuple[nn.Module, ...], int], ...] = (
        (quadruple, quarter),
        ((_double(d_model, half),), half),
        ((), d_model),
        ((nn.MaxPool2d(2),), d_model),
    )
    return [
        nn.Sequential(
            *rescale,
            nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
            ChannelNorm(out_channels),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            ChannelNorm(out_channels),
        )
        for rescale, channels in scales
    ]
