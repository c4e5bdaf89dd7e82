"""`visionmamba train` as a user meets it: arguments of recipes, sources of data, usual mistakes."""

import inspect
import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionmamba.cli import main
from visionmamba.cli.train import RunOptions
from visionmamba.data import Preprocessing
from visionmamba.models import Vim, VimConfig, read_header, save
from visionmamba.training import fit

pytestmark = pytest.mark.once

Output = pytest.CaptureFixture[str]


def write_pictures(folder: Path, count: int = 4) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_pictures(tmp_path / "photos" / split / name)
    return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "own.safetensors"
    config = VimConfig(image_size=16, patch_size=8, d_model=16, depth=1, num_classes=3)
    save(config.build(), path, preprocessing=Preprocessing(image_size=16).to_dict())
    return path


@pytest.fixture
def command(photos: Path, weights: Path, tmp_path: Path) -> list[str]:
    return [
        *("train", "finetune", "--data.root", str(photos), "--weights", str(weights)),
        *("--epochs", "1", "--batch-size", "4", "--out", str(tmp_path / "run")),
        *("--device", "cpu", "--quiet"),
    ]


def complaint(given: Sequence[str], output: Output) -> str:
    """Returns the one sentence that a mistake ends in."""
    assert main(given) == 2
    lines = output.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("visionmamba: ")


def test_finetunes_a_folder_from_own_weights(
    command: list[str], tmp_path: Path, capsys: Output
) -> None:
    assert main([*command, "--image-size", "24"]) == 0
    assert "val_accuracy" in capsys.readouterr().out
    header = read_header(tmp_path / "run" / "best.safetensors")
    assert header.class_names == ("cat", "dog")
    assert header.preprocessing["image_size"] == [24, 24]
    assert header.config["image_size"] == 24


