"""The command: what it prints, what it writes, and how a user's mistakes end."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tests.data.test_image_files import png_that_claims
from tests.models.published import drawn_weights, golden_case, published_shapes
from visionmamba.cli import main
from visionmamba.cli.classifiers import _print_evaluation
from visionmamba.cli.use import Predict
from visionmamba.data import MAX_PIXELS, Preprocessing
from visionmamba.models import VimConfig, load, load_published, save
from visionmamba.tasks import Evaluation

Output = pytest.CaptureFixture[str]

HELP_SECONDS = 2.0  # without torch; importing it alone takes longer


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    config = VimConfig(image_size=16, patch_size=8, d_model=16, depth=1, num_classes=2)
    preprocessing = Preprocessing(image_size=16).to_dict()
    save(config.build(), path, class_names=("cat", "dog"), preprocessing=preprocessing)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def complaint(output: Output) -> str:
    """Returns the sentence on stderr, which must be one line without a traceback."""
    lines = output.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("visionmamba: ")
    return lines[0].removeprefix("visionmamba: ")


def small_run(out: Path) -> list[str]:
    return [
        *("train", "digits_vim", "--out", str(out), "--epochs", "1", "--batch-size", "512"),
        *("--model.d-model", "16", "--model.depth", "1", "--device", "cpu", "--quiet"),
    ]


def test_help_appears_at_once_and_names_every_command() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "visionmamba", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - started < 10 * HELP_SECONDS
    assert " torch\n" not in done.stderr
    for command in ("train", "predict", "check", "models", "info", "demo", "ablate", "bench"):
        assert f"\n  {command} " in done.stdout


def test_version(capsys: Output) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("visionmamba ")


def test_train_lists_the_recipes(capsys: Output) -> None:
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("digits_vim", "folder_deit", "vim_tiny_imagenet", "finetune"):
        assert f"\n  {name} " in printed


def test_train_then_eval_then_predict(tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "run"
    assert main(small_run(out)) == 0
    assert "val_accuracy" in capsys.readouterr().out
    assert main(["eval", str(out / "last.safetensors"), "digits", "--out", str(tmp_path)]) == 0
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    results = json.loads((out / "results.json").read_text())
    assert evaluation["accuracy"] == pytest.approx(results["metrics"]["val_accuracy"])
    assert "top-1 " in capsys.readouterr().out
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    assert main(["predict", str(out / "last.safetensors"), str(tmp_path / "digit.png")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'digit.png'}: ")


def test_finished_run_says_so(tmp_path: Path, capsys: Output) -> None:
    assert main(small_run(tmp_path / "run")) == 0
    capsys.readouterr()
    assert main(small_run(tmp_path / "run")) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'run'} is finished (val_loss ")


def test_predict_json_holds_every_picture_of_a_folder(
    weights: Path, pictures: Path, capsys: Output
) -> None:
    folder = pictures / "cat"
    assert main(["predict", str(weights), str(folder), "--json", "--top-k", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(one["file"]).name for one in found] == ["0.png", "1.png", "2.png"]
    assert all(len(one["labels"]) == 1 for one in found)


def test_predict_says_what_imagenets_numbers_mean(
    tmp_path: Path, pictures: Path, capsys: Output
) -> None:
    config = VimConfig(image_size=16, patch_size=8, d_model=16, depth=1, num_classes=2)
    preprocessing = Preprocessing(image_size=16).to_dict()
    names = ("n01440764", "n99999999")
    path = tmp_path / "w.safetensors"
    save(config.build(), path, class_names=names, preprocessing=preprocessing)
    assert main(["predict", str(path), str(pictures / "cat" / "0.png")]) == 0
    output = capsys.readouterr().out
    assert "tench (n01440764) " in output and " n99999999 " in output


def test_predict_saves_files_of_equal_names_apart(
    weights: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = [str(pictures / name / "0.png") for name in ("cat", "dog")]
    assert main(["predict", str(weights), *given, "--out", str(out)]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0.json", "0.png", "0_2.json", "0_2.png"]


def test_predict_skips_and_reports_when_asked(
    weights: Path, pictures: Path, capsys: Output
) -> None:
    (pictures / "cat" / "1.png").write_text("buy milk")
    folder = str(pictures / "cat")
    assert main(["predict", str(weights), folder, "--json", "--on-unreadable", "skip"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 2
    assert "left out: " in printed.err
    assert "1.png is not an image" in printed.err


def test_eval_reports_each_class(weights: Path, pictures: Path, capsys: Output) -> None:
    assert main(["eval", str(weights), str(pictures), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " of 6 images at 16x16 px; " in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["cat", "dog"]


def test_eval_takes_the_authors_file_at_another_size(
    pictures: Path, tmp_path: Path, capsys: Output
) -> None:
    options = {"embed_dim": 16, "depth": 2, "num_classes": 2, "img_size": 64, "patch_size": 16}
    torch.save({"model": drawn_weights(published_shapes(options), 0)}, tmp_path / "vim.pth")
    for number, name in enumerate(("cat", "dog")):  # the file names no classes
        (pictures / name).rename(pictures / str(number))
    given = ["eval", str(tmp_path / "vim.pth"), str(pictures), "--device", "cpu"]
    assert main([*given, "--image-size", "48", "80", "--out", str(tmp_path / "out")]) == 0
    assert " of 6 images at 48x80 px; " in capsys.readouterr().out
    assert (tmp_path / "out" / "confusion.png").is_file()


def test_eval_shows_the_worst_of_many_classes(capsys: Output) -> None:
    names = tuple(f"class {number:02}" for number in range(40))
    confusion = np.diag(np.arange(40)) + np.diag(np.full(39, 5), 1)
    evaluation = Evaluation(
        accuracy=0.8,
        top5_accuracy=0.9,
        per_class=dict(zip(names, confusion.diagonal() / confusion.sum(axis=1), strict=True)),
        num_images=int(confusion.sum()),
        image_size=(224, 224),
        crop_fraction=0.875,
        images_per_second=1.0,
        model_images_per_second=2.0,
        class_names=names,
        confusion=confusion,
        unreadable=(),
    )
    _print_evaluation(evaluation)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "the 10 worst of 40 classes; --out DIR writes all:"
    assert " ".join(lines[2].split()) == "class 00 0.00% of 5, most often taken for class 01"
    assert len(lines) == 12


def test_models_lists_the_published_weights(capsys: Output) -> None:
    assert main(["models"]) == 0
    assert "vim_s_midclstok_ft_81p6acc.pth" in capsys.readouterr().out


def test_convert_prints_its_report_and_reloads_bit_for_bit(tmp_path: Path, capsys: Output) -> None:
    meta, published, images, _, _ = golden_case("v2_mid_div2")
    torch.save({"model": published, "epoch": 3}, tmp_path / "vim.pth")
    target = tmp_path / "vim.safetensors"
    assert main(["convert", str(tmp_path / "vim.pth"), str(target)]) == 0
    output = capsys.readouterr().out
    assert "guessed, as in the released models: readout='middle', image_size=64" in output
    assert output.endswith(f"{target}: {meta['params']:,} parameters\n")
    with torch.no_grad():
        expected = load_published(published)(images)
        assert torch.equal(load(target, device="cpu")(images), expected)


def test_convert_fits_size_channels_and_classes(tmp_path: Path, capsys: Output) -> None:
    torch.save({"model": golden_case("v2_mid_div2")[1]}, tmp_path / "vim.pth")
    options = ["--image-size", "96", "80", "--in-channels", "1", "--num-classes", "2"]
    options += ["--resize", "published"]
    out = tmp_path / "vim.safetensors"
    assert main(["convert", str(tmp_path / "vim.pth"), str(out), *options]) == 0
    config = load(out, device="cpu").config
    assert (config.image_size, config.in_channels, config.num_classes) == ((96, 80), 1, 2)
    assert "resized in the authors' way from (4, 4) to (6, 5)" in capsys.readouterr().out


def test_hostile_checkpoint_is_refused(tmp_path: Path, capsys: Output) -> None:
    torch.save({"model": Path("x")}, tmp_path / "vim.pth")  # any class that is not allow-listed
    target = tmp_path / "vim.safetensors"
    assert main(["convert", str(tmp_path / "vim.pth"), str(target)]) == 2
    assert "vim.pth cannot be read safely" in complaint(capsys)
    assert not target.exists()


def test_convert_refuses_three_sides(tmp_path: Path, capsys: Output) -> None:
    assert main(["convert", "in.pth", "out.safetensors", "--image-size", "1", "2", "3"]) == 2
    assert complaint(capsys) == "--image-size takes a side, or height and width; got 3 numbers"


def test_info_names_versions_devices_and_backends(capsys: Output) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "threads" in facts["devices"]["cpu"]
    assert "selective_scan on cpu" in facts["backends"]


def test_bench_lists_its_benchmarks(capsys: Output) -> None:
    assert main(["bench", "--help"]) == 0
    assert (
        "{efficiency,segmentation,detection,kernels,complexity,loader}" in capsys.readouterr().out
    )


def test_bench_complexity_prints_tables_and_writes_files(tmp_path: Path, capsys: Output) -> None:
    assert main(["bench", "complexity", "--resolutions", "32", "--out", str(tmp_path)]) == 0
    assert "Multiply-adds" in capsys.readouterr().out
    assert (tmp_path / "complexity_tiny.md").is_file()


# The wrong inputs: one sentence each, exit code 2 (1 when memory ran out), nothing half-written.


def test_misspelt_command_names_the_valid_ones(capsys: Output) -> None:
    assert main(["trian"]) == 2
    assert complaint(capsys) == (
        "there is no command trian, did you mean train?; "
        "valid commands: train, eval, predict, check, models, convert, info, demo, ablate, bench"
    )


def test_misspelt_recipe_names_the_valid_ones(capsys: Output) -> None:
    assert main(["train", "digit_vim", "--out", "x"]) == 2
    assert complaint(capsys).startswith(
        "there is no recipe digit_vim, did you mean digits_vim?; "
        "valid recipes: finetune, folder_vim, folder_deit, "
    )


def test_misspelt_option_names_the_valid_ones(tmp_path: Path, capsys: Output) -> None:
    assert main([*small_run(tmp_path / "run"), "--optimizer.lrate", "1"]) == 2
    sentence = complaint(capsys)
    assert (
        "does not know --optimizer.lrate, did you mean --optimizer.lr?; valid options: " in sentence
    )
    assert "--model.d-state, " in sentence
    assert not (tmp_path / "run").exists()


def test_short_name_of_a_nested_option_is_recognised(tmp_path: Path, capsys: Output) -> None:
    assert main([*small_run(tmp_path / "run"), "--lr", "1"]) == 2
    assert "does not know --lr, did you mean --optimizer.lr?" in complaint(capsys)


def test_value_of_a_wrong_type_is_refused(capsys: Output) -> None:
    assert main(["train", "digits_vim", "--out", "x", "--epochs", "many"]) == 2
    assert complaint(capsys) == (
        "Error parsing --epochs: invalid literal for int() with base 10: 'many'; "
        "see visionmamba train digits_vim --help"
    )


def test_unknown_choice_names_the_valid_ones(capsys: Output) -> None:
    assert main(["train", "digits_vim", "--out", "x", "--model.readout", "tail"]) == 2
    assert complaint(capsys).startswith(
        "invalid choice 'tail' for argument '--model.readout'. Expected one of "
        "('middle', 'head', 'double', 'registers', 'mean', 'max', 'last')"
    )


def test_missing_required_option_is_named(capsys: Output) -> None:
    assert main(["train", "digits_vim"]) == 2
    assert "--out PATH" in complaint(capsys)


def test_value_out_of_range_is_refused(tmp_path: Path, capsys: Output) -> None:
    assert main([*small_run(tmp_path / "run"), "--optimizer.lr", "-1"]) == 2
    assert "lr must be positive, got -1.0" in complaint(capsys)
    assert not (tmp_path / "run").exists()


def test_missing_weights_are_named(tmp_path: Path, capsys: Output) -> None:
    assert main(["predict", str(tmp_path / "none.safetensors"), "x.jpg"]) == 2
    assert complaint(capsys).startswith(f"weights file {tmp_path / 'none.safetensors'} is missing")


def test_missing_image_is_named(weights: Path, tmp_path: Path, capsys: Output) -> None:
    assert main(["predict", str(weights), str(tmp_path / "none.jpg")]) == 2
    assert complaint(capsys) == f"there is no image {tmp_path / 'none.jpg'}; check the path"


def test_truncated_weights_are_refused(weights: Path, capsys: Output) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["predict", str(weights), "x.jpg"]) == 2
    assert f"{weights} is not a whole safetensors file" in complaint(capsys)


def test_newer_weights_are_refused(weights: Path, capsys: Output) -> None:
    with safe_open(weights, framework="pt") as file:
        header = json.loads(file.metadata()["visionmamba"])
    header["format_version"] = 99
    metadata = {"visionmamba": json.dumps(header)}
    save_file({"x": torch.zeros(1)}, weights, metadata=metadata)
    assert main(["predict", str(weights), "x.jpg"]) == 2
    sentence = complaint(capsys)
    assert "has weights format 99" in sentence
    assert "pip install --upgrade visionmamba" in sentence


def test_text_file_named_jpg_is_refused(weights: Path, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "note.jpg").write_text("buy milk")
    out = tmp_path / "out"
    assert main(["predict", str(weights), str(tmp_path / "note.jpg"), "--out", str(out)]) == 2
    assert "note.jpg is not an image in any known format" in complaint(capsys)
    assert not out.exists()


def test_decompression_bomb_is_refused(weights: Path, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "bomb.png").write_bytes(png_that_claims(100_000, 100_000))
    assert main(["predict", str(weights), str(tmp_path / "bomb.png")]) == 2
    assert "would decompress to 100000x100000 = 10000000000 pixels" in complaint(capsys)


def test_limit_of_pixels_can_be_set(weights: Path, pictures: Path, capsys: Output) -> None:
    image = str(pictures / "cat" / "0.png")
    assert main(["predict", str(weights), image, "--max-pixels", "399"]) == 2
    assert "more than the limit of 399; raise max_pixels" in complaint(capsys)
    assert main(["predict", str(weights), image, "--max-pixels", "400"]) == 0


def test_default_limit_of_pixels_is_the_datas() -> None:
    assert Predict(weights="", images=()).max_pixels == MAX_PIXELS


def test_empty_class_folder_is_named(weights: Path, pictures: Path, capsys: Output) -> None:
    (pictures / "eel").mkdir()
    assert main(["eval", str(weights), str(pictures)]) == 2
    assert f"class folder {pictures / 'eel'} holds no images" in complaint(capsys)


def test_folder_without_images_is_named(weights: Path, pictures: Path, capsys: Output) -> None:
    assert main(["predict", str(weights), str(pictures)]) == 2
    assert complaint(capsys).startswith(f"folder {pictures} holds no images")


def test_absent_device_is_refused(weights: Path, pictures: Path, capsys: Output) -> None:
    assert main(["eval", str(weights), str(pictures), "--device", "cuda:99"]) == 2
    assert "cuda:99" in complaint(capsys)


def test_batch_that_does_not_fit_ends_with_its_remedy(
    weights: Path, pictures: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visionmamba.models import Vim

    monkeypatch.setattr(Vim, "forward", lambda self, images: torch.empty(1 << 60))
    assert main(["eval", str(weights), str(pictures), "--batch-size", "6"]) == 1
    assert complaint(capsys) == (
        "a batch of 6 images does not fit into the memory of the CPU; "
        "lower batch_size, for example to 3"
    )


def test_misspelt_model_of_a_benchmark_names_the_valid_ones(capsys: Output) -> None:
    assert main(["bench", "efficiency", "--models", "vim", "diet"]) == 2
    sentence = complaint(capsys)
    assert "invalid choice 'diet'" in sentence
    assert "'deit-eager', 'deit-compile'" in sentence


def test_benchmark_of_kernels_that_are_not_installed_says_so(capsys: Output) -> None:
    assert main(["bench", "efficiency", "--models", "vim", "vim-mamba-ssm"]) == 2
    assert complaint(capsys) == (
        "vim-mamba-ssm runs the published kernels and needs mamba_ssm and causal_conv1d; install "
        "mamba-ssm and causal-conv1d as their authors describe, or leave the model out"
    )


def test_missing_extra_names_the_install_line(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    assert main(small_run(tmp_path / "run")) == 2
    assert complaint(capsys) == (
        "training needs pytorch_lightning; install it with: pip install 'visionmamba[train]'"
    )
    assert not (tmp_path / "run").exists()


def test_training_reports_how_many_images_it_left_out(
    pictures: Path, tmp_path: Path, capsys: Output
) -> None:
    for split in ("train", "val"):
        shutil.copytree(pictures, tmp_path / "data" / split)
    (tmp_path / "data" / "train" / "cat" / "1.png").write_text("buy milk")
    out = tmp_path / "run"
    given = [
        *("train", "folder_vim", "--data.root", str(tmp_path / "data"), "--out", str(out)),
        *("--model.image-size", "16", "--preprocessing.image-size", "16", "--epochs", "1"),
        *("--model.d-model", "16", "--model.depth", "1", "--batch-size", "2", "--quiet"),
        *("--device", "cpu"),
    ]
    assert main(given) == 2
    assert complaint(capsys).endswith('leave such files out with on_unreadable="skip"')
    assert not out.exists()
    assert main([*given, "--data.on-unreadable", "skip"]) == 0
    sentence = complaint(capsys)
    assert sentence == f"unreadable images left out: 1; {out / 'results.json'} lists them"
    unreadable = json.loads((out / "results.json").read_text())["unreadable"]["train"]
    assert "cat/1.png is not an image" in unreadable[0]


def test_missing_data_folder_is_named(tmp_path: Path, capsys: Output) -> None:
    root = tmp_path / "nowhere"
    given = ["--data.root", str(root), "--out", str(tmp_path / "run")]
    assert main(["train", "folder_vim", *given]) == 2
    assert complaint(capsys).startswith(f"there is no folder {root}; wanted one that holds")


def test_traceback_is_shown_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["predict", str(tmp_path / "none.safetensors"), "x.jpg", "--traceback"])


def test_recipe_is_not_changed_by_its_options() -> None:
    from visionmamba.recipes import digits_vim

    assert replace(digits_vim(), epochs=1) != digits_vim()
