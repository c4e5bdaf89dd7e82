"""What a recipe builds: the weights it starts from, and its batches shared by devices."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.small import small_recipe
from visionmamba.models import DeiTConfig, Vim, save
from visionmamba.models.embed import resize_grid
from visionmamba.recipes import digits_deit

pytestmark = pytest.mark.once


@pytest.fixture
def trained() -> Vim:
    """A Vim for the digits, as if it had been trained."""
    return replace(small_recipe().model, num_classes=10).build()


def test_run_starts_from_weights_with_other_classes(tmp_path: Path) -> None:
    weights = replace(small_recipe().model, num_classes=3).build()
    save(weights, tmp_path / "three.safetensors", class_names=("a", "b", "c"))
    recipe = small_recipe(weights=tmp_path / "three.safetensors")
    torch.manual_seed(0)
    model = recipe.build().task.model
    assert model.training
    assert torch.equal(
        model.get_parameter("blocks.0.mixer.in_proj.weight"),
        weights.get_parameter("blocks.0.mixer.in_proj.weight"),
    )
    assert model.get_parameter("head.weight").shape == (10, weights.config.d_model)


def test_run_starts_from_weights_of_another_image_size(trained: Vim, tmp_path: Path) -> None:
    save(trained, tmp_path / "digits.safetensors")
    recipe = small_recipe(weights=tmp_path / "digits.safetensors")
    larger = replace(
        recipe,
        model=replace(recipe.model, image_size=16),
        preprocessing=replace(recipe.preprocessing, image_size=16),
    )
    model = larger.build().task.model
    assert model.get_parameter("position_embedding.weight").shape[1] == 65


def test_deit_starts_from_a_deit(tmp_path: Path) -> None:
    recipe = replace(digits_deit(), epochs=1)
    model = replace(recipe.model, num_classes=3).build()
    save(model, tmp_path / "deit.safetensors")
    started = replace(recipe, weights=tmp_path / "deit.safetensors").build().task.model
    own, given = started.state_dict(), model.state_dict()
    assert torch.equal(own["blocks.0.attn.qkv.weight"], given["blocks.0.attn.qkv.weight"])
    assert own["head.weight"].shape[0] == 10


def test_deit_starts_at_half_the_stride_of_its_weights_and_at_another_size(tmp_path: Path) -> None:
    recipe = digits_deit()
    assert isinstance(recipe.model, DeiTConfig)
    model = recipe.model.build()
    save(model, tmp_path / "deit.safetensors")
    recipe = replace(
        recipe,
        weights=tmp_path / "deit.safetensors",
        model=replace(recipe.model, stride=1, image_size=10),
        preprocessing=replace(recipe.preprocessing, image_size=10),
    )
    own, given = recipe.build().task.model.state_dict(), model.state_dict()
    class_token, patches = given["pos_embed"][:, :1], given["pos_embed"][:, 1:]
    resized = resize_grid(patches, (4, 4), (9, 9))
    torch.testing.assert_close(own["pos_embed"], torch.cat((class_token, resized), dim=1))
    assert torch.equal(own["patch_embed.proj.weight"], given["patch_embed.proj.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_batch_size": 48}, r"batch_size=128 is no multiple of 96, which 2 devices take"),
        ({"batch_size": 127}, r"batch_size=127 cannot be shared equally by 2 devices"),
    ],
)
def test_batch_that_cannot_be_shared_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_recipe(**changes).build(num_ranks=2)
