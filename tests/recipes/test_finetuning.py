"""Learning one's own folder from published weights, own ones, or none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.published import drawn_weights, published_shapes
from visionmamba.data import Preprocessing
from visionmamba.models import VimConfig, hub, save
from visionmamba.recipes import Recipe, finetune
from visionmamba.recipes.finetuning import PUBLISHED_CONFIGS
from visionmamba.training import fit

pytestmark = pytest.mark.once

CONFIG = VimConfig(image_size=32, patch_size=8, d_model=16, depth=2, num_classes=3)
PREPARATION = Preprocessing(image_size=32, crop_fraction=0.9, mean=(0.5,) * 3, std=(0.25,) * 3)
EASY_ACCURACY = 0.9


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.safetensors"
    names = ("a", "b", "c")
    save(CONFIG.build(), path, class_names=names, preprocessing=PREPARATION.to_dict())
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Red and blue noise, 40 to learn from and 20 to judge."""
    for split, count in (("train", 20), ("val", 10)):
        for label, name in enumerate(("blue", "red")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                stream = np.random.default_rng((label, number, count))
                pixels = stream.integers(0, 120, (24, 32, 3), np.uint8)
                pixels[:, :, 0 if name == "red" else 2] += 130
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def small(recipe: Recipe) -> Recipe:
    return replace(recipe, batch_size=8, epochs=1)


def test_model_and_preparation_are_those_of_the_weights(own: Path) -> None:
    recipe = finetune(weights=own)
    assert recipe.model == replace(CONFIG, image_size=(32, 32), drop_path=0.05)
    assert recipe.preprocessing == replace(PREPARATION, image_size=(32, 32))


def test_head_is_new_and_blocks_are_the_weights(own: Path, photos: Path) -> None:
    model = small(finetune(photos, weights=own)).build().task.model
    held = hub.from_pretrained(own).state_dict()
    assert model.head.weight.shape == (2, 16)
    found = model.state_dict()
    assert all(torch.equal(found[name], held[name]) for name in held if "head." not in name)


def test_size_of_the_pictures_can_be_chosen(own: Path, photos: Path) -> None:
    recipe = small(finetune(photos, weights=own, image_size=48))
    experiment = recipe.build()
    assert next(iter(experiment.train_batches)).pixels.shape == (8, 48, 48, 3)
    assert experiment.task.model.position_embedding.weight.shape == (1, 37, 16)


def test_layers_learn_the_slower_the_lower(own: Path, photos: Path) -> None:
    recipe = small(finetune(photos, weights=own))
    scales = recipe.optimizer.layer_scales(recipe.build().task.model)
    assert scales["head.weight"] == 1
    assert scales["blocks.1.mixer.in_proj.weight"] == pytest.approx(0.9)
    assert scales["blocks.0.mixer.in_proj.weight"] == pytest.approx(0.9**2)
    assert scales["patch_embedding.weight"] == pytest.approx(0.9**3)


def test_authors_file_is_taken(tmp_path: Path, photos: Path) -> None:
    options = {"embed_dim": 16, "depth": 2, "num_classes": 5, "img_size": 64, "patch_size": 16}
    torch.save({"model": drawn_weights(published_shapes(options), 0)}, tmp_path / "vim.pth")
    recipe = small(finetune(photos, weights=tmp_path / "vim.pth"))
    assert (recipe.model.d_model, recipe.preprocessing.size) == (16, (64, 64))
    assert recipe.build().task.model.head.weight.shape == (2, 16)


@pytest.mark.parametrize("name", list(PUBLISHED_CONFIGS))
def test_published_weights_need_no_download_to_be_understood(name: str) -> None:
    recipe = finetune(weights=name)
    assert recipe.weights == name
    assert recipe.model == replace(PUBLISHED_CONFIGS[name], drop_path=0.05)


def test_no_weights_start_from_a_size_without_layer_decay() -> None:
    recipe = finetune(weights=None, size="small", image_size=96)
    assert recipe.model == VimConfig.small(image_size=96, drop_path=0.05)
    assert recipe.optimizer.layer_decay is None


def test_weights_that_say_nothing_of_pictures_are_refused(tmp_path: Path) -> None:
    save(CONFIG.build(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not say how pictures are prepared"):
        finetune(weights=tmp_path / "w.safetensors")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is missing"):
        finetune(weights=tmp_path / "none.safetensors")


def accuracy(out: Path, photos: Path, own: Path) -> float:
    recipe = replace(finetune(photos, weights=own), epochs=6, batch_size=8)
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, lr=5e-3, warmup_epochs=1))
    return fit(recipe, out, device="cpu", progress=False).metrics["val_accuracy"]


def test_learns_colours(own: Path, photos: Path, tmp_path: Path) -> None:
    assert accuracy(tmp_path / "run", photos, own) > EASY_ACCURACY


def test_learns_the_opposite_from_exchanged_labels(own: Path, photos: Path, tmp_path: Path) -> None:
    train = photos / "train"
    (train / "red").rename(train / "kept")
    (train / "blue").rename(train / "red")
    (train / "kept").rename(train / "blue")
    assert accuracy(tmp_path / "run", photos, own) < 1 - EASY_ACCURACY


@pytest.mark.gpu
def test_learns_colours_on_a_gpu_in_low_precision(own: Path, photos: Path, tmp_path: Path) -> None:
    recipe = replace(finetune(photos, weights=own), epochs=6, batch_size=8, precision="bfloat16")
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, lr=5e-3, warmup_epochs=1))
    result = fit(recipe, tmp_path / "run", device="cuda", num_workers=2, progress=False)
    assert result.metrics["val_accuracy"] > EASY_ACCURACY
