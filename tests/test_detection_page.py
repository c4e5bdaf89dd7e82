"""The page on detection: its blocks run with small models, its options and numbers exist."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.recipes.detectors import folder_in_coco_format, small_recipe
from tests.test_readme import BLOCK, ROOT, commands
from visionmamba import recipes
from visionmamba.bench.detection import DetectionSpeed
from visionmamba.cli import main
from visionmamba.cli.options import parse
from visionmamba.cli.train import _parse_train
from visionmamba.data import DrawnObjects
from visionmamba.recipes import RECIPES, DetectionRecipe, vim_tiny_cascade_coco

pytestmark = pytest.mark.once

PAGE = ROOT / "docs" / "detection.md"
OF_OTHER_COMMANDS = {
    *("--nproc-per-node", "--mode", "--crop-size", "--out", "--resolutions", "--min-score"),
    "--images",
}
SMALLER = (
    *("--epochs", "1", "--epoch-steps", "2", "--batch-size", "2", "--model.head", "mask"),
    *("--model.backbone.d-model", "16", "--model.backbone.depth", "1", "--model.channels", "8"),
    *("--model.box-width", "8", "--model.num-proposals", "20", "--model.num-sampled", "8"),
    *("--preprocessing.image-size", "64", "--model.backbone.image-size", "64"),
)


def make_readers_files(folder: Path) -> None:
    """kitchen/ with drawn objects, and kitchen.jpg."""
    folder_in_coco_format(folder / "kitchen", num_train=4, num_val=2)
    DrawnObjects(num_train=2, num_val=1, image_size=96).open("val").image(0).save(
        folder / "kitchen.jpg"
    )


def small_objects() -> DetectionRecipe:
    """A tiny model in the place of the recipe's."""
    return replace(small_recipe(), name="vim_objects")


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_readers_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "vim_objects", small_objects)
    monkeypatch.setattr(recipes, "vim_objects", small_objects)
    monkeypatch.setattr(
        "visionmamba.data.object_sources.DrawnObjects",
        lambda: DrawnObjects(num_train=2, num_val=4, image_size=32),
    )
    names: dict[str, object] = {}
    for language, block in BLOCK.findall(PAGE.read_text()):
        if language == "python":
            exec(compile(block, PAGE.name, "exec"), names)
        elif language == "bash":
            for program, *arguments in commands(block):
                assert program == "visionmamba"
                if arguments[0] == "bench":
                    parse(DetectionSpeed, arguments[2:], prog="bench")
                    continue
                shortened = SMALLER if arguments[:2] == ["train", "vim_nuclei"] else ()
                assert main([*arguments, *shortened]) == 0, arguments
    assert {"kitchen.json", "kitchen_overlay.png", "coco_results.json", "coco_images.json"} <= {
        path.name for path in Path("found").iterdir()
    }


def test_commands_that_are_not_run_are_understood() -> None:
    blocks = [block for language, block in BLOCK.findall(PAGE.read_text()) if language == "sh"]
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    trained = [words[words.index("train") + 1 :] for words in lines if "train" in words]
    assert [words[0] for words in trained] == ["vim_tiny_cascade_coco"]
    (name, *given) = trained[0]
    assert _parse_train(name, RECIPES[name], given)[0] == vim_tiny_cascade_coco()


def options_of(recipe: str, *given: str) -> set[str]:
    with pytest.raises(ValueError, match="valid options: ") as caught:
        _parse_train(recipe, RECIPES[recipe], ["--out", "x", *given, "--no-such-option", "1"])
    return set(str(caught.value).split("valid options: ")[1].split(", "))


def test_every_option_on_the_page_exists() -> None:
    named = set(re.findall(r"--[a-z][a-z0-9.-]*", PAGE.read_text())) - OF_OTHER_COMMANDS
    valid = options_of("vim_nuclei") | options_of("vim_tiny_cascade_coco")
    valid |= options_of("deit_nuclei") | options_of("vim_objects")
    assert {option for option in named if option.rstrip(".") != "--data"} <= valid


def test_every_recipe_is_on_the_page_with_its_parameters() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines()]
    told = {row[0].strip(" `"): row[2].strip() for row in rows if len(row) == 5}
    for name, make in RECIPES.items():
        recipe = make()
        if isinstance(recipe, DetectionRecipe):
            with torch.device("meta"):
                model = recipe.model.build()
            assert told[name] == f"{sum(one.numel() for one in model.parameters()):,}", name


def test_table_of_hyper_parameters_is_that_of_the_recipes() -> None:
    rows = [line.strip("|").split(" | ") for line in PAGE.read_text().splitlines()]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 3}
    columns = vim_tiny_cascade_coco(), vim_tiny_cascade_coco(variant="paper")
    assert table["steps"] == [str(one.epochs * (one.epoch_steps or 0)) for one in columns]
    optimizers = [one.optimizer for one in columns]
    assert table["peak learning rate"] == [str(one.lr) for one in optimizers]
    assert table["layer decay"][0] == str(optimizers[0].layer_decay)
    assert optimizers[1].layer_decay is None
