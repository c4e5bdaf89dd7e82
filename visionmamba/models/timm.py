"""Names of the Vims in timm's registry, with the published weights of each.

`import visionmamba` is enough for `timm.create_model("vim_tiny_patch16_224")`. This file may be
imported while visionmamba.models is half imported, so it needs timm alone; the model is in
timm_vim.py.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from visionmamba.models.released import PUBLISHED_MODELS

_NAMES = (
    "vim_tiny_patch16_224",
    "vim_tiny_patch16_stride8_224",
    "vim_small_patch16_224",
    "vim_small_patch16_stride8_224",
    "vim_base_patch16_224",
    "vim_base_patch16_stride8_224",
)
_PYRAMIDS = {  # the same models, whose features_only has maps at strides 4, 8, 16 and 32
    "vim_tiny_pyramid_patch16_224": "vim_tiny_patch16_224",
    "vim_small_pyramid_patch16_224": "vim_small_patch16_224",
    "vim_base_pyramid_patch16_224": "vim_base_patch16_224",
}
_TAG = "hustvl_in1k"
_FEATURE_LEVELS = 4


def _pretrained_cfg(name: str) -> tuple[str, dict[str, Any]]:
    """Return a model's name, with a tag where weights were published, and what timm shall know."""
    facts: dict[str, Any] = {
        "first_conv": "patch_embedding",
        "classifier": "head",
        "origin_url": "https://github.com/hustvl/Vim",
        "paper_name": "Vision Mamba",
        "paper_ids": "arXiv:2401.09417",
    }
    for released in PUBLISHED_MODELS:
        if released.name == _PYRAMIDS.get(name, name):
            facts |= {
                "hf_hub_id": released.repository,
                "hf_hub_filename": released.filename,
                # the files hold an argparse.Namespace, which timm's own loading refuses
                "custom_load": "hf",
                "license": released.license,
            }
            return f"{name}.{_TAG}", facts
    return name, facts


default_cfgs = generate_default_cfgs(dict(map(_pretrained_cfg, (*_NAMES, *_PYRAMIDS))))


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-Ti: d_model 192, 7 M parameters."""
    return _create("vim_tiny_patch16_224", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-Ti with overlapping patches, four times the tokens."""
    sizes = {"embed_dim": 192, "stride": 8}
    return _create("vim_tiny_patch16_stride8_224", pretrained, sizes, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-S: d_model 384, 26 M parameters."""
    return _create("vim_small_patch16_224", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-S with overlapping patches, four times the tokens."""
    sizes = {"embed_dim": 384, "stride": 8}
    return _create("vim_small_patch16_stride8_224", pretrained, sizes, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-B: d_model 768, 98 M parameters."""
    return _create("vim_base_patch16_224", pretrained, {"embed_dim": 768}, kwargs)


@register_model
def vim_base_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-B with overlapping patches, four times the tokens; no weights were published."""
    sizes = {"embed_dim": 768, "stride": 8}
    return _create("vim_base_patch16_stride8_224", pretrained, sizes, kwargs)


@register_model
def vim_tiny_pyramid_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-Ti; features_only has maps at strides 4, 8, 16 and 32."""
    options = {"embed_dim": 192, "feature_cls": "pyramid"}
    return _create("vim_tiny_pyramid_patch16_224", pretrained, options, kwargs)


@register_model
def vim_small_pyramid_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-S; features_only has maps at strides 4, 8, 16 and 32."""
    options = {"embed_dim": 384, "feature_cls": "pyramid"}
    return _create("vim_small_pyramid_patch16_224", pretrained, options, kwargs)


@register_model
def vim_base_pyramid_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-B; features_only has maps at strides 4, 8, 16 and 32."""
    options = {"embed_dim": 768, "feature_cls": "pyramid"}
    return _create("vim_base_pyramid_patch16_224", pretrained, options, kwargs)


def _create(name: str, pretrained: bool, own: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    # imported at the first model: visionmamba.models.vim itself imports timm, and so this file
    from visionmamba.models.timm_stages import feature_net
    from visionmamba.models.timm_vim import adapt_weights, build_vim, spread_evenly

    options = {"depth": 24, **own, **options}
    feature_cls = options.pop("feature_cls", "getter")
    out_indices = options.pop("out_indices", None)
    if out_indices is None and feature_cls == "pyramid":
        out_indices = tuple(range(_FEATURE_LEVELS))
    if out_indices is None:
        steps = options["depth"] // (2 if options.get("bidirectional") == "layer" else 1)
        out_indices = spread_evenly(_FEATURE_LEVELS, steps)
    feature_cfg = {"out_indices": out_indices, "feature_cls": feature_net(feature_cls)}
    model: nn.Module = build_model_with_cfg(
        build_vim,
        name,
        pretrained,
        feature_cfg=feature_cfg,
        pretrained_filter_fn=adapt_weights,
        **options,
    )
    return model
