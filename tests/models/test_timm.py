"""Vim as one of timm's models: what timm's own tests expect of a model, and what is ours alone."""

import argparse
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import FeatureGraphNet, FeatureInfo, GraphExtractNet, group_parameters
from timm.optim import create_optimizer_v2

import visionmamba
from tests.models.published import golden_case
from tests.models.test_timm_pyramid import NAMES as PYRAMIDS
from visionmamba import Vim
from visionmamba._timm_hook import register_with_timm
from visionmamba.models.released import PUBLISHED_MODELS
from visionmamba.models.timm_vim import TimmVim

NAMES = [
    "vim_tiny_patch16_224",
    "vim_tiny_patch16_stride8_224",
    "vim_small_patch16_224",
    "vim_small_patch16_stride8_224",
    "vim_base_patch16_224",
    "vim_base_patch16_stride8_224",
]
TINY = "vim_tiny_patch16_224"
SHALLOW = {"depth": 4, "img_size": 64}
NARROW = {**SHALLOW, "embed_dim": 16, "num_classes": 5}
GOLDEN = {"embed_dim": 96, "num_classes": 10}
PUBLISHED = {"rtol": 1e-4, "atol": 1e-4}  # float32 rounding through four layers
SAME = {"rtol": 1e-4, "atol": 1e-5}  # timm's own, for the same operations in another order


def create(name: str = TINY, **options):
    return timm.create_model(name, **{**NARROW, **options}).eval()


@pytest.mark.once
def test_models_are_registered_when_timm_is_imported() -> None:
    orders = ("import visionmamba, timm", "import visionmamba.models, timm")  # ours half imported
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", f"{imports}; print(*timm.list_models('vim_*'))"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for imports in orders
    ]
    answers = [run.communicate()[0].split() for run in runs]  # side by side: each takes seconds
    assert [sorted(answer) for answer in answers] == [sorted(NAMES + PYRAMIDS)] * 2


def test_models_are_registered_at_once_where_timm_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "visionmamba.models.timm")
    with pytest.warns(UserWarning, match="Overwriting vim_"):
        register_with_timm()
    assert "visionmamba.models.timm" in sys.modules


def test_the_sizes_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in timm.create_model(name).parameters()) for name in NAMES[::2]
        ]
    assert counts == [7_148_008, 25_796_584, 97_598_440]


@pytest.mark.parametrize("model", PUBLISHED_MODELS[:5], ids=lambda model: model.name)
def test_published_weights_have_an_address(model) -> None:
    cfg = timm.get_pretrained_cfg(f"{model.name}.hustvl_in1k")
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (model.repository, model.filename)
    assert f"{model.name}.hustvl_in1k" in timm.list_pretrained("vim_*")


def test_logits_are_those_of_a_vim() -> None:
    model, images = create(), torch.randn(2, 3, 48, 80)
    vim = Vim(model.config).eval()
    vim.load_state_dict(model.state_dict())
    assert torch.equal(model(images), vim(images))


# What timm expects of every model.


@pytest.mark.parametrize("name", NAMES)
def test_forward_with_and_without_checkpointing(name: str) -> None:
    model, images = timm.create_model(name, **SHALLOW).eval(), torch.randn(1, 3, 64, 64)
    logits = model(images)
    assert logits.shape == (1, 1000) and logits.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images), logits, **SAME)


@pytest.mark.parametrize("name", NAMES)
def test_backward_reaches_every_parameter(name: str) -> None:
    model = timm.create_model(name, **{**SHALLOW, "depth": 2, "num_classes": 42}).train()
    logits = model(torch.randn(2, 3, 32, 32))
    logits.mean().backward()
    assert logits.shape == (2, 42)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_describes_the_model(name: str) -> None:
    model = timm.create_model(name, depth=1)
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg and cfg["architecture"] == name
    assert cfg["input_size"] == (3, 224, 224) and not cfg["fixed_input_size"]
    assert (cfg["crop_pct"], cfg["interpolation"]) == (0.875, "bicubic")
    assert model.num_classes == cfg["num_classes"] == 1000
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= set(model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_head_can_be_left_out(name: str) -> None:
    model, images = timm.create_model(name, **SHALLOW).eval(), torch.randn(1, 3, 64, 64)
    features = model.forward_features(images)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert features.shape[-1] == model.num_features
    assert pre_logits.shape == (1, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(images))
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(images), pre_logits)
    assert timm.create_model(name, **SHALLOW, num_classes=0)(images).shape == pre_logits.shape


def test_classifier_can_be_replaced() -> None:
    model = create().to(torch.bfloat16).eval()
    model.reset_classifier(7)
    assert model.get_classifier() is model.head
    assert model.num_classes == model.head.out_features == 7
    assert model.head.weight.dtype == torch.bfloat16 and not model.head.training
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)).shape == (2, 7)


