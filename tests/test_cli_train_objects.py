"""`visionmamba train` for detectors as a user meets it: sources, and the usual mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.recipes.detectors import folder_in_coco_format
from tests.test_cli_train import Output, complaint
from visionmamba.cli import main

pytestmark = pytest.mark.once


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return folder_in_coco_format(tmp_path / "own", num_train=2, num_val=2)


@pytest.fixture
def command(own: Path, tmp_path: Path) -> list[str]:
    return [
        *("train", "vim_nuclei", "--data.root", str(own), "--out", str(tmp_path / "run")),
        *("--epochs", "1", "--epoch-steps", "1", "--batch-size", "2", "--device", "cpu"),
        *("--model.head", "mask", "--model.backbone.d-model", "16", "--model.channels", "8"),
        *("--model.backbone.depth", "1", "--model.box-width", "8", "--model.num-proposals", "20"),
        *("--preprocessing.image-size", "32", "--model.backbone.image-size", "32", "--quiet"),
    ]


def change(own: Path, split: str, **fields: Any) -> None:
    """Changes the first annotation of a split."""
    path = own / "annotations" / f"{split}.json"
    table = json.loads(path.read_text())
    table["annotations"][0] |= fields
    path.write_text(json.dumps(table))


def test_trains_a_folder_and_says_its_average_precision(
    command: list[str], tmp_path: Path, capsys: Output
) -> None:
    assert main(command) == 0
    assert "val_mask_ap50" in capsys.readouterr().out
    assert (tmp_path / "run" / "classes.csv").exists()


def test_sources_are_those_with_objects(tmp_path: Path, capsys: Output) -> None:
    given = ["train", "vim_objects", "--out", str(tmp_path / "run")]
    coco = ["--source", "coco", "--data.root", str(tmp_path / "none")]
    assert f"there is no folder {tmp_path / 'none'}" in complaint([*given, *coco], capsys)
    assert "coco" in complaint([*given, "--source", "shapes"], capsys)
    assert "shapes" in complaint(["train", "vim_shapes", *given[2:], "--source", "coco"], capsys)


def test_missing_picture(command: list[str], own: Path, tmp_path: Path, capsys: Output) -> None:
    (own / "train" / "0.png").unlink()
    assert str(own / "train" / "0.png") in complaint(command, capsys)


def test_unknown_category(command: list[str], own: Path, capsys: Output) -> None:
    change(own, "train", category_id=77)
    sentence = complaint(command, capsys)
    assert "77" in sentence
    assert "annotation 1" in sentence


def test_box_outside_of_the_picture(command: list[str], own: Path, capsys: Output) -> None:
    change(own, "val", bbox=[90, 90, 5, 5])
    assert "annotation 1" in complaint(command, capsys)


def test_picture_of_another_size(command: list[str], own: Path, capsys: Output) -> None:
    Image.new("RGB", (20, 18)).save(own / "train" / "0.png")
    assert "is 20x18 px, its annotations say 32x32; make both agree" in complaint(command, capsys)


def test_no_annotations(command: list[str], own: Path, capsys: Output) -> None:
    path = own / "annotations" / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    assert str(path) in complaint(command, capsys)
