"""Vim and DeiT as backbones of transformers, for its UperNet, Mask2Former and others.

Importing this module registers VimBackbone and DeiTPyramidBackbone with AutoConfig and
AutoBackbone. It needs visionmamba[segmentation]. Models over them are saved and loaded as any of
transformers'; a folder with a backbone alone is read by VimBackbone.from_pretrained, because
AutoBackbone.from_pretrained looks for names on the Hub only.
"""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from visionmamba.models.config import VimConfig
from visionmamba.models.deit import DeiT, DeiTConfig
from visionmamba.models.pyramid import STRIDES_PX, FeaturePyramid, layers_of_levels
from visionmamba.models.segmentation import (
    SegmentationModel,
    SegmenterConfig,
    bare_backbone,
    feature_kinds,
    read_maps,
)
from visionmamba.models.vim import Vim

try:
    from huggingface_hub.dataclasses import strict
    from transformers import (
        AutoBackbone,
        AutoConfig,
        PreTrainedConfig,
        PreTrainedModel,
        UperNetConfig,
        UperNetForSemanticSegmentation,
    )
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
    from transformers.modeling_outputs import BackboneOutput
except ImportError as error:
    raise ImportError(
        f"visionmamba.models.transformers needs transformers 5.5 or newer ({error}): "
        'pip install "visionmamba[segmentation]"'
    ) from None


class _PyramidConfig(BackboneConfigMixin, PreTrainedConfig):
    """What both configurations share: features, stages, and a model's own configuration."""

    features: str = "residual"
    last_features: str | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.stage_names = [f"stage{i + 1}" for i in range(len(STRIDES_PX))]
        out_features = kwargs.pop("out_features", None)
        out_indices = kwargs.pop("out_indices", None)
        if out_features is None and out_indices is None:
            out_features = self.stage_names
        self.set_output_features_output_indices(out_features, out_indices)
        super().__post_init__(**kwargs)
        self.segmenter_config()  # complains of wrong options

    def model_config(self) -> VimConfig | DeiTConfig:
        """Return the configuration of the model inside."""
        raise NotImplementedError

    def segmenter_config(self) -> SegmenterConfig:
        """Return the configuration of a segmenter with this backbone and a single class."""
        features: dict[str, Any] = {"features": self.features, "last_features": self.last_features}
        return SegmenterConfig(backbone=self.model_config(), num_classes=1, **features)


@strict
class VimBackboneConfig(_PyramidConfig):
    """A Vim with a feature pyramid: maps "stage1" to "stage4" at strides 4, 8, 16 and 32 px.

    Args:
        vim: a VimConfig or a dictionary of its fields; by default Vim-Ti. Its classifier is left
            out.
        features, last_features: as in SegmenterConfig.
        out_features, out_indices: stages that are returned; by default all.

    Raises:
        TypeError, ValueError: options of the Vim are unknown or wrong.
    """

    model_type = "vim_backbone"

    vim: VimConfig | dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        vim = VimConfig.tiny() if self.vim is None else self.vim
        if not isinstance(vim, VimConfig):
            vim = VimConfig(**_with_tuples(vim))
        self.vim = asdict(replace(vim, num_classes=0))
        super().__post_init__(**kwargs)

    def model_config(self) -> VimConfig:
        assert isinstance(self.vim, dict)
        return VimConfig(**_with_tuples(self.vim))


@strict
class DeiTPyramidBackboneConfig(_PyramidConfig):
    """A DeiT with the same feature pyramid, as a baseline; see VimBackboneConfig.

    Args:
        deit: a DeiTConfig or a dictionary of its fields; by default DeiT-Ti. Its classifier is left
            out.
        features, last_features, out_features, out_indices: as in VimBackboneConfig.

    Raises:
        TypeError, ValueError: options of the DeiT are unknown or wrong.
    """

    model_type = "deit_pyramid_backbone"

    deit: DeiTConfig | dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        deit = DeiTConfig.tiny() if self.deit is None else self.deit
        if not isinstance(deit, DeiTConfig):
            deit = DeiTConfig(**_with_tuples(deit))
        self.deit = asdict(replace(deit, num_classes=0))
        super().__post_init__(**kwargs)

    def model_config(self) -> DeiTConfig:
        assert isinstance(self.deit, dict)
        return DeiTConfig(**_with_tuples(self.deit))