@pytest.mark.parametrize(("stride", "grid"), [(16, (4, 6)), (8, (7, 11))])
def test_intermediates_fit_the_feature_info(stride: int, grid: tuple[int, int]) -> None:
    model, images = create(stride=stride), torch.randn(2, 3, 64, 96)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images))
    assert info.channels() == [16] * 4 and info.reduction() == [stride] * 4
    assert [one.shape for one in maps] == [(2, 16, *grid)] * 4
    model.set_grad_checkpointing()
    again, _ = model.forward_intermediates(images)
    torch.testing.assert_close(again, final, **SAME)


def test_intermediates_are_the_maps_of_a_vim() -> None:
    model, images = create(), torch.randn(2, 3, 64, 64)
    maps = model.forward_intermediates(images, [1, -1], intermediates_only=True)
    for one, expected in zip(maps, model.features(images, [1, 3]), strict=True):
        torch.testing.assert_close(one, expected)
    normed = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[0], model.features(images, [3], kind="normed")[0])


def test_intermediates_have_the_forms_that_timm_knows() -> None:
    model, images = create(), torch.randn(2, 3, 64, 64)
    maps = model.forward_intermediates(images, 2, intermediates_only=True)
    rows = model.forward_intermediates(images, 2, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(rows[0], maps[0].flatten(2).transpose(1, 2))
    pairs = model.forward_intermediates(
        images, 2, return_prefix_tokens=True, norm=True, intermediates_only=True
    )
    torch.testing.assert_close(pairs[1][1], model.forward_features(images)[:, :1])
    answer = model.forward_intermediates(images, 2, return_prefix_tokens=True, output_dict=True)
    torch.testing.assert_close(answer["image_features"], model.forward_features(images))
    torch.testing.assert_close(answer["image_intermediates"], maps)
    assert [one.shape for one in answer["image_intermediates_prefix"]] == [(2, 1, 16)] * 2


@pytest.mark.parametrize("kind", ["getter", "list", "dict", "hook"])
@pytest.mark.parametrize("name", NAMES[:2])
def test_features_only_gives_maps_at_the_patch_stride(name: str, kind: str) -> None:
    options = {"features_only": True, "out_indices": (1, 3), "feature_cls": kind}
    net, images = create(name, **options), torch.randn(2, 3, 48, 80)
    assert type(net).__name__.lower() == f"feature{kind}net"
    maps = net(images)
    maps = list(maps.values()) if kind == "dict" else maps
    whole = create(name)
    whole.load_state_dict(renamed(net.state_dict()), strict=False)
    expected = whole.forward_intermediates(images, [1, 3], intermediates_only=True)
    torch.testing.assert_close(maps, expected)
    assert net.feature_info.channels() == [16, 16]
    assert net.feature_info.reduction() == [whole.config.resolved_stride] * 2
    assert "classifier" not in net.default_cfg


def renamed(state_dict):
    """The tensors of a feature net by the names of the model in it."""
    names = {}
    for key, tensor in state_dict.items():
        plain = key.removeprefix("model.").removeprefix("body.").removeprefix("graph_module.")
        plain = plain.removeprefix("embedding.vim.")
        if plain.startswith("stage"):
            stage, _, _, rest = plain.split(".", 3)
            plain = f"blocks.{stage.removeprefix('stage')}.{rest}"
        names[plain] = tensor
    return names


@pytest.mark.parametrize("kind", ["fx", FeatureGraphNet])
def test_features_of_a_graph_are_the_same_maps(kind) -> None:
    net = create(features_only=True, feature_cls=kind, out_indices=(1, 3))
    whole, images = create(features_only=True, out_indices=(1, 3)), torch.randn(2, 3, 48, 80)
    names = {name.removeprefix("model."): name for name in whole.state_dict()}
    tensors = renamed(net.state_dict()).items()
    whole.load_state_dict({names[key]: tensor for key, tensor in tensors})
    assert isinstance(net, FeatureGraphNet)
    torch.testing.assert_close(net(images), whole(images))


@pytest.mark.parametrize("kind", ["getter", "list"])
def test_feature_nets_train_with_checkpointing(kind: str) -> None:
    options = {"features_only": True, "feature_cls": kind, "drop_path_rate": 0.2}
    net, images = create(**options).train(), torch.randn(2, 3, 64, 64)
    getattr(net, "model", net).set_grad_checkpointing(True)
    sum(one.mean() for one in net(images)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_features_spread_over_the_depth_by_default() -> None:
    net = create(depth=12, features_only=True)
    assert net.feature_info.out_indices == (2, 5, 8, 11)
    assert create(depth=2, features_only=True).feature_info.out_indices == (0, 1)


def test_pruning_leaves_what_is_needed() -> None:
    model, images = create(), torch.randn(2, 3, 64, 64)
    expected = model.forward_intermediates(images, [1], intermediates_only=True)
    assert model.prune_intermediate_layers([-3], prune_norm=True) == [1]
    assert len(model.blocks) == 2
    assert not [n for n, _ in model.named_parameters() if n.startswith(("norm", "head"))]
    _, maps = model.forward_intermediates(images)
    torch.testing.assert_close(maps[1:], expected)


# What is special about Vim.


def test_class_tokens_come_first() -> None:
    model, images = create(), torch.randn(2, 3, 64, 64)
    plain = Vim(model.config).eval()
    plain.load_state_dict(model.state_dict())
    tokens = plain.forward_features(images)
    moved = torch.cat((tokens[:, 8:9], tokens[:, :8], tokens[:, 9:]), dim=1)
    assert torch.equal(model.forward_features(images), moved)


def test_tokens_do_not_turn_with_the_sequence() -> None:
    options = {"bidirectional": "sequence", "readout": "head"}
    turned = create(**options, sequence_flip_probability=1)
    for block in turned.blocks:
        block.mixer.out_proj.weight.data.zero_()  # only the input is left
    straight = create(**options, sequence_flip_probability=0)
    straight.load_state_dict(turned.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(turned.forward_features(images), straight.forward_features(images))


@pytest.mark.parametrize(
    ("readout", "global_pool"),
    [("middle", "avg"), ("double", "token"), ("mean", "avg"), ("head", "max"), ("head", "avgmax")],
)
def test_pools_read_what_they_say(readout: str, global_pool: str) -> None:
    model = create(readout=readout, global_pool=global_pool)
    images = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(images)
    patches = tokens[:, model.num_prefix_tokens :]
    expected = {
        "token": tokens[:, : model.num_prefix_tokens].mean(1),
        "avg": patches.mean(1),
        "max": patches.amax(1),
        "avgmax": (patches.mean(1) + patches.amax(1)) / 2,
    }
    torch.testing.assert_close(model(images), model.head(expected[global_pool]))


def test_without_pool_every_token_is_returned() -> None:
    model, images = create(num_classes=0, global_pool=""), torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), model.forward_features(images))


def test_pairs_of_blocks_are_one_feature() -> None:
    model, images = create(bidirectional="layer"), torch.randn(1, 3, 64, 64)
    assert [info["module"] for info in model.feature_info] == ["blocks.1", "blocks.3"]
    for kind in ("getter", "list"):
        net = create(bidirectional="layer", features_only=True, feature_cls=kind)
        assert [tuple(one.shape) for one in net(images)] == [(1, 16, 4, 4)] * 2


def test_options_reach_the_model() -> None:
    model = create(in_chans=1, img_size=(32, 64), drop_rate=0.1, drop_path_rate=0.3, d_state=8)
    config = model.config
    assert (config.in_channels, config.resolved_image_size, config.d_state) == (1, (32, 64), 8)
    assert (model.head_drop.p, model.drop_path.drop_prob) == (0.1, 0.3)
    assert model(torch.randn(2, 1, 32, 64)).shape == (2, 5)


def test_device_and_dtype_are_honoured() -> None:
    model = create(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"imgsize": 64}, TypeError, "has no option 'imgsize'; valid: img_size, patch_size"),
        ({"output_stride": 8}, TypeError, "has no option 'output_stride'"),
        ({"global_pool": "map"}, ValueError, "global_pool must be one of 'token', 'avg', "),
        ({"global_pool": "token", "readout": "mean"}, ValueError, "with readout 'mean'; got 'tok"),
        ({"readout": "last"}, ValueError, "no counterpart of readout 'last'"),
        ({"drop_path_rate": 2}, ValueError, "drop_path must be between 0 and 1; got 2"),
    ],
)
def test_wrong_options_are_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        create(**options)


