"""What a Vim is made of: VimConfig, its sizes, and the authors' option names translated.

Not for hyper-parameters of training; those live in recipes.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack, get_args

if TYPE_CHECKING:
    from visionmamba.models.vim import Vim

Bidirectional = Literal["none", "sequence", "layer", "ssm", "ssm+conv"]
MixerKind = Literal["none", "ssm", "ssm+conv"]
Readout = Literal["middle", "head", "double", "registers", "mean", "max", "last"]
Norm = Literal["rmsnorm", "layernorm"]
PositionEmbedding = Literal["learned", "none"]
Rope = Literal["none", "tokens", "tokens+residual"]
RopeLayout = Literal["grid", "published"]
PartialPatches = Literal["pad", "refuse"]
Initialization = Literal["published", "symmetric"]
FeatureKind = Literal["residual", "mixer", "normed"]

_Config = TypeVar("_Config", bound=type)


def names_valid_options(config_class: _Config) -> _Config:
    """Make a keyword-only dataclass refuse unknown options with the valid ones named.

    Raises (from the decorated class): TypeError for an option that is not a field.
    """
    plain_init: Callable[..., None] = config_class.__init__  # type: ignore[misc]
    names = tuple(field.name for field in fields(config_class))

    @functools.wraps(plain_init)
    def checked_init(self: object, *args: object, **options: object) -> None:
        if args:
            raise TypeError(
                f"{config_class.__name__} takes options by name only; write for example "
                f"{config_class.__name__}({names[0]}=...), not positional values"
            )
        refuse_unknown_options(config_class.__name__, options, names)
        plain_init(self, **options)

    config_class.__init__ = checked_init  # type: ignore[misc]
    return config_class


def refuse_unknown_options(
    owner: str, options: Mapping[str, object], valid: tuple[str, ...]
) -> None:
    """Raise TypeError naming every option outside `valid`, and the valid ones."""
    unknown = [name for name in options if name not in valid]
    if unknown:
        raise TypeError(
            f"{owner} has no option {', '.join(map(repr, unknown))}; valid: {', '.join(valid)}"
        )


def kind_of_each(
    kind: FeatureKind | Sequence[FeatureKind], layers: Sequence[int]
) -> list[FeatureKind]:
    """Return the kind of each layer's features when one is given for all or one for each.

    Raises:
        ValueError: an unknown kind, or another number of kinds than of layers.
    """
    kinds = [kind] * len(layers) if isinstance(kind, str) else list(kind)
    if len(kinds) != len(layers):
        raise ValueError(
            f"kind must be one for all layers or one for each; got {len(kinds)} for "
            f"{len(layers)} layers"
        )
    for one in kinds:
        if one not in get_args(FeatureKind):
            raise ValueError(f"kind must be 'residual', 'mixer' or 'normed'; got {one!r}")
    return kinds


class VimInnerOptions(TypedDict, total=False):
    """The fields of VimConfig that say what happens between patches and read-out."""

    d_state: int
    d_conv: int
    expand: int
    dt_rank: Literal["auto"] | int
    bidirectional: Bidirectional
    inner_mixer: MixerKind
    sequence_flip_probability: float
    readout: Readout
    num_registers: int
    halve_directions: bool
    norm: Norm
    norm_eps: float
    layer_scale: float | None
    position_embedding: PositionEmbedding
    rope: Rope
    rope_layout: RopeLayout
    rope_reference_grid: int
    partial_patches: PartialPatches
    initialization: Initialization


class VimOptions(VimInnerOptions, total=False):
    """The fields of VimConfig, for the typed overrides of its sizes."""

    image_size: int | tuple[int, int]
    patch_size: int
    stride: int | None
    in_channels: int
    num_classes: int
    d_model: int
    depth: int
    drop_path: float
    dropout: float
    activation_checkpointing: bool


@names_valid_options
@dataclass(frozen=True, kw_only=True)
class VimConfig:
    """Everything that defines a Vim; `build()` or `Vim(config)` makes the model.

    The defaults are the published Vim-Ti at 224 px (arXiv 2401.09417). A wrong option raises
    TypeError, a wrong value ValueError, both naming the valid ones.
    """

    image_size: int | tuple[int, int] = 224
    """Side or (height, width) in pixels that the position embedding is learned for; any size can
    be given at call time."""
    patch_size: int = 16
    """Side of a square patch in pixels."""
    stride: int | None = None
    """Distance of neighbouring patches in pixels; None means patch_size. The published
    long-sequence models use 8 with patches of 16."""
    in_channels: int = 3
    """Channels of the pictures."""
    num_classes: int = 1000
    """Outputs of the classifier; 0 leaves the classifier out and the model returns the read-out."""
    d_model: int = 192
    """Token width D; 192 tiny, 384 small, 768 base."""
    depth: int = 24
    """Number of blocks; each holds one mixer and no MLP."""
    d_state: int = 16
    """State size N of each channel."""
    d_conv: int = 4
    """Taps of the causal depthwise convolution."""
    expand: int = 2
    """d_inner = expand * d_model."""
    dt_rank: Literal["auto"] | int = "auto"
    """Rank of the step-size projection; "auto" is ceil(d_model / 16)."""
    bidirectional: Bidirectional = "ssm+conv"
    """How the sequence is seen in both directions (paper, table 4): "ssm+conv" (published v2)
    gives each direction its own convolution, projections and A; "ssm" (v1) shares all but A;
    "layer" runs pairs of blocks, the second on the flipped sequence, and sums hidden and residual
    of both (so the residual doubles with every pair); "sequence" flips the whole batch with
    sequence_flip_probability, in evaluation too; "none" reads forward only."""
    inner_mixer: MixerKind = "none"
    """The mixer inside the blocks when bidirectional is "layer" or "sequence"."""
    sequence_flip_probability: float = 0.5
    """Used by bidirectional "sequence" only."""
    readout: Readout = "middle"
    """What the classifier reads (paper, table 5): the class token in the middle, at the head, or
    the mean of one at either end; without class token the mean of all tokens, the maximum of the
    per-token logits, or the last token. Beyond the paper, "registers" puts learned tokens evenly
    among the patches in place of the class token and reads all of them, each reduced to
    d_model / num_registers values by one linear layer (Mamba-Reg, arXiv 2405.14858, whose small and
    base models divide by 2 and by 4 only and give the classifier 6 and 3 times d_model)."""
    num_registers: int = 12
    """Used by readout "registers" only, where it must divide d_model; 12 in Mamba-Reg's models of
    these sizes."""
    halve_directions: bool = True
    """Halve the sum of both directions (published div2); acts in "ssm+conv" only, as published."""
    norm: Norm = "rmsnorm"
    """Normalisation before each mixer and before the read-out."""
    norm_eps: float = 1e-5
    """Added to the mean square (or variance) inside the norms."""
    layer_scale: float | None = None
    """Initial value of a learned per-channel factor on each mixer's output; None leaves it out."""
    position_embedding: PositionEmbedding = "learned"
    """"learned" adds one row per token (class tokens too) to the input."""
    rope: Rope = "none"
    """Rotary embedding before every block: on the block's input, or on the residual stream too
    (models of January 2024)."""
    rope_layout: RopeLayout = "grid"
    """"grid" rotates every patch by its own row and column and no class token; "published" takes
    token 0 for the class token when the count is odd, wherever it really stands."""
    rope_reference_grid: int = 14
    """Patches per side that rotary positions are scaled to (published pt_hw_seq_len)."""
    drop_path: float = 0.0
    """Highest rate of stochastic depth; block j of n has drop_path * j / (n - 1)."""
    dropout: float = 0.0
    """Dropout after the position embedding."""
    partial_patches: PartialPatches = "pad"
    """Pictures whose sides do not fit the patch grid: "pad" adds zeros below and to the right,
    "refuse" raises ValueError."""
    initialization: Initialization = "published"
    """"published" leaves the backward direction's dt bias at zero, as the authors' code does (a
    first step size of 0.69); "symmetric" starts both directions in [0.001, 0.1]."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("bidirectional", get_args(Bidirectional)),
            ("inner_mixer", get_args(MixerKind)),
            ("readout", get_args(Readout)),
            ("norm", get_args(Norm)),
            ("position_embedding", get_args(PositionEmbedding)),
            ("rope", get_args(Rope)),
            ("rope_layout", get_args(RopeLayout)),
            ("partial_patches", get_args(PartialPatches)),
            ("initialization", get_args(Initialization)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}"
                )
        for name in (
            "patch_size",
            "in_channels",
            "d_model",
            "depth",
            "d_state",
            "d_conv",
            "expand",
            "num_registers",
        ):
            _check_positive_int(name, getattr(self, name))
        _check_positive_int("rope_reference_grid", self.rope_reference_grid)
        if self.stride is not None:
            _check_positive_int("stride", self.stride)
        if self.dt_rank != "auto":
            _check_positive_int("dt_rank", self.dt_rank, also='"auto" or ')
        if not _is_int(self.num_classes) or self.num_classes < 0:
            raise ValueError(f"num_classes must be an int of at least 0; got {self.num_classes!r}")
        size = self.image_size
        sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
        if not all(map(_is_int, sides)):
            raise ValueError(
                f"image_size must be an int or a tuple (height, width) in pixels; got {size!r}"
            )
        if min(self.resolved_image_size) < self.patch_size:
            raise ValueError(
                f"image_size {size} is smaller than patch_size {self.patch_size}; "
                "take larger pictures or smaller patches"
            )
        for name in ("drop_path", "dropout", "sequence_flip_probability"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1; got {value!r}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive; got {self.norm_eps!r}")
        if self.bidirectional == "layer" and self.depth % 2:
            raise ValueError(
                f'bidirectional "layer" pairs blocks, so depth must be even; got {self.depth}'
            )
        if self.rope != "none" and self.d_model % 4:
            raise ValueError(f"rope needs d_model to be a multiple of 4; got {self.d_model}")
        if self.readout == "registers" and self.d_model % self.num_registers:
            raise ValueError(
                f"num_registers must divide d_model {self.d_model}, as each register gives the "
                f"classifier d_model / num_registers values; got {self.num_registers}: take "
                f"{_nearest_divisor(self.d_model, self.num_registers)}, or another d_model"
            )
        if self.inner_mixer != "none" and self.bidirectional not in ("layer", "sequence"):
            raise ValueError(
                'inner_mixer is for bidirectional "layer" or "sequence"; '
                f"with bidirectional {self.bidirectional!r} leave it at 'none'"
            )

    @classmethod
    def tiny(cls, **overrides: Unpack[VimOptions]) -> "VimConfig":
        """Vim-Ti: d_model 192, depth 24; 7,148,008 parameters at 224 px and 1000 classes."""
        return cls(**{"d_model": 192, "depth": 24, **overrides})  # type: ignore[arg-type]

    @classmethod
    def small(cls, **overrides: Unpack[VimOptions]) -> "VimConfig":
        """Vim-S: d_model 384, depth 24; 25,796,584 parameters at 224 px and 1000 classes."""
        return cls(**{"d_model": 384, "depth": 24, **overrides})  # type: ignore[arg-type]

    @classmethod
    def base(cls, **overrides: Unpack[VimOptions]) -> "VimConfig":
        """Vim-B: d_model 768, depth 24; 97,598,440 parameters at 224 px and 1000 classes."""
        return cls(**{"d_model": 768, "depth": 24, **overrides})  # type: ignore[arg-type]

    @classmethod
    def from_published(cls, options: Mapping[str, Any]) -> "VimConfig":
        """Translate the options of the authors' VisionMamba class; missing ones take its defaults.

        Both spellings if_divide_out and if_devide_out are known.

        Raises:
            TypeError: an option that the authors' class does not have (theirs swallows it).
            ValueError: a value or combination that has no meaning there or no counterpart here.
        """
        return _from_published(options)

    @property
    def d_inner(self) -> int:
        """Channels inside the mixer."""
        return self.expand * self.d_model

    @property
    def resolved_dt_rank(self) -> int:
        """dt_rank as a number."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def resolved_stride(self) -> int:
        """stride as a number."""
        return self.patch_size if self.stride is None else self.stride

    @property
    def resolved_image_size(self) -> tuple[int, int]:
        """image_size as (height, width)."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def mixer_kind(self) -> MixerKind:
        """What each block's mixer does by itself."""
        if self.bidirectional in ("layer", "sequence"):
            return self.inner_mixer
        return self.bidirectional  # type: ignore[return-value]

    def build(self) -> "Vim":
        """Return a freshly initialised model."""
        from visionmamba.models.vim import Vim

        return Vim(self)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_positive_int(name: str, value: object, *, also: str = "") -> None:
    if not _is_int(value) or value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be {also}an int of at least 1; got {value!r}")


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = (one for one in range(1, number + 1) if number % one == 0)
    return min(divisors, key=lambda one: abs(one - wanted))


