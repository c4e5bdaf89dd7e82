"""Semantic segmenters: a Vim or a DeiT, a feature pyramid, and a head that scores every pixel.

SegmenterConfig and SegmentationModel. Not here: weights of other models to start from
(start.py), files (weights.py), the same backbone for transformers' own models (transformers.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from visionmamba.models.config import FeatureKind, VimConfig, names_valid_options
from visionmamba.models.deit import DeiT, DeiTConfig
from visionmamba.models.mask_transformer import MaskTransformer
from visionmamba.models.pyramid import (
    STRIDES_PX,
    FeaturePyramid,
    OverBackbone,
    layers_of_levels,
    stride_of,
)
from visionmamba.models.upsample import upsample
from visionmamba.models.vim import Vim

if TYPE_CHECKING:
    from visionmamba.models.weights import WeightsHeader

SegmentationHead = Literal["upernet", "segmenter"]

_AUXILIARY_LEVEL = 2  # the map at stride 16


@names_valid_options
@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(OverBackbone):
    """Everything that defines a segmenter; `build()` or `SegmentationModel(config)` makes it.

    The defaults are the published segmentation with UperNet. A wrong option raises TypeError, a
    wrong value ValueError, both naming the valid ones.
    """

    backbone: VimConfig | DeiTConfig
    """What reads the picture. Its classifier is left out: num_classes becomes 0."""
    num_classes: int
    """Classes K of a pixel."""
    head: SegmentationHead = "upernet"
    """"upernet": UperNet on four depths of the backbone at strides 4, 8, 16 and 32 (needs
    visionmamba[segmentation]); "segmenter": the mask transformer of Segmenter on the last one."""
    features: FeatureKind = "residual"
    """What is read after a block: the residual stream with the block's output added (published
    use_residual_as_feature, where stochastic depth may drop that output from the map as well),
    "mixer" that output alone (what the published script of Vim-Ti reads; a DeiT has none), "normed"
    the stream after the final norm."""
    last_features: FeatureKind | None = None
    """The same for the last map; None takes `features`. The published last_layer_process "none",
    "add" and "add & norm" are "mixer", "residual" and "normed"."""
    channels: int | None = None
    """Width of the head; None takes the backbone's, as published."""
    auxiliary_channels: int = 256
    """Width of the second, convolutional head that UperNet trains with, on the map at stride 16; 0
    leaves it out. The mask transformer has none."""
    dropout: float = 0.1
    """Share of channels dropped before UperNet's classifiers, or of activations inside the mask
    transformer, in training."""
    head_depth: int = 2
    """Layers of the mask transformer."""

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, VimConfig | DeiTConfig):
            raise TypeError(
                "backbone must be a VimConfig or a DeiTConfig, e.g. VimConfig.tiny(); got "
                f"{type(self.backbone).__name__}"
            )
        object.__setattr__(self, "backbone", replace(self.backbone, num_classes=0))
        for name, least in (("num_classes", 1), ("auxiliary_channels", 0), ("head_depth", 1)):
            _check_int(name, getattr(self, name), least)
        if self.channels is not None:
            _check_int("channels", self.channels, 1)
        if self.head not in get_args(SegmentationHead):
            raise ValueError(f"head must be 'upernet' or 'segmenter'; got {self.head!r}")
        kinds = get_args(FeatureKind)
        for name in ("features", "last_features"):
            kind = getattr(self, name)
            if kind not in kinds and (kind is not None or name == "features"):
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, kinds))}; got {kind!r}"
                )
            if kind == "mixer" and isinstance(self.backbone, DeiTConfig):
                raise ValueError(
                    f'{name} "mixer" is for a Vim; with a DeiT choose "residual" or "normed"'
                )
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {self.dropout!r}")
        if self.head == "upernet" and self.stride not in (4, 8, 16):
            raise ValueError(
                f"UperNet needs patches at stride 4, 8 or 16 px; got {self.stride}: choose another "
                'stride, or head="segmenter"'
            )
        patch = self.backbone.patch_size
        if self.stride > patch:
            raise ValueError(
                f"patches of {patch} px at stride {self.stride} leave pixels out; choose a stride "
                f"up to {patch}"
            )

    def build(self) -> "SegmentationModel":
        """Return a freshly initialised model.

        Raises:
            ImportError: head is "upernet" and transformers is not installed.
        """
        return SegmentationModel(self)


