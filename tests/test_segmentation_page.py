"""The page on segmentation: its blocks run with small models, its options and numbers exist."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.recipes.segmenters import small_recipe
from tests.test_readme import BLOCK, ROOT, commands
from visionmamba import recipes
from visionmamba.cli import main
from visionmamba.cli.train import _parse_train
from visionmamba.recipes import (
    RECIPES,
    SegmentationRecipe,
    vim_small_upernet_ade20k,
    vim_tiny_upernet_ade20k,
)

pytestmark = pytest.mark.once

PAGE = ROOT / "docs" / "segmentation.md"
OF_OTHER_COMMANDS = {
    *("--nproc-per-node", "--split", "--scales", "--flip", "--mode", "--crop-size", "--stride"),
    *("--num-windows", "--out", "--models", "--label"),
}
SMALLER = (
    *("--epochs", "1", "--epoch-steps", "2", "--batch-size", "2", "--model.head", "segmenter"),
    *("--model.backbone.d-model", "16", "--model.backbone.depth", "1"),
    *("--preprocessing.crop-size", "64", "96", "--model.backbone.image-size", "64", "96"),
)


def vim_shapes() -> SegmentationRecipe:
    """A tiny model in the place of the recipe's."""
    recipe = small_recipe()
    return replace(recipe, model=replace(recipe.model, head="segmenter"))


def make_readers_files(folder: Path) -> None:
    """street/ with two pictures a split, and street.jpg."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / "street" / split / kind).mkdir(parents=True)
        for number in range(2):
            place = folder / "street" / split
            pixels = generator.integers(0, 256, (48, 80, 3), np.uint8)
            Image.fromarray(pixels).save(place / "images" / f"{number}.jpg")
            mask = np.repeat(np.arange(4, dtype=np.uint8) % 3, 20)[None].repeat(48, axis=0)
            Image.fromarray(mask).save(place / "masks" / f"{number}.png")
    (folder / "street" / "classes.txt").write_text("road\nsky\ncar\n")
    Image.fromarray(pixels).save(folder / "street.jpg")


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_readers_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "vim_shapes", vim_shapes)
    monkeypatch.setattr(recipes, "vim_shapes", vim_shapes)
    names: dict[str, object] = {}
    for language, block in BLOCK.findall(PAGE.read_text()):
        if language == "python":
            exec(compile(block, PAGE.name, "exec"), names)
        elif language == "bash":
            for program, *arguments in commands(block):
                assert program == "visionmamba"
                shortened = SMALLER if arguments[:2] == ["train", "vim_camvid"] else ()
                assert main([*arguments, *shortened]) == 0, arguments
    assert {path.name for path in Path("found").iterdir()} == {
        "street.json",
        "street_mask.png",
        "street_overlay.png",
    }


def test_commands_that_are_not_run_are_understood() -> None:
    blocks = [block for language, block in BLOCK.findall(PAGE.read_text()) if language == "sh"]
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    trained = [words[words.index("train") + 1 :] for words in lines if "train" in words]
    assert [words[0] for words in trained] == ["vim_tiny_upernet_ade20k", "vim_camvid"]
    parsed = [_parse_train(name, RECIPES[name], given)[0] for name, *given in trained]
    assert parsed[0] == vim_tiny_upernet_ade20k()
    assert parsed[1].data == type(parsed[1].data)(root=Path("cityscapes"))


def options_of(recipe: str) -> set[str]:
    with pytest.raises(ValueError, match="valid options: ") as caught:
        _parse_train(recipe, RECIPES[recipe], ["--out", "x", "--no-such-option", "1"])
    return set(str(caught.value).split("valid options: ")[1].split(", "))


def test_every_option_on_the_page_exists() -> None:
    named = set(re.findall(r"--[a-z][a-z0-9.-]*", PAGE.read_text())) - OF_OTHER_COMMANDS
    valid = options_of("vim_camvid") | options_of("vim_tiny_upernet_ade20k")
    assert {option for option in named if option.rstrip(".") != "--data"} <= valid


def test_every_recipe_is_on_the_page_with_its_parameters() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines()]
    told = {row[0].strip(" `"): row[2].strip() for row in rows if len(row) == 5}
    for name, make in RECIPES.items():
        recipe = make()
        if isinstance(recipe, SegmentationRecipe):
            with torch.device("meta"):
                model = recipe.model.build()
            assert told[name] == f"{sum(one.numel() for one in model.parameters()):,}", name


def test_table_of_hyper_parameters_is_that_of_the_recipes() -> None:
    rows = [line.strip("|").split(" | ") for line in PAGE.read_text().splitlines()]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 4}
    columns = (
        vim_tiny_upernet_ade20k(),
        vim_small_upernet_ade20k(),
        vim_small_upernet_ade20k(variant="paper"),
    )
    assert table["pictures in a step"] == [str(one.batch_size) for one in columns]
    assert table["steps"] == [str(one.epochs * (one.epoch_steps or 0)) for one in columns]
    optimizers = [one.optimizer for one in columns]
    assert table["peak learning rate"] == [str(one.lr) for one in optimizers]
    assert table["weight decay"] == [str(one.weight_decay) for one in optimizers]
    assert table["layer decay"] == [str(one.layer_decay or "none") for one in optimizers]
