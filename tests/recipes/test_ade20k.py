"""The recipes for ADE20K and CamVid: the published numbers, and where paper and script differ."""

from dataclasses import replace

import pytest
import torch

from visionmamba.data import SegmentationAugmentation, SegmentationPreprocessing
from visionmamba.models import VimConfig
from visionmamba.recipes import (
    RECIPES,
    SegmentationRecipe,
    deit_camvid,
    deit_tiny_upernet_ade20k,
    vim_camvid,
    vim_small_upernet_ade20k,
    vim_tiny_upernet_ade20k,
)
from visionmamba.tasks import Inference

pytestmark = pytest.mark.once

NAMES = [name for name in RECIPES if name.endswith("_ade20k")]


def recipe_of(name: str, variant: str) -> SegmentationRecipe:
    recipe = RECIPES[name](variant=variant)
    assert isinstance(recipe, SegmentationRecipe)
    return recipe


@pytest.mark.parametrize("variant", ["script", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_pictures_optimizer_and_inference_are_the_published_ones(name: str, variant: str) -> None:
    recipe = recipe_of(name, variant)
    assert recipe.preprocessing == SegmentationPreprocessing(
        crop_size=512, short_side=512, max_long_side=2048
    )
    assert recipe.augmentation == SegmentationAugmentation(
        min_scale=0.5, max_scale=2.0, max_category_share=0.75, flip=0.5, photometric=True
    )
    assert recipe.inference == Inference(mode="slide", crop_size=512, stride=341)
    assert (recipe.auxiliary_weight, recipe.precision, recipe.ema_decay) == (0.4, "float32", None)
    optimizer = recipe.optimizer
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.min_lr) == ("linear", 1500, 0.0)
    assert optimizer.warmup_lr == pytest.approx(optimizer.lr * 1e-6)
    assert (optimizer.betas, optimizer.clip_norm) == ((0.9, 0.999), None)
    assert optimizer.decay_a_log
    assert optimizer.decay_embeddings
    model = recipe.model
    assert (model.head, model.num_classes, model.dropout) == ("upernet", 150, 0.1)
    assert model.auxiliary_channels == 256


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay", "layer_decay"),
    [
        ("vim_tiny_upernet_ade20k", 2e-4, 0.1, 0.92),
        ("vim_small_upernet_ade20k", 1e-4, 0.05, 0.95),
        ("deit_tiny_upernet_ade20k", 2e-4, 0.1, 0.92),
        ("deit_small_upernet_ade20k", 1e-4, 0.05, 0.95),
    ],
)
def test_script_and_paper_differ_as_published(
    name: str, lr: float, weight_decay: float, layer_decay: float
) -> None:
    script, paper = recipe_of(name, "script"), recipe_of(name, "paper")
    assert (script.optimizer.lr, script.optimizer.weight_decay) == (lr, weight_decay)
    assert (script.optimizer.layer_decay, paper.optimizer.layer_decay) == (layer_decay, None)
    assert (paper.optimizer.lr, paper.optimizer.weight_decay) == (6e-5, 0.01)
    assert (script.batch_size, paper.batch_size) == (32, 16)
    assert [one.epochs * (one.epoch_steps or 0) for one in (script, paper)] == [60_000, 160_000]


def test_heads_read_what_the_scripts_say() -> None:
    tiny, small = vim_tiny_upernet_ade20k(), vim_small_upernet_ade20k()
    assert (tiny.model.features, small.model.features) == ("mixer", "residual")
    backbones = tiny.model.backbone, small.model.backbone
    assert all(isinstance(backbone, VimConfig) for backbone in backbones)
    assert [backbone.rope for backbone in backbones if isinstance(backbone, VimConfig)] == [
        "none",
        "tokens+residual",
    ]
    assert vim_tiny_upernet_ade20k(variant="paper").model.features == "residual"


def test_layer_decay_reaches_every_block() -> None:
    recipe = vim_tiny_upernet_ade20k()
    with torch.device("meta"):
        model = replace(recipe.model, auxiliary_channels=8).build()
    scales = recipe.optimizer.layer_scales(model)
    assert scales["backbone.blocks.0.norm.weight"] == pytest.approx(0.92**24)
    assert scales["backbone.blocks.23.norm.weight"] == pytest.approx(0.92)
    assert scales["backbone.patch_embedding.weight"] == pytest.approx(0.92**25)
    others = {scale for name, scale in scales.items() if not name.startswith("backbone.")}
    assert others == {1.0}


def test_baseline_differs_in_name_model_and_weights_only() -> None:
    vim, deit = vim_tiny_upernet_ade20k(variant="paper"), deit_tiny_upernet_ade20k(variant="paper")
    assert replace(deit, name=vim.name, model=vim.model, weights=vim.weights) == vim


@pytest.mark.parametrize("weights", [None, "start.safetensors"])
def test_camvids_vim_and_deit_differ_in_name_and_backbone_only(weights: str | None) -> None:
    vim, deit = vim_camvid(weights=weights), deit_camvid(weights=weights)
    model = replace(deit.model, backbone=vim.model.backbone)
    assert replace(deit, name=vim.name, model=model) == vim


def test_camvids_rate_depends_on_the_start() -> None:
    drawn, trained = vim_camvid().optimizer, vim_camvid(weights="start.safetensors").optimizer
    assert (drawn.layer_decay, trained.layer_decay) == (None, 0.9)
    assert trained.lr < drawn.lr
