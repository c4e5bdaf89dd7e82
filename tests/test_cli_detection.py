"""`visionmamba eval`, `predict` and `check` with detectors and sets in COCO's format."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from tests.test_cli_segmentation import complaint
from visionmamba.cli import main
from visionmamba.data import DetectionPreprocessing, Preprocessing
from visionmamba.models import DeiTConfig, DetectorConfig, save

pytestmark = pytest.mark.once

CLASSES = ("cat", "dog")
IDS = (3, 7)
Output = pytest.CaptureFixture[str]
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An untrained detector, which finds something everywhere."""
    backbone = DeiTConfig(image_size=32, patch_size=16, d_model=16, depth=1, num_heads=1)
    config = DetectorConfig(
        backbone=backbone,
        num_classes=2,
        head="mask",
        channels=8,
        box_width=16,
        num_proposals=4,
        score_threshold=0.0,
        max_detections=5,
    )
    torch.manual_seed(0)
    path = tmp_path / "detector.safetensors"
    save(
        config.build(),
        path,
        class_names=CLASSES,
        preprocessing=DetectionPreprocessing(image_size=32).to_dict(),
        details={"category_ids": list(IDS)},
    )
    return path


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    config = DeiTConfig(
        image_size=32, patch_size=16, d_model=16, depth=1, num_heads=1, num_classes=2
    )
    path = tmp_path / "classifier.safetensors"
    preprocessing = Preprocessing(image_size=32).to_dict()
    save(config.build(), path, class_names=CLASSES, preprocessing=preprocessing)
    return path


def content() -> dict[str, Any]:
    """Three pictures of 40x30 px; a cat in the first, a dog in the second, a crowd in the last."""
    boxes = ([4, 5, 10, 8], [0, 0, 20, 30], [20, 0, 20, 30])
    return {
        "categories": [{"id": id_, "name": name} for id_, name in zip(IDS, CLASSES, strict=True)],
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": 40, "height": 30}
            for number in (5, 6, 9)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category,
                "bbox": box,
                "iscrowd": int(image_id == 9),
                "area": box[2] * box[3],
                "segmentation": {"size": [30, 40], "counts": lengths(box)},
            }
            for number, image_id, category, box in zip(
                (1, 2, 4), (5, 6, 9), (3, 7, 3), boxes, strict=True
            )
        ],
    }


def lengths(box: list[int]) -> list[int]:
    left, top, width, height = box
    mask = np.zeros((30, 40), np.uint8)
    mask[top : top + height, left : left + width] = 1
    line = mask.T.ravel()
    edges = [0, *np.flatnonzero(np.diff(line)) + 1, line.size]
    runs = np.diff(edges).tolist()
    return [0, *runs] if line[0] else runs


def coco(root: Path, edit: Edit | None = None, *, splits: tuple[str, ...] = ("val",)) -> Path:
    generator = np.random.default_rng(0)
    for split in splits:
        written = content()
        if edit is not None:
            edit(written)
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"{split}.json").write_text(json.dumps(written))
        (root / split).mkdir()
        for number in (5, 6, 9):
            pixels = generator.integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"{number}.png")
    return root


def annotation(**changes: object) -> Edit:
    """Changes the first annotation."""
    return lambda written: written["annotations"][0].update(changes)


