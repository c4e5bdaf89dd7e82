"""The README's promises: its code blocks run, in order, in one folder, as a reader would run them.

`python` blocks share their names; every line of a `bash` block is a visionmamba command; `sh`
blocks set a machine up, are not run, and may hold nothing else.
"""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.models.published import drawn_weights, published_shapes
from visionmamba.cli import main
from visionmamba.data import Digits
from visionmamba.models import VimConfig, hub
from visionmamba.recipes.finetuning import PUBLISHED_CONFIGS

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETS_UP = ("make", "pip")
NUM_PHOTOS = {"train": 32, "val": 4}
SHORTENED = {"finetune": 2, "vim_shapes": 1, "vim_objects": 1}
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "docs/reproduction.md",
    "docs/kernels.md",
    "docs/weights.md",
    "docs/training.md",
    "docs/segmentation.md",
    "docs/detection.md",
    "docs/log.md",
)


def blocks(document: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / document).read_text())


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def make_readers_files(folder: Path) -> None:
    """The pictures that a reader has: digit.png and photos/{train,val}/{sky,sea}/*.jpg."""
    Digits().build().val.image(0).save(folder / "digit.png")
    for split in ("train", "val"):
        for name, color in (("sky", "skyblue"), ("sea", "teal")):
            place = folder / "photos" / split / name
            place.mkdir(parents=True)
            for index in range(NUM_PHOTOS[split]):
                Image.new("RGB", (64 + index, 48), color).save(place / f"{index}.jpg")


def stand_in_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model in the place of the published Vim-Ti, as if it had been downloaded."""
    options = {"embed_dim": 16, "depth": 2, "num_classes": 1000, "img_size": 64, "patch_size": 16}
    config = VimConfig(image_size=64, patch_size=16, d_model=16, depth=2)
    checkpoint = folder / "downloaded.pth"
    torch.save({"model": drawn_weights(published_shapes(options), seed=0)}, checkpoint)
    monkeypatch.setattr(hub, "_download", lambda *_, **__: checkpoint)
    monkeypatch.setitem(PUBLISHED_CONFIGS, "vim_tiny_patch16_224", config)


def run(program: str, *arguments: str) -> None:
    """Runs a command of a document; some trainings for few epochs, whatever their recipes say."""
    assert program == "visionmamba"
    epochs = SHORTENED.get(arguments[1]) if arguments[0] == "train" else None
    shortened = () if epochs is None else ("--epochs", str(epochs))
    assert main([*arguments, *shortened]) == 0, arguments


@pytest.mark.once
def test_every_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_readers_files(tmp_path)
    stand_in_weights(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, block in blocks("README.md"):
        if language == "python":
            exec(compile(block, "README.md", "exec"), names)
        elif language == "bash":
            for words in commands(block):
                run(*words)


def test_blocks_that_are_not_run_only_set_up() -> None:
    found = [block for language, block in blocks("README.md") if language == "sh"]
    assert found
    assert {words[0] for block in found for words in commands(block)} <= set(SETS_UP)


def test_tables_are_those_of_the_last_measurement() -> None:
    update = runpy.run_path(str(ROOT / "docs" / "update_results.py"))
    for document in update["DOCUMENTS"]:
        assert update["with_results"](document.read_text()) == document.read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_pictures_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    local = [target for target in targets if "://" not in target]
    missing = [t for t in local if not ((ROOT / document).parent / t).exists()]
    assert missing == []