class _PyramidBackbone(BackboneMixin, PreTrainedModel):
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  # as transformers declares it
    has_attentions = False
    config: _PyramidConfig

    def __init__(self, config: _PyramidConfig) -> None:
        super().__init__(config)
        self.backbone, self.pyramid = _parts(config)
        self.num_features = [self.backbone.config.d_model] * len(STRIDES_PX)
        self.kinds = feature_kinds(config.segmenter_config())
        self.layers = layers_of_levels(self.backbone, len(STRIDES_PX))
        for tensor in _tensors(self).values():
            tensor._is_hf_initialized = not tensor.is_meta
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[tuple[Tensor, ...], ...]:
        """Return the maps (B, D, H / stride, W / stride), rounded up, of the stages asked for.

        Args:
            pixel_values: pictures (B, in_channels, H, W) of any size.
            output_hidden_states: return the backbone's own maps too.
            output_attentions: has no effect; there are none.
            return_dict: False returns a tuple.
        """
        maps = read_maps(self.backbone, pixel_values, self.layers, self.kinds)
        maps = [one.to(pixel_values.dtype) for one in maps]
        size = pixel_values.shape[-2:]
        levels = []
        for name, stride, level in zip(
            self.stage_names, STRIDES_PX, self.pyramid(maps), strict=True
        ):
            if name in self.out_features:
                rows, columns = (-(-side // stride) for side in size)
                levels.append(level[..., :rows, :columns])  # without cells that are padding alone
        hidden_states = tuple(maps) if output_hidden_states else None
        if return_dict is False:
            return (tuple(levels),) if hidden_states is None else (tuple(levels), hidden_states)
        return BackboneOutput(feature_maps=tuple(levels), hidden_states=hidden_states)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give all tensors that a checkpoint lacked the values of a fresh model."""
        missing = {
            name: tensor
            for name, tensor in _tensors(self).items()
            if not getattr(tensor, "_is_hf_initialized", False) and not tensor.is_meta
        }
        if not missing:
            return
        backbone, pyramid = _parts(self.config)
        fresh = _tensors(nn.ModuleDict({"backbone": backbone, "pyramid": pyramid}))
        for name, tensor in missing.items():
            tensor.copy_(fresh[name])
            tensor._is_hf_initialized = True


class VimBackbone(_PyramidBackbone):
    """A Vim with a feature pyramid, for transformers' heads.

    Start it from a classifier's weights with visionmamba.models.load_backbone.
    """

    config_class = VimBackboneConfig


class DeiTPyramidBackbone(_PyramidBackbone):
    """A DeiT with the same feature pyramid, as a baseline."""

    config_class = DeiTPyramidBackboneConfig


def to_transformers(model: SegmentationModel) -> UperNetForSemanticSegmentation:
    """Return transformers' model with the weights of a UperNet segmenter, in evaluation mode.

    Its logits are the same for pictures whose sides are multiples of 32, and close for others,
    which transformers' head stretches instead of padding them. It drops nothing in training.

    Raises:
        ValueError: the head is another.
    """
    config = model.config
    if config.head != "upernet":
        raise ValueError(f'transformers has a head for "upernet" only; got {config.head!r}')
    options: dict[str, Any] = {"features": config.features, "last_features": config.last_features}
    backbone = config.backbone
    backbone_config = (
        VimBackboneConfig(vim=backbone, **options)
        if isinstance(backbone, VimConfig)
        else DeiTPyramidBackboneConfig(deit=backbone, **options)
    )
    names = model.header.class_names if model.header else ()
    names = names or tuple(f"LABEL_{i}" for i in range(config.num_classes))
    upernet = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone_config,
            hidden_size=config.channels or config.d_model,
            use_auxiliary_head=config.auxiliary_channels > 0,
            auxiliary_channels=max(config.auxiliary_channels, 1),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    )
    inside = ("backbone.", "pyramid.")
    upernet.load_state_dict(
        {
            f"backbone.{name}" if name.startswith(inside) else name: tensor
            for name, tensor in model.state_dict().items()
        }
    )
    upernet.eval()
    return upernet


def _parts(config: _PyramidConfig) -> tuple[Vim | DeiT, FeaturePyramid]:
    segmenter = config.segmenter_config()
    backbone = bare_backbone(segmenter)
    pyramid = FeaturePyramid(segmenter.d_model, kind="segmentation", stride=segmenter.stride)
    return backbone, pyramid


def _tensors(module: nn.Module) -> dict[str, Any]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


AutoConfig.register(VimBackboneConfig.model_type, VimBackboneConfig, exist_ok=True)
AutoConfig.register(DeiTPyramidBackboneConfig.model_type, DeiTPyramidBackboneConfig, exist_ok=True)
AutoBackbone.register(VimBackboneConfig, VimBackbone, exist_ok=True)
AutoBackbone.register(DeiTPyramidBackboneConfig, DeiTPyramidBackbone, exist_ok=True)
