"""The recipes: what they promise before they are run, and that they learn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionmamba.data import Preprocessing
from visionmamba.recipes import RECIPES, digits_deit, digits_vim
from visionmamba.training import fit


def num_parameters(recipe_name: str) -> int:
    model = RECIPES[recipe_name]().model.build()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_vim_and_deit_have_equal_parameters(data: str) -> None:
    ratio = num_parameters(f"{data}_vim") / num_parameters(f"{data}_deit")
    assert ratio == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("vim", "deit"),
    [
        ("digits_vim", "digits_deit"),
        ("folder_vim", "folder_deit"),
        ("vim_tiny_cifar10", "deit_tiny_cifar10"),
        ("vim_tiny_imagenette", "deit_tiny_imagenette"),
    ],
)
def test_vim_and_deit_differ_in_name_and_model_only(vim: str, deit: str) -> None:
    one, twin = RECIPES[vim](), RECIPES[deit]()
    assert replace(twin, name=one.name, model=one.model) == one


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_bears_its_name_and_says_how_it_is_run(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert f"visionmamba train {name}" in (RECIPES[name].__doc__ or "")


def test_number_of_classes_comes_from_the_data(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (20, 20)).save(tmp_path / split / name / f"{number}.png")
    recipe = RECIPES["folder_vim"]()
    recipe = replace(recipe, data=replace(recipe.data, root=tmp_path), batch_size=2)
    recipe = replace(recipe, model=replace(recipe.model, d_model=16, depth=1))
    experiment = recipe.build()
    assert experiment.data_summary["class_names"] == ["a", "b", "c"]
    images = next(iter(experiment.train_batches)).to("cpu").images
    assert experiment.task.model(images).shape == (2, 3)


def test_model_and_preprocessing_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.image_size \(8, 8\) and preprocessing.image_size"):
        replace(digits_vim(), preprocessing=replace(digits_vim().preprocessing, image_size=16))


def test_model_and_preprocessing_of_other_channels_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model\.in_channels=1 does not fit preprocessing\.channels"
    ):
        replace(digits_vim(), preprocessing=Preprocessing(image_size=8))


@pytest.mark.parametrize("field", ["epochs", "batch_size", "log_every_steps"])
def test_counts_below_one_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        replace(digits_deit(), **{field: 0})


def accuracy_after_four_epochs(out: Path) -> float:
    recipe = replace(digits_vim(), epochs=4, model=replace(digits_vim().model, depth=2))
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, warmup_epochs=1))
    return fit(recipe, out, device="cpu", progress=False).metrics["val_accuracy"]


@pytest.mark.once
@pytest.mark.slow
def test_vim_learns_the_digits(tmp_path: Path) -> None:
    assert accuracy_after_four_epochs(tmp_path / "run") > 0.8


@pytest.mark.once
@pytest.mark.slow
def test_vim_learns_nothing_from_shuffled_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn import datasets

    bunch = datasets.load_digits()
    bunch.target = np.random.default_rng(0).permutation(bunch.target)
    monkeypatch.setattr(datasets, "load_digits", lambda: bunch)
    assert accuracy_after_four_epochs(tmp_path / "run") < 0.3


def test_weights_are_drawn_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first = digits_vim().build().task.model.state_dict()
    torch.manual_seed(5)
    again = digits_vim().build().task.model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