def test_arguments_of_a_recipe_are_options(tmp_path: Path, capsys: Output) -> None:
    given = ["train", "vim_tiny_imagenet", "--data.root", str(tmp_path / "none"), "--out", "x"]
    assert main([*given, "--variant", "paper"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert complaint([*given, "--variant", "authors"], capsys).startswith(
        "invalid choice 'authors' for argument '--variant'. Expected one of ('script', 'paper')"
    )


def test_help_shows_arguments_fields_and_source(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["train", "vim_small_imagenet", "--variant", "paper", "--help"])
    printed = capsys.readouterr().out
    for option in ("--variant {script,paper}", "--source {", "--ema-decay", "--devices INT"):
        assert option in printed
    assert "(default: paper)" in printed


def test_source_replaces_the_data_of_a_recipe(
    weights: Path, tmp_path: Path, capsys: Output
) -> None:
    given = ["train", "finetune", "--weights", str(weights), "--out", str(tmp_path / "run")]
    shards = ["--source", "shards", "--data.train", str(tmp_path / "none-*.tar")]
    assert "none-*.tar" in complaint([*given, *shards], capsys)
    assert "does not know --data.train" in complaint([*given, *shards[2:]], capsys)


# The usual mistakes. Nothing is left behind.


def test_folder_of_classes_without_halves(command: list[str], photos: Path, capsys: Output) -> None:
    shutil.move(photos / "train", photos.with_name("classes"))
    command[command.index(str(photos))] = str(photos.with_name("classes"))
    train = photos.with_name("classes") / "train"
    assert complaint(command, capsys) == (
        f"there is no folder {train}; wanted {train}/CLASS/*.jpg, one folder a class"
    )


def test_pictures_without_class_folders(command: list[str], photos: Path, capsys: Output) -> None:
    shutil.rmtree(photos / "train")
    write_pictures(photos / "train")
    assert complaint(command, capsys) == (
        f"{photos / 'train'} holds no class folders; wanted {photos / 'train'}/CLASS/*.jpg"
    )


def test_class_folders_one_too_deep(command: list[str], photos: Path, capsys: Output) -> None:
    shutil.move(photos / "train", photos / "deep")
    (photos / "train").mkdir()
    shutil.move(photos / "deep", photos / "train" / "images")
    assert f"class folder {photos / 'train' / 'images'} holds no images" in complaint(
        command, capsys
    )


def test_one_class(command: list[str], photos: Path, tmp_path: Path, capsys: Output) -> None:
    for split in ("train", "val"):
        shutil.rmtree(photos / split / "dog")
    assert complaint(command, capsys) == (f"{photos} holds one class, cat; wanted at least two")
    assert not (tmp_path / "run").exists()


def test_missing_val(command: list[str], photos: Path, capsys: Output) -> None:
    shutil.rmtree(photos / "val")
    assert complaint(command, capsys).startswith(f"there is no folder {photos / 'val'}; wanted ")


def test_empty_val(command: list[str], photos: Path, capsys: Output) -> None:
    shutil.rmtree(photos / "val")
    (photos / "val").mkdir()
    assert complaint(command, capsys) == (
        f"{photos / 'val'} holds no class folders; wanted {photos / 'val'}/CLASS/*.jpg"
    )


def test_empty_class_of_val(command: list[str], photos: Path, capsys: Output) -> None:
    shutil.rmtree(photos / "val" / "dog")
    (photos / "val" / "dog").mkdir()
    assert complaint(command, capsys).startswith(
        f"class folder {photos / 'val' / 'dog'} holds no images; add some "
    )


def test_other_classes_in_val(command: list[str], photos: Path, capsys: Output) -> None:
    (photos / "val" / "dog").rename(photos / "val" / "Dog")
    assert complaint(command, capsys) == (
        f"{photos} has 2 classes in train and 2 in val, which must be the same (only in train: "
        "dog; only in val: Dog); add or remove classes"
    )


def test_batch_larger_than_the_folder(command: list[str], capsys: Output) -> None:
    assert complaint([*command, "--batch-size", "64"], capsys).startswith(
        "batch_size=64 is larger than the training set of 8 "
    )


def test_other_classes_at_a_resume(
    command: list[str], photos: Path, tmp_path: Path, capsys: Output
) -> None:
    assert main(command) == 0
    capsys.readouterr()
    for split in ("train", "val"):
        write_pictures(photos / split / "eel")
    sentence = complaint(command, capsys)
    assert sentence.startswith(f"{tmp_path / 'run'} holds a run of another recipe (")
    assert "class_names is ['cat', 'dog'] there and ['cat', 'dog', 'eel'] here" in sentence
    assert sentence.endswith("repeat its options to go on with it, or give another --out")


def test_weights_of_another_make(command: list[str], capsys: Output) -> None:
    assert complaint([*command, "--model.d-model", "32"], capsys).startswith(
        "the weights have d_model 16, which loading cannot change; got 32"
    )


def test_weights_that_are_not_there(command: list[str], capsys: Output) -> None:
    sentence = complaint([*command, "--weights", "vim_tony"], capsys)
    assert "no file, folder or published model 'vim_tony'; published: vim_tiny" in sentence


def test_batch_that_devices_cannot_share(command: list[str], capsys: Output) -> None:
    assert complaint([*command, "--device-batch-size", "3"], capsys).startswith(
        "batch_size=4 is no multiple of 3, which 1 devices take at once"
    )


def test_several_machines_without_a_launcher(command: list[str], capsys: Output) -> None:
    assert complaint([*command, "--nodes", "2"], capsys).startswith(
        "nodes=2 needs a launcher on every machine; start with torchrun"
    )


def test_memory_that_runs_out(
    command: list[str], tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vim, "forward", lambda self, images: torch.empty(1 << 60))
    assert main(command) == 1
    assert capsys.readouterr().err.startswith(
        "visionmamba: a batch of 4 images does not fit into the memory of the CPU; lower "
        "device_batch_size, for example to 2"
    )
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite(command: list[str], weights: Path, capsys: Output) -> None:
    config = VimConfig(image_size=16, patch_size=8, d_model=16, depth=1, num_classes=3)
    model = config.build()
    torch.nn.init.constant_(model.norm.weight, float("inf"))
    save(model, weights, preprocessing=Preprocessing(image_size=16).to_dict())
    assert main(command) == 1
    sentence = capsys.readouterr().err
    assert "training stopped at step 1 with learning rate" in sentence
    assert "norm.weight" in sentence


def test_defaults_are_those_of_fit() -> None:
    taken = inspect.signature(fit).parameters
    options = {field.name: field.default for field in fields(RunOptions)}
    names = ("device", "devices", "nodes", "strategy", "checkpoint_every_steps", "cuda_graphs")
    assert {name: options[name] for name in names} == {name: taken[name].default for name in names}


def test_run_says_what_it_took(command: list[str], tmp_path: Path) -> None:
    assert main(command) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["world_size"], results["device_batch_size"]) == (1, 4)
    assert set(results["loader"]) == {"images_per_second", "waiting_share"}