# Defaults of the authors' VisionMamba.__init__ (hustvl/Vim dd0358a, models_mamba.py).
_PUBLISHED_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "stride": 16,
    "depth": 24,
    "embed_dim": 192,
    "d_state": 16,
    "channels": 3,
    "num_classes": 1000,
    "ssm_cfg": None,
    "drop_rate": 0.0,
    "drop_path_rate": 0.1,
    "norm_epsilon": 1e-5,
    "rms_norm": True,
    "fused_add_norm": True,
    "residual_in_fp32": True,
    "initializer_cfg": None,
    "device": None,
    "dtype": None,
    "ft_seq_len": None,
    "pt_hw_seq_len": 14,
    "if_bidirectional": False,
    "final_pool_type": "none",
    "if_abs_pos_embed": True,
    "if_rope": False,
    "if_rope_residual": False,
    "flip_img_sequences_ratio": -1.0,
    "if_bimamba": False,
    "bimamba_type": "v2",
    "if_cls_token": True,
    "if_divide_out": True,
    "init_layer_scale": None,
    "use_double_cls_token": False,
    "use_middle_cls_token": True,
}
_MIXER_OF_BIMAMBA_TYPE: dict[str, MixerKind] = {"none": "none", "v1": "ssm", "v2": "ssm+conv"}
_READOUT_OF_POOL_TYPE: dict[str, Readout] = {"none": "last", "mean": "mean", "max": "max"}
_SSM_OPTIONS = ("d_state", "d_conv", "expand", "dt_rank")