def test_eval_prints_and_saves_the_columns_of_papers(
    weights: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out"
    given = ["eval", str(weights), str(coco(tmp_path / "set")), "--device", "cpu"]
    assert main([*given, "--out", str(out), "--mode", "slide", "--crop-size", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(out / "evaluation.json")
    assert lines[1].split() == ["AP", "AP50", "AP75", "small", "medium", "large"]
    assert [line.split()[0] for line in lines[2:4]] == ["boxes", "masks"]
    assert lines[2].split()[-2:] == ["-", "-"]
    assert lines[4].startswith("of 3 images with 2 objects, the best 5 of an image and class")
    assert [line.split()[0] for line in lines[5:]] == ["cat", "dog"]
    told = json.loads((out / "evaluation.json").read_text())
    assert (told["inference"]["crop_size"], told["inference"]["stride"]) == (32, 24)
    rows = json.loads((out / "detections.json").read_text())
    assert {row["image_id"] for row in rows} == {5, 6, 9}
    assert {row["category_id"] for row in rows} <= set(IDS)
    assert (out / "per_class.csv").is_file()


def test_eval_takes_one_annotation_file(weights: Path, tmp_path: Path, capsys: Output) -> None:
    root = coco(tmp_path / "set")
    file = root / "annotations" / "val.json"
    given = ["eval", str(weights), str(file), "--device", "cpu"]
    assert main([*given, "--images", str(root / "val"), "--max-detections", "2"]) == 0
    assert "of 3 images with 2 objects, the best 2 of an image" in capsys.readouterr().out
    assert main(given) == 2
    assert "the image 5.png of " in (said := complaint(capsys))
    assert said.endswith("set images, on the command line --images")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_predict_writes_what_coco_reads(weights: Path, tmp_path: Path, capsys: Output) -> None:
    out, folder = tmp_path / "out", coco(tmp_path / "set") / "val"
    given = ["predict", str(weights), str(folder), "--device", "cpu", "--out", str(out)]
    assert main([*given, "--min-score", "0"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    names = [str(folder / f"{number}.png") for number in (5, 6, 9)]
    assert [line.split(": ")[0] for line in printed.out.splitlines()] == names
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["coco_images.json", "coco_results.json"]
        + [f"{number}{ending}" for number in (5, 6, 9) for ending in (".json", "_overlay.png")]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        listed = COCO(str(out / "coco_images.json"))
        results = listed.loadRes(str(out / "coco_results.json"))
    assert [image["file_name"] for image in listed.dataset["images"]] == names
    of_first = json.loads((out / "5.json").read_text())["objects"]
    assert of_first
    read = results.loadAnns(results.getAnnIds(imgIds=[1]))
    assert [row["score"] for row in read] == [one["score"] for one in of_first]
    assert [row["category_id"] for row in read] == [one["category_id"] for one in of_first]
    assert all(results.annToMask(row).shape == (30, 40) for row in read)


def test_predicted_json_is_that_of_the_files(weights: Path, tmp_path: Path, capsys: Output) -> None:
    out, folder = tmp_path / "out", coco(tmp_path / "set") / "val"
    given = ["predict", str(weights), str(folder), "--device", "cpu", "--json", "--out", str(out)]
    assert main([*given, "--mode", "slide", "--crop-size", "32", "--min-score", "0.2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == [json.loads((out / f"{number}.json").read_text()) for number in (5, 6, 9)]


def test_pictures_called_as_the_results_keep_their_own_files(
    weights: Path, tmp_path: Path, capsys: Output
) -> None:
    picture = tmp_path / "pictures" / "coco_results.png"
    picture.parent.mkdir()
    Image.new("RGB", (40, 30)).save(picture)
    out = tmp_path / "out"
    given = ["predict", str(weights), str(picture), "--device", "cpu", "--out", str(out)]
    assert main([*given, "--min-score", "1"]) == 0
    assert capsys.readouterr().out == f"{picture}: nothing\n"
    assert json.loads((out / "coco_results.json").read_text()) == []
    assert json.loads((out / "coco_results_2.json").read_text())["objects"] == []


def test_results_of_all_pictures_are_not_there_by_half(
    weights: Path, tmp_path: Path, capsys: Output
) -> None:
    out, folder = tmp_path / "out", coco(tmp_path / "set") / "val"
    (folder / "6.png").write_text("buy milk")
    given = ["predict", str(weights), str(folder), "--device", "cpu", "--out", str(out)]
    assert main(given) == 2
    assert "6.png is not an image" in complaint(capsys)
    assert sorted(path.name for path in out.iterdir()) == ["5.json", "5_overlay.png"]
    assert main([*given, "--on-unreadable", "skip"]) == 0
    assert capsys.readouterr().err.startswith("visionmamba: left out: ")
    assert len(json.loads((out / "coco_images.json").read_text())["images"]) == 2


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("eval", ("--flip",), "--flip is not for detection, which "),
        ("eval", ("--short-side", "9"), "--short-side is not for detection"),
        ("eval", ("--which", "model_ema"), "--which is not for detection"),
        ("eval", ("--split", "test"), "images with objects have no split test"),
        ("eval", ("--crop-size", "9"), "--crop-size is for windows; add --mode slide"),
        ("eval", ("--images", "pictures"), "only wanted beside an annotation file (.json)"),
        ("predict", ("--batch-size", "2"), "--batch-size is not for detection"),
        ("predict", ("--min-score", "2"), "min_score must lie between 0 and 1, got 2"),
        ("predict", ("--mode", "slide", "--stride", "2000"), "stride must lie between 1 and crop"),
    ],
)
def test_wrong_options_are_named(
    command: str,
    options: tuple[str, ...],
    message: str,
    weights: Path,
    tmp_path: Path,
    capsys: Output,
) -> None:
    root = coco(tmp_path / "set")
    given = root if command == "eval" else root / "val"
    assert main([command, str(weights), str(given), "--device", "cpu", *options]) == 2
    assert message in complaint(capsys)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("predict", ("--min-score", "0.3"), "--min-score is not for classification, which "),
        ("eval", ("--max-detections", "7"), "--max-detections is not for classification"),
    ],
)
def test_options_of_detectors_are_not_for_classifiers(
    command: str,
    options: tuple[str, ...],
    message: str,
    classifier: Path,
    tmp_path: Path,
    capsys: Output,
) -> None:
    assert main([command, str(classifier), str(tmp_path), *options]) == 2
    assert message in complaint(capsys)


def test_other_classes_are_told(weights: Path, tmp_path: Path, capsys: Output) -> None:
    root = coco(tmp_path / "set", lambda written: written["categories"][0].update(name="cow"))
    assert main(["eval", str(weights), str(root), "--device", "cpu"]) == 2
    assert "knows 2 classes and " in (said := complaint(capsys))
    assert "which must be the same (for example cow)" in said


MALFORMED: list[tuple[Edit, str]] = [
    (
        annotation(category_id=4),
        "annotation 1 of image 5 (5.png) has the category_id 4, which is none of the file's 2 "
        "categories (3, 7)",
    ),
    (
        annotation(bbox=[30, 5, 20, 8]),
        "annotation 1 of image 5 (5.png) has the bbox [30, 5, 20, 8] (left, top, width, height), "
        "which reaches outside the image of 40x30 px",
    ),
    (annotation(image_id=8), "annotation 1 of image 8 belongs to no image of the file"),
]


@pytest.mark.parametrize("command", ["eval", "check"])
@pytest.mark.parametrize(("edit", "message"), MALFORMED)
def test_broken_annotations_are_named_by_their_ids(
    command: str, edit: Edit, message: str, weights: Path, tmp_path: Path, capsys: Output
) -> None:
    root = coco(tmp_path / "set", edit)
    if command == "check":
        assert main(["check", str(root)]) == 1
        printed = capsys.readouterr().out
        assert f"annotation: {root / 'annotations' / 'val.json'}: {message}\n" in printed
        assert printed.endswith("wrong: 1 x annotation\n")
        return
    assert main(["eval", str(weights), str(root), "--device", "cpu"]) == 2
    assert message in complaint(capsys)


@pytest.mark.parametrize("command", ["eval", "check"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda written: written.update(annotations=[]),
            "val.json has an empty list of annotations, so there is nothing to learn or to judge",
        ),
        (lambda written: written.update(categories=[]), "has an empty list of categories"),
        (lambda written: written.pop("images"), "is not in COCO's format: wanted an object with"),
    ],
)
def test_files_without_use_end_in_a_sentence(
    command: str, edit: Edit, message: str, weights: Path, tmp_path: Path, capsys: Output
) -> None:
    root = coco(tmp_path / "set", edit)
    given = ["check", str(root)] if command == "check" else ["eval", str(weights), str(root)]
    assert main(given) == 2
    assert message in complaint(capsys)


def test_eval_names_a_missing_picture_and_goes_on_without_it_when_asked(
    weights: Path, tmp_path: Path, capsys: Output
) -> None:
    root = coco(tmp_path / "set")
    (root / "val" / "6.png").unlink()
    given = ["eval", str(weights), str(root), "--device", "cpu"]
    assert main(given) == 2
    assert f"there is no image {root / 'val' / '6.png'}" in complaint(capsys)
    assert main([*given, "--on-unreadable", "skip"]) == 0
    printed = capsys.readouterr()
    assert "of 2 images with 1 objects" in printed.out
    assert "visionmamba: left out: " in printed.err


def test_check_counts_classes_and_sizes(tmp_path: Path, capsys: Output) -> None:
    root, out = coco(tmp_path / "set", splits=("train", "val")), tmp_path / "out"
    assert main(["check", str(root), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "val: 3 pictures with 2 objects (boxes and masks), at most 1 in one; 1 without any, "
        "1 crowds" in lines
    )
    assert ["cat", *("1", "1", "1", "0", "0") * 2] in [line.split() for line in lines]
    assert lines[-1] == "nothing is wrong"
    table = (out / "classes.csv").read_text().splitlines()
    assert table[0].startswith("class,train_objects,train_images,train_small")
    assert table[2] == "dog,1,1,1,0,0,1,1,1,0,0"


def test_check_names_pictures_that_cannot_be_used(tmp_path: Path, capsys: Output) -> None:
    root, out = coco(tmp_path / "set"), tmp_path / "out"
    (root / "val" / "5.png").unlink()
    Image.new("RGB", (40, 31)).save(root / "val" / "6.png")
    assert main(["check", str(root), "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert f"picture: there is no image {root / 'val' / '5.png'}" in printed
    assert "6.png (image 6) is 40x31 px, its annotations say 40x30" in printed
    assert printed.endswith("wrong: 2 x picture\n")
    assert (out / "problems.csv").read_text().count("\npicture,val,") == 2


def test_objects_without_area_are_listed_and_stop_nothing(tmp_path: Path, capsys: Output) -> None:
    root = coco(tmp_path / "set", annotation(bbox=[4, 5, 0, 8]))
    assert main(["check", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "no area: " in printed
    assert printed.endswith("nothing is wrong; left out: 1 x no area\n")


def test_check_says_which_categories_differ(tmp_path: Path, capsys: Output) -> None:
    root = coco(tmp_path / "set", splits=("train", "val"))
    file = root / "annotations" / "val.json"
    written = json.loads(file.read_text())
    written["categories"].append({"id": 9, "name": "cow"})
    file.write_text(json.dumps(written))
    assert main(["check", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "categories: " in printed
    assert "2 categories in train and 3 in val" in printed
    assert "no training picture shows: cow" in printed


def test_check_takes_one_file(tmp_path: Path, capsys: Output) -> None:
    root = coco(tmp_path / "set")
    file = root / "annotations" / "val.json"
    assert main(["check", str(file), "--images", str(root / "val")]) == 0
    assert capsys.readouterr().out.startswith("val: 3 pictures with 2 objects")
    assert main(["check", str(root / "val"), "--images", str(root)]) == 2
    assert "--images is for an annotation file" in complaint(capsys)
    assert main(["check", str(tmp_path / "no.json")]) == 2
    assert "there is no annotation file " in complaint(capsys)
