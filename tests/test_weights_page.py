"""The page on weights: its blocks run, with a small model in the place of the published one.

`sh` blocks need a connection and are not run; the others are run as in the README.
"""

import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from tests.models.published import drawn_weights, published_shapes
from tests.test_readme import BLOCK, ROOT, commands
from visionmamba.cli import main
from visionmamba.models.released import PUBLISHED_MODELS

pytestmark = pytest.mark.once

PAGE = ROOT / "docs" / "weights.md"
OPTIONS = {"embed_dim": 16, "depth": 2, "num_classes": 1000, "img_size": 64, "patch_size": 16}


def make_readers_files(folder: Path) -> None:
    """The checkpoint, one picture of each of ImageNet's classes, and cat.jpg."""
    published = folder / "Vim-tiny-midclstok"
    published.mkdir()
    weights = drawn_weights(published_shapes(OPTIONS), seed=0)
    torch.save({"model": weights}, published / "vim_t_midclstok_76p1acc.pth")
    picture = Image.new("RGB", (8, 8), "gray")
    picture.save(folder / "cat.jpg")
    for synset in ImageNetInfo().label_names():
        place = folder / "imagenet" / "val" / synset
        place.mkdir(parents=True)
        picture.save(place / "ILSVRC2012_val_00000001.JPEG")


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_readers_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    page = PAGE.read_text().replace("\n   ", "\n")  # blocks stand in the list of steps, too
    for language, block in BLOCK.findall(page):
        if language == "python":
            exec(compile(textwrap.dedent(block), PAGE.name, "exec"), names)
        elif language == "bash":
            for program, *arguments in commands(block):
                assert program == "visionmamba"
                assert main(arguments) == 0, arguments


def test_table_is_that_of_the_package() -> None:
    page = PAGE.read_text()
    for model in PUBLISHED_MODELS:
        row = (
            f"| `{model.name}` | {model.top1} | {model.top5} | {model.size_mb} | "
            f"{model.repository} | {model.filename} |"
        )
        assert row in page