def _from_published(options: Mapping[str, Any]) -> VimConfig:
    given = dict(options)
    if "if_devide_out" in given:
        value = given.pop("if_devide_out")
        if given.setdefault("if_divide_out", value) != value:
            raise ValueError("if_divide_out and if_devide_out disagree; give one of them")
    refuse_unknown_options("the published VisionMamba", given, tuple(_PUBLISHED_DEFAULTS))
    for name in ("initializer_cfg", "device", "dtype", "ft_seq_len"):
        if given.get(name) is not None:
            raise ValueError(
                f"{name} has no counterpart here and must be None; got {given[name]!r}"
            )
    published = {**_PUBLISHED_DEFAULTS, **given}
    ssm = dict(published["ssm_cfg"] or {})
    refuse_unknown_options("ssm_cfg", ssm, _SSM_OPTIONS)
    ssm.setdefault("d_state", published["d_state"])
    bimamba_type = "v1" if published["if_bimamba"] else published["bimamba_type"]
    if bimamba_type not in _MIXER_OF_BIMAMBA_TYPE:
        raise ValueError(f"bimamba_type must be 'none', 'v1' or 'v2'; got {bimamba_type!r}")
    mixer = _MIXER_OF_BIMAMBA_TYPE[bimamba_type]
    flip_ratio = published["flip_img_sequences_ratio"]
    flips = flip_ratio > 0
    bidirectional: Bidirectional = mixer
    if published["if_bidirectional"] and flips:
        raise ValueError(
            "if_bidirectional and flip_img_sequences_ratio > 0 exclude each other here"
        )
    if published["if_bidirectional"] or flips:
        bidirectional = "layer" if published["if_bidirectional"] else "sequence"
    rope: Rope = "none"
    if published["if_rope"]:
        rope = "tokens+residual" if published["if_rope_residual"] else "tokens"
    image_size = published["img_size"]
    return VimConfig(
        image_size=tuple(image_size) if isinstance(image_size, list | tuple) else image_size,
        patch_size=published["patch_size"],
        stride=published["stride"],
        in_channels=published["channels"],
        num_classes=published["num_classes"],
        d_model=published["embed_dim"],
        depth=published["depth"],
        bidirectional=bidirectional,
        inner_mixer=mixer if bidirectional in ("layer", "sequence") else "none",
        sequence_flip_probability=min(float(flip_ratio), 1.0) if flips else 0.5,
        readout=_published_readout(published),
        halve_directions=bool(published["if_divide_out"]),
        norm="rmsnorm" if published["rms_norm"] else "layernorm",
        norm_eps=published["norm_epsilon"],
        layer_scale=published["init_layer_scale"],
        position_embedding="learned" if published["if_abs_pos_embed"] else "none",
        rope=rope,
        rope_layout="published",
        rope_reference_grid=published["pt_hw_seq_len"],
        drop_path=published["drop_path_rate"],
        dropout=published["drop_rate"],
        **ssm,
    )


def _published_readout(published: Mapping[str, Any]) -> Readout:
    pool_type = published["final_pool_type"]
    if published["if_cls_token"]:
        if pool_type == "max":
            raise ValueError(
                "final_pool_type 'max' with a class token makes the published model return one "
                "number a picture; set if_cls_token=False for the maximum over tokens"
            )
        if published["use_double_cls_token"]:
            return "double"
        return "middle" if published["use_middle_cls_token"] else "head"
    if pool_type not in _READOUT_OF_POOL_TYPE:
        raise ValueError(
            "without class token final_pool_type must be 'none', 'mean' or 'max'; "
            f"got {pool_type!r}"
        )
    return _READOUT_OF_POOL_TYPE[pool_type]
