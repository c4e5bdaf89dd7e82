"""`visionmamba train` for segmenters as a user meets it: sources, and the usual mistakes."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.test_cli_train import Output, complaint
from visionmamba.cli import main
from visionmamba.models import SegmenterConfig, VimConfig, save

pytestmark = pytest.mark.once


@pytest.fixture
def street(tmp_path: Path) -> Path:
    root = tmp_path / "street"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 36), "gray").save(root / split / "images" / f"{number}.jpg")
            Image.new("L", (40, 36), number).save(root / split / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("road\nsky\n")
    return root


@pytest.fixture
def command(street: Path, tmp_path: Path) -> list[str]:
    return [
        *("train", "vim_camvid", "--data.root", str(street), "--out", str(tmp_path / "run")),
        *("--epochs", "1", "--epoch-steps", "1", "--batch-size", "2", "--device", "cpu"),
        *("--model.head", "segmenter", "--model.backbone.d-model", "16"),
        *("--model.backbone.depth", "1", "--preprocessing.crop-size", "32", "32"),
        *("--model.backbone.image-size", "32", "32", "--quiet"),
    ]


def test_trains_a_folder_and_says_its_mean_iou(
    command: list[str], tmp_path: Path, capsys: Output
) -> None:
    assert main(command) == 0
    assert "val_miou" in capsys.readouterr().out
    assert (tmp_path / "run" / "classes.csv").exists()


def test_sources_are_those_with_masks(tmp_path: Path, capsys: Output) -> None:
    given = ["train", "vim_shapes", "--out", str(tmp_path / "run")]
    ade20k = ["--source", "ade20k", "--data.root", str(tmp_path / "none")]
    assert f"there is no folder {tmp_path / 'none'}" in complaint([*given, *ade20k], capsys)
    assert "ade20k" in complaint([*given, "--source", "digits"], capsys)
    assert "folder" in complaint(["train", "finetune", *given[2:], "--source", "ade20k"], capsys)


def test_missing_mask(command: list[str], street: Path, tmp_path: Path, capsys: Output) -> None:
    (street / "train" / "masks" / "1.png").unlink()
    sentence = complaint(command, capsys)
    assert f"{street / 'train' / 'images' / '1.jpg'} has no mask" in sentence
    assert not (tmp_path / "run").exists()


def test_mask_of_another_size(command: list[str], street: Path, capsys: Output) -> None:
    Image.new("L", (20, 18)).save(street / "train" / "masks" / "0.png")
    assert "0.png is 20x18 px, its picture" in complaint(command, capsys)


def test_class_number_out_of_range(command: list[str], street: Path, capsys: Output) -> None:
    Image.new("L", (40, 36), 7).save(street / "train" / "masks" / "0.png")
    sentence = complaint(command, capsys)
    assert "0.png holds the number 7 at row 0, column 0" in sentence
    assert "none of the 2 classes" in sentence


def test_segmenter_of_other_classes(command: list[str], tmp_path: Path, capsys: Output) -> None:
    backbone = VimConfig(image_size=32, d_model=16, depth=1, readout="mean")
    model = SegmenterConfig(backbone=backbone, num_classes=5, head="segmenter").build()
    path = tmp_path / "five.safetensors"
    save(model, path, task="segmentation", class_names=tuple("abcde"))
    sentence = complaint([*command, "--weights", str(path)], capsys)
    assert sentence.startswith(f"{path} holds a segmenter of 5 classes and the data have 2; ")
    assert main([*command, "--weights", str(path), "--backbone-only"]) == 0


def test_memory_that_runs_out(
    command: list[str], tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "visionmamba.models.SegmentationModel.forward", lambda self, images: torch.empty(1 << 60)
    )
    assert main(command) == 1
    assert "a batch of 2 images does not fit into the memory" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