class SegmentationModel(nn.Module):
    """Pictures in, a score for every class at every pixel out.

    Has no parameter without a gradient: what the maps do not need of the backbone, its classifier
    and mostly its final norm, is left out. UperNet on Vim-Ti with 150 classes has 12,900,908
    parameters at an image_size of 1024; the published logs say 12,901,100, which is this and the
    192 of a final norm that is never run, on DeiT-Ti 11,663,892, which is 11,470,508 of this model
    and 193,384 of a final norm (384) and an ImageNet classifier (193,000) that are never run. Of
    both, 4,096 position rows are those of 1024 px; at 512 px they are 1,024.

    Args:
        config: all options; `SegmentationModel(SegmenterConfig(backbone=..., num_classes=11))`.

    Raises:
        TypeError: config is no SegmenterConfig.
        ImportError: the head is UperNet and transformers is not installed.
    """

    header: "WeightsHeader | None" = None
    """What the weights file said of classes and pictures; None for a model that was not loaded."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        if not isinstance(config, SegmenterConfig):
            raise TypeError(
                f"SegmentationModel takes a SegmenterConfig; got {type(config).__name__}"
            )
        self.config = config
        is_upernet = config.head == "upernet"
        self.kinds = feature_kinds(config)
        self.backbone = bare_backbone(config)
        self.layers = layers_of_levels(self.backbone, len(STRIDES_PX))[-len(self.kinds) :]
        d_model, channels = config.d_model, config.channels or config.d_model
        self.pyramid: FeaturePyramid | None = None
        self.auxiliary_head: nn.Module | None = None
        if is_upernet:
            self.pyramid = FeaturePyramid(d_model, kind="segmentation", stride=config.stride)
            self.decode_head, self.auxiliary_head = _upernet_heads(config, channels)
        else:
            self.decode_head = MaskTransformer(
                d_model,
                channels,
                config.num_classes,
                depth=config.head_depth,
                dropout=config.dropout,
            )

    @property
    def num_classes(self) -> int:
        """Classes of a pixel."""
        return self.config.num_classes

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return float32 logits (B, num_classes, H, W) for pictures (B, in_channels, H, W).

        Pictures of any size: inside they are padded with zeros, below and to the right, to a
        multiple of 32 pixels. In training mode the result is a pair, with the auxiliary head's
        logits of the same shape, or None without such a head.

        Raises:
            ValueError: shape or dtype of the pictures is not what the backbone takes, or UperNet
                is to train on a single picture, of which its batch norms would see one value.
        """
        if images.dim() != 4:
            raise ValueError(
                f"images must be (batch, {self.config.in_channels}, height, width); "
                f"got {tuple(images.shape)}"
            )
        if self.training and self.pyramid is not None and len(images) == 1:
            self._refuse_single_picture()
        size = (images.shape[2], images.shape[3])
        maps = read_maps(self.backbone, images, self.layers, self.kinds)
        # a Vim gives its channels last; its head takes as long as a DeiT's with them first
        levels = [one.to(images.dtype).contiguous() for one in maps]
        if self.pyramid is None:
            logits = self._at_pixels(self.decode_head(levels[-1]), size)
            return (logits, None) if self.training else logits
        pyramid = self.pyramid(levels)
        logits = self._at_pixels(self.decode_head(pyramid), size)
        if not self.training:
            return logits
        if self.auxiliary_head is None:
            return logits, None
        return logits, self._at_pixels(self.auxiliary_head(pyramid), size)

    def _at_pixels(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Return scores (B, K, h, w) of the padded pictures at the pixels of the pictures."""
        padded = padded_size(size)
        pixels = upsample(scores.float(), padded)
        return pixels if padded == size else pixels[..., : size[0], : size[1]]

    def _refuse_single_picture(self) -> None:
        # SyncBatchNorm, which sees other processes' pictures, is no BatchNorm2d
        if any(isinstance(module, nn.BatchNorm2d) for module in self.decode_head.modules()):
            raise ValueError(
                "UperNet needs at least 2 pictures a step and device to train, because its batch "
                "norms pool each picture to one value; got 1: raise the batch size, or take "
                'head="segmenter"'
            )


def feature_kinds(config: SegmenterConfig) -> list[FeatureKind]:
    """Return the kind of each map that the head reads: four of a pyramid, or the last alone."""
    last = config.last_features or config.features
    if config.head == "segmenter":
        return [last]
    return [*[config.features] * (len(STRIDES_PX) - 1), last]


def bare_backbone(config: SegmenterConfig) -> Vim | DeiT:
    """Return a freshly initialised backbone with no parameter that the head's maps do not use.

    Its own forward, which makes class scores, is of no use.
    """
    backbone = config.backbone.build()
    if "normed" not in feature_kinds(config):
        backbone.norm = nn.Identity()
    if isinstance(backbone, Vim):
        backbone.register_readout = None
    return backbone


def padded_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width raised to multiples of the coarsest stride."""
    coarsest = STRIDES_PX[-1]
    height, width = (-(-side // coarsest) * coarsest for side in size)
    return height, width


def read_maps(
    backbone: Vim | DeiT, images: Tensor, layers: Sequence[int], kinds: Sequence[FeatureKind]
) -> list[Tensor]:
    """Return maps (B, D, h, w) after `layers` for pictures of any size (B, C, H, W).

    Pictures are padded with zeros to `padded_size`, of which each cell covers a square of stride
    pixels; where patches overlap, zeros around the picture centre them on their cells.
    """
    height, width = images.shape[-2:]
    padded = padded_size((height, width))
    overlap = backbone.config.patch_size - stride_of(backbone.config)
    before = overlap // 2
    margins = (
        before,
        padded[1] - width + overlap - before,
        before,
        padded[0] - height + overlap - before,
    )
    if any(margins):
        images = F.pad(images, margins)
    return backbone.features(images, layers, kind=kinds)


def _upernet_heads(config: SegmenterConfig, channels: int) -> tuple[nn.Module, nn.Module | None]:
    """Return UperNet's head, and its auxiliary one unless that has no channels."""
    try:
        from visionmamba.models.upernet import AuxiliaryHead, UperNet
    except ImportError:
        raise ImportError(
            'head "upernet" needs transformers: pip install "visionmamba[segmentation]", or take '
            'head="segmenter"'
        ) from None
    in_channels = [config.d_model] * len(STRIDES_PX)
    num_classes, dropout = config.num_classes, config.dropout
    decode_head = UperNet(in_channels, channels, num_classes=num_classes, dropout=dropout)
    if not config.auxiliary_channels:
        return decode_head, None
    auxiliary_head = AuxiliaryHead(
        in_channels,
        config.auxiliary_channels,
        level=_AUXILIARY_LEVEL,
        num_classes=num_classes,
        dropout=dropout,
    )
    return decode_head, auxiliary_head


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}; got {value!r}")
