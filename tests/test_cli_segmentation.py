"""`visionmamba eval` and `visionmamba predict` with segmenters, and what tells tasks apart."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionmamba.cli import main
from visionmamba.data import IGNORE, Preprocessing, SegmentationPreprocessing
from visionmamba.models import DeiTConfig, SegmenterConfig, save

pytestmark = pytest.mark.once

CLASSES = ("sky", "road", "car")
Output = pytest.CaptureFixture[str]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    backbone = DeiTConfig(image_size=32, patch_size=16, d_model=32, depth=2, num_heads=1)
    model = SegmenterConfig(backbone=backbone, num_classes=3, head="segmenter").build()
    path = tmp_path / "segmenter.safetensors"
    preprocessing = SegmentationPreprocessing(crop_size=32).to_dict()
    save(model, path, task="segmentation", class_names=CLASSES, preprocessing=preprocessing)
    return path


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    config = DeiTConfig(
        image_size=32, patch_size=16, d_model=32, depth=1, num_heads=1, num_classes=3
    )
    path = tmp_path / "classifier.safetensors"
    preprocessing = Preprocessing(image_size=32).to_dict()
    save(config.build(), path, class_names=CLASSES, preprocessing=preprocessing)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / "val" / kind).mkdir(parents=True)
    for number in range(3):
        pixels = generator.integers(0, 256, (30, 40, 3), np.uint8)
        mask = generator.choice([0, 1, 2, IGNORE], (30, 40)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "val" / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "val" / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def complaint(output: Output) -> str:
    """Returns the sentence on stderr, which must be one line without a traceback."""
    lines = output.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("visionmamba: ")
    return lines[0].removeprefix("visionmamba: ")


def test_eval_of_a_segmenter_prints_and_saves(
    weights: Path, data: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out"
    given = ["eval", str(weights), str(data), "--device", "cpu", "--out", str(out)]
    assert main([*given, "--mode", "slide", "--crop-size", "24", "--flip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads((out / "evaluation.json").read_text())
    assert lines[0] == str(out / "evaluation.json")
    assert lines[1].startswith(f"mIoU {told['miou']:.2%}, mAcc {told['macc']:.2%}, aAcc ")
    assert " of 3 images, " in lines[1]
    assert [line.split()[0] for line in lines[2:]] == list(CLASSES)
    assert told["inference"]["crop_size"] == 24
    assert told["inference"]["stride"] == 16
    assert told["inference"]["flip"]
    assert (out / "per_class.csv").is_file()


def test_predict_of_a_segmenter_goes_over_a_folder(
    weights: Path, data: Path, tmp_path: Path, capsys: Output
) -> None:
    out, folder = tmp_path / "out", data / "val" / "images"
    given = ["predict", str(weights), str(folder), "--device", "cpu", "--out", str(out)]
    assert main([*given, "--top-k", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [line.split(": ")[0] for line in printed.out.splitlines()] == [
        str(folder / f"{number}.png") for number in range(3)
    ]
    assert all("," not in line for line in printed.out.splitlines())
    assert len(list(out.iterdir())) == 9
    with Image.open(out / "2_mask.png") as mask:
        assert mask.size == (40, 30)


def test_predicted_json_is_that_of_the_files(
    weights: Path, data: Path, tmp_path: Path, capsys: Output
) -> None:
    out, folder = tmp_path / "out", data / "val" / "images"
    given = ["predict", str(weights), str(folder), "--device", "cpu", "--json", "--out", str(out)]
    assert main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == [json.loads((out / f"{number}.json").read_text()) for number in range(3)]


def test_predict_skips_and_reports_when_asked(weights: Path, data: Path, capsys: Output) -> None:
    folder = data / "val" / "images"
    (folder / "1.png").write_text("buy milk")
    given = ["predict", str(weights), str(folder), "--device", "cpu", "--json"]
    assert main([*given, "--on-unreadable", "skip"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 2
    assert printed.err.startswith("visionmamba: left out: ")
    assert main(given) == 2
    assert "1.png is not an image" in complaint(capsys)


def test_all_unreadable_is_an_empty_list(weights: Path, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "a.png").write_text("buy milk")
    given = ["predict", str(weights), str(tmp_path / "a.png"), "--device", "cpu", "--json"]
    assert main([*given, "--on-unreadable", "skip"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_equal_names_of_several_folders_are_kept_apart(
    weights: Path, tmp_path: Path, capsys: Output
) -> None:
    names = ("a/x.png", "b/x.png", "c/x_2.png")
    for name in names:
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    given = ["predict", str(weights), *(str(tmp_path / name) for name in names)]
    assert main([*given, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    masks = sorted(path.name for path in (tmp_path / "out").glob("*_mask.png"))
    assert masks == ["x_2_2_mask.png", "x_2_mask.png", "x_mask.png"]
    assert json.loads((tmp_path / "out" / "x_2.json").read_text())["file"].endswith("b/x.png")


@pytest.mark.parametrize("task", ["segmenter", "classifier"])
def test_results_never_replace_the_images(
    task: str, weights: Path, classifier: Path, data: Path, capsys: Output
) -> None:
    folder = data / "val" / "images"
    before = (folder / "0.png").read_bytes()
    given = str(weights if task == "segmenter" else classifier)
    assert main(["predict", given, str(folder), "--out", str(folder)]) == 2
    assert "is the folder of the images" in complaint(capsys)
    assert (folder / "0.png").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("eval", ("--crop-fraction", "1"), "--crop-fraction is not for segmentation, which "),
        ("eval", ("--image-size", "64"), "--image-size is not for segmentation"),
        ("predict", ("--batch-size", "2"), "--batch-size is not for segmentation"),
        ("eval", ("--crop-size", "64"), "--crop-size is for windows; add --mode slide"),
        ("predict", ("--mode", "slide", "--stride", "600"), "stride must lie between 1 and"),
        ("eval", ("--scales", "0"), "scales must be numbers above 0"),
    ],
)
def test_options_that_do_not_fit_are_named(
    command: str,
    options: tuple[str, ...],
    message: str,
    weights: Path,
    data: Path,
    capsys: Output,
) -> None:
    given = data if command == "eval" else data / "val" / "images"
    assert main([command, str(weights), str(given), *options]) == 2
    assert message in complaint(capsys)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("eval", ("--mode", "slide"), "--mode is not for classification, which "),
        ("predict", ("--scales", "0.5", "1"), "--scales is not for classification"),
        ("eval", ("--split", "test"), "labelled images have no split test"),
    ],
)
def test_options_of_segmenters_are_not_for_classifiers(
    command: str,
    options: tuple[str, ...],
    message: str,
    classifier: Path,
    data: Path,
    capsys: Output,
) -> None:
    assert main([command, str(classifier), str(data), *options]) == 2
    assert message in complaint(capsys)


def test_weights_of_an_unknown_task_are_refused(tmp_path: Path, capsys: Output) -> None:
    config = DeiTConfig(image_size=32, patch_size=16, d_model=32, depth=1, num_heads=1)
    save(config.build(), tmp_path / "w.safetensors", task="depth")
    assert main(["predict", str(tmp_path / "w.safetensors"), "a.png"]) == 2
    said = complaint(capsys)
    assert "was trained for depth; eval and predict know classification, segmentation and " in said


def test_other_number_of_classes_is_told(weights: Path, data: Path, capsys: Output) -> None:
    (data / "classes.txt").write_text("\n".join((*CLASSES, "bus")))
    assert main(["eval", str(weights), str(data), "--device", "cpu"]) == 2
    assert "knows 3 classes and " in (said := complaint(capsys))
    assert "has 4, which must be the same (for example bus)" in said


def test_mask_of_another_size_is_named(weights: Path, data: Path, capsys: Output) -> None:
    Image.new("L", (41, 30)).save(data / "val" / "masks" / "1.png")
    assert main(["eval", str(weights), str(data), "--device", "cpu"]) == 2
    assert "masks/1.png is 41x30 px" in complaint(capsys)


def test_missing_image_is_named(weights: Path, capsys: Output) -> None:
    assert main(["predict", str(weights), "nowhere.png", "--device", "cpu"]) == 2
    assert complaint(capsys) == "there is no image nowhere.png; check the path"