def test_wrong_form_of_intermediates_is_refused() -> None:
    with pytest.raises(ValueError, match="'NCHW' or 'NLC'; got 'NHWC'"):
        create().forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NHWC")


@pytest.mark.parametrize(
    "options", [{}, {"readout": "double", "bidirectional": "layer"}, {"readout": "mean"}]
)
def test_graph_of_torch_fx_gives_the_same_logits(options) -> None:
    model, images = create(stride=8, **options), torch.randn(2, 3, 48, 80)
    graph = GraphExtractNet(model, ["head"])
    logits = graph(images)
    torch.testing.assert_close(logits, model(images), **SAME)
    logits.mean().backward()
    assert [n for n, p in graph.named_parameters() if p.grad is None] == []


def test_compiles_as_one_graph() -> None:
    model, images = create(depth=2), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), **SAME)


def test_exports_as_one_program() -> None:
    model, images = create(depth=2), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images), **SAME)


def test_feature_nets_can_be_optimized() -> None:
    net, images = create(features_only=True), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(visionmamba.optimize(net)(images), net(images), **SAME)


# Groups of parameters.


def test_layers_decay_from_head_to_stem() -> None:
    model = create()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: math.log(scale[id(p)], 0.5) for name, p in model.named_parameters()}
    expected = {"head": 0, "norm": 1, "blocks.3": 1, "blocks.2": 2, "blocks.1": 3, "blocks.0": 4}
    expected |= {"patch_embedding": 5, "class_token": 5, "position_embedding": 5}
    for name, power in found.items():
        prefix = next(prefix for prefix in expected if name.startswith(prefix))
        assert power == pytest.approx(expected[prefix]), name


