"""The baseline Vim is compared with: DeiT, timm's VisionTransformer with checked options."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from visionmamba.models.config import FeatureKind, kind_of_each, names_valid_options

if TYPE_CHECKING:
    from visionmamba.models.weights import WeightsHeader


class DeiTOptions(TypedDict, total=False):
    """The fields of DeiTConfig, for the typed overrides of its sizes."""

    image_size: int | tuple[int, int]
    patch_size: int
    stride: int | None
    in_channels: int
    num_classes: int
    d_model: int
    depth: int
    num_heads: int
    drop_path: float


@names_valid_options
@dataclass(frozen=True, kw_only=True)
class DeiTConfig:
    """Everything that defines a DeiT; the defaults are DeiT-Ti at 224 px (arXiv 2012.12877)."""

    image_size: int | tuple[int, int] = 224
    """Side or (height, width) in pixels that the position embedding is learned for."""
    patch_size: int = 16
    """Side of a square patch in pixels."""
    stride: int | None = None
    """Distance in pixels from one patch to the next; None means patch_size, side by side."""
    in_channels: int = 3
    """Channels of the pictures."""
    num_classes: int = 1000
    """Outputs of the classifier; 0 leaves the classifier out."""
    d_model: int = 192
    """Token width D."""
    depth: int = 12
    """Number of blocks, each attention and an MLP of four times the width."""
    num_heads: int = 3
    """Attention heads."""
    drop_path: float = 0.0
    """Highest rate of stochastic depth."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "in_channels", "num_classes", "d_model", "depth", "num_heads"):
            value, least = getattr(self, name), 0 if name == "num_classes" else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}; got {value!r}")
        stride = self.resolved_stride
        if not isinstance(stride, int) or not 1 <= stride <= self.patch_size:
            raise ValueError(
                f"stride must be an int from 1 to patch_size, {self.patch_size}; got {stride!r}"
            )
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of num_heads {self.num_heads}")
        if not 0 <= self.drop_path <= 1:
            raise ValueError(f"drop_path must be between 0 and 1; got {self.drop_path!r}")

    @property
    def resolved_stride(self) -> int:
        """stride as a number."""
        return self.patch_size if self.stride is None else self.stride

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a picture of image_size."""
        size = self.image_size
        sides = size if isinstance(size, tuple) else (size, size)
        return _grid(sides, self.patch_size, self.resolved_stride)

    @classmethod
    def tiny(cls, **overrides: Unpack[DeiTOptions]) -> "DeiTConfig":
        """DeiT-Ti: d_model 192, 3 heads; 5,717,416 parameters at 224 px and 1000 classes."""
        return cls(**{"d_model": 192, "num_heads": 3, **overrides})  # type: ignore[arg-type]

    @classmethod
    def small(cls, **overrides: Unpack[DeiTOptions]) -> "DeiTConfig":
        """DeiT-S: d_model 384, 6 heads; 22,050,664 parameters at 224 px and 1000 classes."""
        return cls(**{"d_model": 384, "num_heads": 6, **overrides})  # type: ignore[arg-type]

    @classmethod
    def base(cls, **overrides: Unpack[DeiTOptions]) -> "DeiTConfig":
        """DeiT-B: d_model 768, 12 heads; 86,567,656 parameters at 224 px and 1000 classes."""
        return cls(**{"d_model": 768, "num_heads": 12, **overrides})  # type: ignore[arg-type]

    def build(self) -> "DeiT":
        """Return a freshly initialised model."""
        return DeiT(self)


class DeiT(VisionTransformer):
    """timm's VisionTransformer built from a DeiTConfig; takes any size that fits its patches.

    Args:
        config: all options.
        block: class of its blocks, which has timm's face and names of parameters.
    """

    header: "WeightsHeader | None" = None
    """What the weights file said of outputs and pictures; None for a model that was not loaded."""

    def __init__(self, config: DeiTConfig, *, block: type[Block] = Block) -> None:
        options: dict[str, Any] = {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "in_chans": config.in_channels,
            "num_classes": config.num_classes,
            "embed_dim": config.d_model,
            "depth": config.depth,
            "num_heads": config.num_heads,
            "drop_path_rate": config.drop_path,
            "dynamic_img_size": True,
            "block_fn": block,
        }
        if config.stride not in (None, config.patch_size):
            options["embed_layer"] = partial(_OverlappingPatches, stride=config.stride)
        super().__init__(**options)
        self.config = config

    def features(
        self,
        images: Tensor,
        layers: Sequence[int],
        *,
        kind: FeatureKind | Sequence[FeatureKind] = "residual",
    ) -> list[Tensor]:
        """Return maps (B, D, h, w) after the zero-based blocks `layers`, without class token.

        Args:
            images: (B, in_channels, H, W) whose sides are multiples of the patch size, with a
                stride a patch and multiples of it.
            layers: blocks, in any order; one map each, in the same order.
            kind: "residual": the stream after the block; "normed": that after the final norm. One
                for all maps, or one for each.

        Raises:
            ValueError: an unknown kind or one that a DeiT does not have, or another number of kinds
                than of layers.
        """
        kinds = kind_of_each(kind, layers)
        for one in kinds:
            if one == "mixer":
                raise ValueError("kind must be 'residual' or 'normed' for a DeiT; got 'mixer'")
        once = sorted(set(layers))
        maps = self.forward_intermediates(images, indices=once, intermediates_only=True)
        assert isinstance(maps, list)
        after = dict(zip(once, maps, strict=True))
        return [
            self._normed(after[layer]) if one == "normed" else after[layer]
            for layer, one in zip(layers, kinds, strict=True)
        ]

    def _normed(self, features: Tensor) -> Tensor:
        normed: Tensor = self.norm(features.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class _OverlappingPatches(PatchEmbed):
    """timm's patches, one every few pixels instead of side by side; the same parameters."""

    def __init__(self, *, stride: int, **options: Any) -> None:
        super().__init__(**options)
        self.stride = stride
        self.proj.stride = (stride, stride)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> tuple[int, int] | int:
        return self.stride if as_scalar else (self.stride, self.stride)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        return _grid(img_size, self.patch_size[0], self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, h, w, D) of pictures (B, C, H, W)."""
        height, width = x.shape[-2:]
        patch = self.patch_size[0]
        if any(side < patch or (side - patch) % self.stride for side in (height, width)):
            raise ValueError(
                f"image side {height}x{width} does not fit patches of {patch} at stride "
                f"{self.stride}; resize or pad it to {patch} and multiples of {self.stride}"
            )
        tokens: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return tokens


def _grid(sides: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    """Return rows and columns of patches in a picture of these sides in pixels."""
    rows, columns = ((side - patch_size) // stride + 1 for side in sides)
    return rows, columns
