"""The recipes for COCO: the published numbers, and where paper and script differ."""

import pytest
import torch

from visionmamba.data import DetectionAugmentation, DetectionPreprocessing
from visionmamba.models import VimConfig
from visionmamba.recipes import (
    RECIPES,
    DetectionRecipe,
    deit_tiny_cascade_coco,
    vim_tiny_cascade_coco,
)

pytestmark = pytest.mark.once

NAMES = ("vim_tiny_cascade_coco", "deit_tiny_cascade_coco")


def recipe_of(name: str, variant: str) -> DetectionRecipe:
    recipe = RECIPES[name](variant=variant)
    assert isinstance(recipe, DetectionRecipe)
    return recipe


@pytest.mark.parametrize("variant", ["script", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_pictures_heads_and_optimizer_are_the_published_ones(name: str, variant: str) -> None:
    recipe = recipe_of(name, variant)
    assert recipe.preprocessing == DetectionPreprocessing(image_size=1024)
    assert recipe.augmentation == DetectionAugmentation(
        min_scale=0.1, max_scale=2.0, horizontal_flip=0.5, vertical_flip=0.0
    )
    model = recipe.model
    assert (model.head, model.num_classes, model.channels, model.box_width) == (
        "cascade", 80, 256, 1024,
    )  # fmt: skip
    assert (model.anchor_sizes, model.num_proposals) == ((32, 64, 128, 256, 512), 1000)
    assert (model.num_sampled, model.score_threshold, model.max_detections) == (512, 0.05, 100)
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_norm) == (1e-4, 0.1, None)
    assert (optimizer.betas, optimizer.warmup_steps) == ((0.9, 0.999), 250)
    assert optimizer.warmup_lr == pytest.approx(optimizer.lr * 1e-3)
    assert optimizer.decay_a_log
    assert not optimizer.decay_embeddings
    assert (recipe.batch_size, recipe.precision) == (64, "bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_script_and_paper_differ_as_published(name: str) -> None:
    script, paper = recipe_of(name, "script"), recipe_of(name, "paper")
    assert [one.epochs * (one.epoch_steps or 0) for one in (script, paper)] == [184_375, 380_000]
    assert (script.optimizer.schedule, paper.optimizer.schedule) == ("drops", "linear")
    assert paper.optimizer.layer_decay is None


@pytest.mark.parametrize(
    ("step", "share"), [(163_888, 1.0), (163_889, 0.1), (177_545, 0.1), (177_546, 0.01)]
)
def test_the_script_divides_its_rate_by_ten_twice(step: int, share: float) -> None:
    recipe = vim_tiny_cascade_coco()
    weights = torch.nn.Linear(1, 1)
    optimizer = recipe.optimizer
    plain = type(optimizer)(
        lr=1.0, schedule=optimizer.schedule, drops_at=optimizer.drops_at, warmup_steps=250
    )
    _, schedule = plain.build(weights, steps_per_epoch=recipe.epoch_steps or 1, epochs=59)
    assert schedule.lr_lambdas[0](step) == pytest.approx(share)


def test_layer_decay_falls_as_far_over_vims_24_blocks_as_over_deits_12() -> None:
    ends = []
    for recipe, prefix in (
        (vim_tiny_cascade_coco(), "backbone.patch_embedding.weight"),
        (deit_tiny_cascade_coco(), "backbone.patch_embed.proj.weight"),
    ):
        with torch.device("meta"):
            model = recipe.model.build()
        scales = recipe.optimizer.layer_scales(model)
        ends.append(scales[prefix])
        others = {scale for name, scale in scales.items() if not name.startswith("backbone.")}
        assert others == {1.0}
    assert ends == pytest.approx([0.837**25, 0.7**13])


def test_vim_sees_everything_and_deit_windows() -> None:
    vim, deit = vim_tiny_cascade_coco(), deit_tiny_cascade_coco()
    assert isinstance(vim.model.backbone, VimConfig)
    assert vim.model.backbone.rope == "tokens+residual"
    paper = vim_tiny_cascade_coco(variant="paper").model.backbone
    assert isinstance(paper, VimConfig)
    assert paper.rope == "none"
    assert (deit.model.window_size, deit.model.num_global) == (14, 4)