def test_tokens_and_vectors_do_not_decay() -> None:
    model = create()
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.1)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in decayed}
    assert {"class_token", "position_embedding.weight", "norm.weight", "head.bias"} <= names
    assert all(
        p.ndim == 1 for n, p in model.named_parameters() if n in names - model.no_weight_decay()
    )


def test_coarse_groups_are_stem_blocks_and_head() -> None:
    model = create()
    groups = group_parameters(model, model.group_matcher(coarse=True))
    assert [names[0].split(".")[0] for names in groups.values()] == [
        "class_token",
        "blocks",
        "head",
    ]


# Weights.


def published_overlay(folder: Path, **entries: object) -> dict[str, object]:
    """Where timm shall find golden weights in the authors' format, as if they were released."""
    file = folder / "published.pth"
    torch.save(entries, file)
    return {"file": str(file), "num_classes": 10}


def test_published_checkpoint_gives_the_published_logits(tmp_path: Path) -> None:
    _, state, images, logits, _ = golden_case("v2_mid_div2")
    args = argparse.Namespace(model="vim_tiny_patch16_224", input_size=64)
    overlay = published_overlay(tmp_path, model=state, args=args) | {"custom_load": True}
    model = create(**GOLDEN, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model(images), logits, **PUBLISHED)


def test_published_state_dict_gives_the_published_logits(tmp_path: Path) -> None:
    _, state, images, logits, _ = golden_case("v2_mid_div2")
    overlay = published_overlay(tmp_path, **state)
    model = create(**GOLDEN, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model(images), logits, **PUBLISHED)


@pytest.mark.parametrize("custom_load", [True, False])
def test_published_weights_fit_other_classes_channels_and_sizes(
    tmp_path: Path, custom_load: bool
) -> None:
    _, state, _, _, _ = golden_case("v2_mid_div2")
    overlay = published_overlay(tmp_path, **state) | {"custom_load": custom_load}
    options = {**GOLDEN, "num_classes": 3, "in_chans": 1, "img_size": (64, 96)}
    model = create(**options, pretrained=True, pretrained_cfg_overlay=overlay)
    summed = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embedding.weight.data, summed)
    class_row = state["pos_embed"][:, 8]
    torch.testing.assert_close(model.position_embedding.weight.data[:, 12], class_row)
    assert model(torch.randn(1, 1, 64, 96)).shape == (1, 3)


def test_feature_nets_take_published_weights(tmp_path: Path) -> None:
    _, state, images, _, _ = golden_case("v2_mid_div2")
    options = {"pretrained": True, "pretrained_cfg_overlay": published_overlay(tmp_path, **state)}
    whole = create(**GOLDEN, **options)
    expected = whole.forward_intermediates(images, [3], intermediates_only=True)
    for kind in ("getter", "list"):
        net = create(
            **GOLDEN, **options, features_only=True, feature_cls=kind, out_indices=(3,)
        ).eval()
        torch.testing.assert_close(net(images), expected)


@pytest.mark.parametrize("custom_load", [True, False])
def test_own_weights_fit_another_picture_size(tmp_path: Path, custom_load: bool) -> None:
    source = create(img_size=64)
    file = tmp_path / "vim.safetensors"
    visionmamba.save(source, file)
    overlay = {"file": str(file), "num_classes": 5, "custom_load": custom_load}
    model = create(img_size=96, pretrained=True, pretrained_cfg_overlay=overlay)
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(model(images), source(images), **SAME)


def test_saved_for_the_hub_it_comes_back(tmp_path: Path) -> None:
    model, images = create(in_chans=1, img_size=(32, 64)), torch.randn(2, 1, 32, 64)
    options = {**NARROW, "in_chans": 1, "img_size": (32, 64)}
    timm.models.save_for_hf(model, str(tmp_path), model_args=options)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(again, TimmVim)
    assert torch.equal(again(images), model(images))
