"""The model against the published one: golden outputs, and every option against plain formulas."""

import pytest
import torch

from tests.models.published import (
    drawn_weights,
    golden_case,
    golden_names,
    published_logits,
    published_shapes,
)
from visionmamba import VimConfig
from visionmamba.models import load_published
from visionmamba.models.published import published_to_ours

LOGITS_TOLERANCE = 2e-5  # float32 rounding over 24 layers on another machine
GRADIENT_TOLERANCE = 1e-3  # gradient norms as published in float32
FORMULA_TOLERANCE = 2e-6  # float32 model against the same formulas in float64, four layers

BASE = {
    "embed_dim": 32,
    "depth": 4,
    "num_classes": 10,
    "img_size": 64,
    "patch_size": 16,
    "rms_norm": True,
    "final_pool_type": "mean",
    "if_abs_pos_embed": True,
    "bimamba_type": "v2",
    "if_cls_token": True,
    "if_divide_out": True,
    "use_middle_cls_token": True,
}
VARIANTS = {
    "middle": {},
    "not halved": {"if_divide_out": False},
    "old spelling": {"if_devide_out": True},
    "head": {"use_middle_cls_token": False},
    "double": {"use_double_cls_token": True},
    "mean": {"if_cls_token": False},
    "max": {"if_cls_token": False, "final_pool_type": "max"},
    "last": {"if_cls_token": False, "final_pool_type": "none"},
    "v1": {"bimamba_type": "v1"},
    "if_bimamba": {"if_bimamba": True},
    "none": {"bimamba_type": "none"},
    "layer": {"if_bidirectional": True, "bimamba_type": "none"},
    "layer of v2": {"if_bidirectional": True},
    "sequence": {"flip_img_sequences_ratio": 1.0, "bimamba_type": "none"},
    "sequence with rope": {"flip_img_sequences_ratio": 1.0, "if_rope": True, "if_cls_token": False},
    "layernorm": {"rms_norm": False},
    "epsilon": {"norm_epsilon": 0.1},
    "layer scale": {"init_layer_scale": 0.5},
    "no positions": {"if_abs_pos_embed": False},
    "rope": {"if_rope": True},
    "rope on the residual": {"if_rope": True, "if_rope_residual": True},
    "rope without class token": {"if_rope": True, "if_rope_residual": True, "if_cls_token": False},
    "rope in pairs": {
        "if_rope": True,
        "if_rope_residual": True,
        "if_bidirectional": True,
        "bimamba_type": "none",
        "use_middle_cls_token": False,
    },
    "rope scaled": {"if_rope": True, "pt_hw_seq_len": 7, "use_middle_cls_token": False},
    "stride": {"stride": 8},
    "not square": {"img_size": (48, 80)},
    "small patch": {"patch_size": 8, "stride": 8, "img_size": 40},
    "channels": {"channels": 5},
    "states": {"d_state": 8},
}


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def published_model(options, weights):
    config = VimConfig.from_published({**options, "drop_path_rate": 0.0})
    model = config.build()
    model.load_state_dict(published_to_ours(weights))
    return model.eval()


@pytest.mark.parametrize("name", golden_names())
def test_golden_logits_and_gradients_are_reproduced(name):
    meta, weights, images, expected, factors = golden_case(name)
    model = published_model(meta["config"], weights)
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    logits = model(images)
    assert relative_error(logits, expected) < LOGITS_TOLERANCE
    (logits * factors).sum().backward()
    norms = {key: torch.full((1, 1, 1), norm) for key, norm in meta["grad_norms"].items()}
    for name, expected_norm in published_to_ours(norms).items():
        gradient = dict(model.named_parameters())[name].grad
        pieces = gradient.split(1, dim=1) if name == "class_token" else (gradient,)
        actual_norms = torch.stack([piece.norm() for piece in pieces])
        torch.testing.assert_close(
            actual_norms, expected_norm.flatten(), rtol=GRADIENT_TOLERANCE, atol=0
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_follows_the_published_formulas(variant):
    options = {**BASE, **VARIANTS[variant]}
    if "if_devide_out" in VARIANTS[variant]:
        del options["if_divide_out"]
    weights = drawn_weights(published_shapes(options), seed=5)
    height, width = VimConfig.from_published(options).resolved_image_size
    images = torch.randn(2, options.get("channels", 3), height, width)
    expected = published_logits(options, weights, images.double())
    with torch.no_grad():
        actual = published_model(options, weights)(images)
    assert relative_error(actual, expected) < FORMULA_TOLERANCE


def test_gradients_follow_the_published_formulas():
    options = {**BASE, "init_layer_scale": 0.5, "if_rope": True}
    weights = drawn_weights(published_shapes(options), seed=6)
    images = torch.randn(2, 3, 64, 64)
    model = published_model(options, weights)
    factors = torch.randn(2, 10)
    (model(images) * factors).sum().backward()
    exact = {key: value.double().requires_grad_() for key, value in weights.items()}
    (published_logits(options, exact, images.double()) * factors).sum().backward()
    expected = published_to_ours({key: value.grad for key, value in exact.items()})
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-4, name


def test_state_dict_in_the_authors_names_needs_no_options():
    _, weights, images, expected, _ = golden_case("ti_224")
    with torch.no_grad():
        logits = load_published(weights)(images)
    assert relative_error(logits, expected) < LOGITS_TOLERANCE


def test_what_shapes_cannot_tell_is_given_by_name():
    _, weights, images, expected, _ = golden_case("v2_stride8")
    with torch.no_grad():
        logits = load_published(weights, stride=8, image_size=64)(images)
    assert relative_error(logits, expected) < LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"if_devide_ot": True}, "if_devide_ot"),
        ({"ssm_cfg": {"d_stat": 8}}, "d_stat"),
        ({"drop_block_rate": 0.1}, "drop_block_rate"),
    ],
)
def test_unknown_published_options_are_refused_by_name(options, named):
    with pytest.raises(TypeError, match=named):
        VimConfig.from_published(options)


@pytest.mark.parametrize(
    "options",
    [
        {"if_divide_out": True, "if_devide_out": False},
        {"if_cls_token": False, "final_pool_type": "all"},
        {"bimamba_type": "v3"},
        {"initializer_cfg": {"initializer_range": 0.1}},
        {"if_bidirectional": True, "flip_img_sequences_ratio": 0.5},
    ],
)
def test_published_values_without_counterpart_are_refused(options):
    with pytest.raises(ValueError):
        VimConfig.from_published(options)
