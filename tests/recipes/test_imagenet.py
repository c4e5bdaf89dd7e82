"""The recipes for ImageNet: the published numbers, and where paper and script differ."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visionmamba.data import Augmentation, Digits, Mixing, Preprocessing
from visionmamba.models import VimConfig, save
from visionmamba.recipes import (
    RECIPES,
    deit_small_imagenet,
    deit_tiny_imagenet,
    vim_base_imagenet,
    vim_base_long_imagenet,
    vim_small_imagenet,
    vim_small_long_imagenet,
    vim_tiny_imagenet,
    vim_tiny_long_imagenet,
)

pytestmark = pytest.mark.once

NAMES = [name for name in RECIPES if name.endswith("_imagenet")]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_changed_as_published(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.augmentation == Augmentation(
        min_crop_area=0.08,
        horizontal_flip=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=0.3,
        erase_probability=0.25,
        repeats=3,
    )
    assert recipe.mixing == Mixing(mixup=0.8, cutmix=1.0, probability=1.0, switch_probability=0.5)
    assert recipe.label_smoothing == 0.1
    assert recipe.ema_decay == 0.99996


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_judged_as_published(name: str) -> None:
    preprocessing = RECIPES[name]().preprocessing
    assert preprocessing.size == (224, 224)
    assert preprocessing.crop_fraction == 224 / 256
    assert preprocessing.interpolation == "bicubic"


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_is_the_published_one(name: str) -> None:
    optimizer = RECIPES[name]().optimizer
    assert optimizer.schedule == "published"
    assert (optimizer.betas, optimizer.eps, optimizer.clip_norm) == ((0.9, 0.999), 1e-8, None)
    assert optimizer.decay_a_log
    assert (optimizer.warmup_epochs, optimizer.min_lr) == (5, 1e-5)


def lr_of(name: str, epoch: int) -> float:
    recipe = RECIPES[name]()
    optimizer = recipe.optimizer
    return optimizer.lr * optimizer.published_lr_share(epoch, epochs=recipe.epochs)


@pytest.mark.parametrize("name", [name for name in NAMES if "long" not in name])
def test_learning_rate_climbs_from_a_millionth_and_ends_low(name: str) -> None:
    assert RECIPES[name]().epochs == 300
    rates = [lr_of(name, epoch) for epoch in (0, 1, 2, 150, 299)]
    cosine = 1e-5 + 0.5 * (1e-3 - 1e-5)
    assert rates == pytest.approx([1e-6, 1e-6, 1e-6 + (1e-3 - 1e-6) / 5, cosine, 1e-5], rel=0.02)


@pytest.mark.parametrize("name", [name for name in NAMES if "long" in name])
def test_long_fine_tunes_learn_at_one_rate(name: str) -> None:
    assert RECIPES[name]().epochs == 30
    rates = [lr_of(name, epoch) for epoch in (0, 1, 6, 29)]
    assert rates == pytest.approx([1e-5] * 4)
    assert RECIPES[name]().optimizer.weight_decay == 1e-8


def test_paper_and_script_differ_where_they_are_known_to() -> None:
    tiny = vim_tiny_imagenet("script"), vim_tiny_imagenet("paper")
    assert [recipe.optimizer.weight_decay for recipe in tiny] == [0.1, 0.05]
    assert replace(tiny[0], optimizer=tiny[1].optimizer) == tiny[1]
    small = vim_small_imagenet("script"), vim_small_imagenet("paper")
    assert [recipe.batch_size for recipe in small] == [512, 1024]
    assert replace(small[0], batch_size=1024) == small[1]


def test_sizes_are_the_published_ones() -> None:
    assert vim_tiny_imagenet().model == VimConfig.tiny()
    assert vim_small_imagenet().model == VimConfig.small(drop_path=0.05)
    assert vim_base_imagenet().model == VimConfig.base(drop_path=0.1)
    assert vim_tiny_long_imagenet().model == VimConfig.tiny(stride=8)
    assert vim_small_long_imagenet().model == VimConfig.small(stride=8)
    assert vim_base_long_imagenet().model == VimConfig.base(stride=8)


def test_deit_differs_from_vim_in_its_own_drop_path_and_weight_decay_only() -> None:
    for vim, deit in (
        (vim_tiny_imagenet("paper"), deit_tiny_imagenet()),
        (vim_small_imagenet("paper"), deit_small_imagenet()),
    ):
        assert deit.model.drop_path == 0.1
        assert replace(deit, name=vim.name, model=vim.model) == vim


def test_long_model_starts_from_the_short_ones_weights(tmp_path: Path) -> None:
    config = VimConfig(
        image_size=64, patch_size=16, in_channels=1, d_model=16, depth=1, num_classes=10
    )
    short = config.build()
    save(short, tmp_path / "short.safetensors")
    recipe = vim_tiny_long_imagenet(str(tmp_path / "short.safetensors"))
    recipe = replace(
        recipe,
        data=Digits(),
        model=replace(config, stride=4),
        preprocessing=Preprocessing(image_size=64, mean=(0.5,), std=(0.5,), channels="L"),
        batch_size=8,
    )
    long = recipe.build().task.model
    old = short.position_embedding.weight[0]
    new = long.position_embedding.weight[0]
    assert (old.shape, new.shape) == ((17, 16), (13 * 13 + 1, 16))
    assert torch.equal(new[13 * 13 // 2], old[8])
    expected = torch.nn.functional.interpolate(
        torch.cat((old[:8], old[9:])).T.reshape(1, 16, 4, 4), size=(13, 13), mode="bicubic"
    )
    patches = torch.cat((new[: 13 * 13 // 2], new[13 * 13 // 2 + 1 :]))
    torch.testing.assert_close(patches, expected[0].flatten(1).T, atol=1e-5, rtol=1e-5)
    assert torch.equal(long.head.weight, short.head.weight)
