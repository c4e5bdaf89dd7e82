"""Judging weights of every kind on labelled pictures, as published and at other sizes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.published import drawn_weights, published_shapes
from visionmamba.data import Preprocessing
from visionmamba.models import DeiTConfig, VimConfig, hub, load_published, save
from visionmamba.tasks import Classifier, Evaluation, evaluate
from visionmamba.tasks.confusion import draw_confusion

pytestmark = pytest.mark.once

CLASSES = ("cat", "dog", "eel")
SYNSETS = ("n01440764", "n01443537", "n01484850")
PUBLISHED = {"embed_dim": 16, "depth": 2, "num_classes": 3, "img_size": 64, "patch_size": 16}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four drawn pictures of each class, 40 px wide and 30 high."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng((label, number)).integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{number}.png")
    return tmp_path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    config = VimConfig(image_size=16, patch_size=8, d_model=16, depth=1, num_classes=3)
    path = tmp_path / "own.safetensors"
    preprocessing = Preprocessing(image_size=16).to_dict()
    save(config.build(), path, class_names=CLASSES, preprocessing=preprocessing)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A file as the authors publish them, for three classes, with an average of its own."""
    path = tmp_path / "vim.pth"
    entries = ("model", "model_ema")
    states = [drawn_weights(published_shapes(PUBLISHED), seed=seed) for seed in (0, 1)]
    torch.save(dict(zip(entries, states, strict=True)), path)
    return path


def numbered(folder: Path) -> Path:
    """The same pictures under the class names of weights that name none."""
    for number, name in enumerate(CLASSES):
        (folder / "val" / name).rename(folder / "val" / str(number))
    return folder


def test_matrix_counts_every_picture_by_class_and_answer(weights: Path, pictures: Path) -> None:
    found = evaluate(weights, pictures, device="cpu")
    answers = Classifier.load(weights, device="cpu")
    expected = np.zeros((3, 3), np.int64)
    for row, name in enumerate(CLASSES):
        for number in range(4):
            label = answers(pictures / "val" / name / f"{number}.png").label
            expected[row, CLASSES.index(label)] += 1
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.accuracy == pytest.approx(expected.trace() / 12)
    assert found.per_class == pytest.approx(
        dict(zip(CLASSES, expected.diagonal() / 4, strict=True))
    )
    assert found.num_images == 12


def test_classes_say_what_they_are_taken_for() -> None:
    rows = evaluation(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 2]])).classes()
    assert [(row.name, row.num_images, row.taken_for) for row in rows] == [
        ("cat", 4, "dog"),
        ("eel", 2, None),
    ]


def evaluation(confusion: np.ndarray) -> Evaluation:
    return Evaluation(
        accuracy=5 / 6,
        top5_accuracy=1.0,
        per_class={"cat": 0.75, "eel": 1.0},
        num_images=6,
        image_size=(16, 16),
        crop_fraction=0.875,
        images_per_second=10.0,
        model_images_per_second=20.0,
        class_names=CLASSES,
        confusion=confusion,
        unreadable=(),
    )


def test_saves_tables_and_the_picture(tmp_path: Path) -> None:
    path = evaluation(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 2]])).save(tmp_path / "out")
    assert json.loads(path.read_text())["per_class"] == {"cat": 0.75, "eel": 1.0}
    with open(path.with_name("per_class.csv")) as file:
        assert list(csv.reader(file)) == [
            ["class", "images", "accuracy", "taken_for"],
            ["cat", "4", "0.75", "dog"],
            ["eel", "2", "1.0", ""],
        ]
    with open(path.with_name("confusion.csv")) as file:
        assert list(csv.reader(file))[1] == ["cat", "3", "1", "0"]
    with Image.open(path.with_name("confusion.png")) as picture:
        assert min(picture.size) > 800


def test_picture_of_the_matrix_is_dark_where_pictures_went() -> None:
    counts = np.eye(100, dtype=np.int64)
    picture = draw_confusion(counts, [str(number) for number in range(100)])
    frame = picture.crop((22, 26, 22 + 800, 26 + 800))
    assert frame.getpixel((4, 4)) == (8, 48, 107)
    assert frame.getpixel((12, 4)) == (255, 255, 255)


def test_size_can_be_another_than_the_weights_own(weights: Path, pictures: Path) -> None:
    found = evaluate(weights, pictures, image_size=(32, 48), crop_fraction=1.0, device="cpu")
    assert (found.image_size, found.crop_fraction) == ((32, 48), 1.0)


def test_deit_is_judged_too(pictures: Path, tmp_path: Path) -> None:
    config = DeiTConfig(image_size=16, patch_size=8, d_model=8, depth=1, num_heads=1, num_classes=3)
    preprocessing = Preprocessing(image_size=16).to_dict()
    path = tmp_path / "deit.safetensors"
    save(config.build(), path, class_names=CLASSES, preprocessing=preprocessing)
    assert evaluate(path, pictures, image_size=32, device="cpu").num_images == 12


def test_authors_file_is_judged_as_published(checkpoint: Path, pictures: Path) -> None:
    found = evaluate(checkpoint, numbered(pictures), device="cpu")
    assert (found.image_size, found.crop_fraction) == ((64, 64), 0.875)
    classifier = Classifier.load(checkpoint, device="cpu")
    assert classifier.preprocessing.interpolation == "bicubic"


def test_moving_average_of_the_authors_file_can_be_chosen(checkpoint: Path) -> None:
    loaded = Classifier.load(checkpoint, device="cpu", which="model_ema").model.state_dict()
    expected = load_published(checkpoint, which="model_ema").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_published_name_is_judged(
    checkpoint: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_download", lambda *_, **__: checkpoint)
    assert evaluate("vim_tiny_patch16_224", numbered(pictures), device="cpu").num_images == 12


def test_imagenets_classes_are_its_sorted_folders(tmp_path: Path) -> None:
    shapes = published_shapes({**PUBLISHED, "num_classes": 1000})
    torch.save({"model": drawn_weights(shapes, seed=0)}, tmp_path / "vim.pth")
    names = Classifier.load(tmp_path / "vim.pth", device="cpu").class_names
    assert names[:3] == SYNSETS
    assert list(names) == sorted(names)


def test_low_precision_judges_alike(weights: Path, pictures: Path) -> None:
    found = evaluate(weights, pictures, precision="bfloat16", device="cpu")
    assert found.num_images == 12


def test_unreadable_pictures_do_not_count(weights: Path, pictures: Path) -> None:
    (pictures / "val" / "cat" / "1.png").write_text("buy milk")
    found = evaluate(weights, pictures, device="cpu", on_unreadable="skip")
    assert found.num_images == found.confusion.sum() == 11
    assert len(found.unreadable) == 1
    assert "1.png" in found.unreadable[0]


def test_headless_weights_are_refused(tmp_path: Path) -> None:
    config = VimConfig(image_size=16, patch_size=8, d_model=16, depth=1, num_classes=0)
    path = tmp_path / "w.safetensors"
    save(config.build(), path, preprocessing=Preprocessing(image_size=16).to_dict())
    with pytest.raises(ValueError, match=r"has no classifier \(num_classes=0\)"):
        Classifier.load(path, device="cpu")


def test_unknown_name_lists_the_published_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file, folder or published model 'vim_tony'"):
        evaluate("vim_tony", tmp_path)


@pytest.mark.gpu
def test_gpu_in_low_precision_agrees_with_the_cpu(weights: Path, pictures: Path) -> None:
    on_cpu = evaluate(weights, pictures, device="cpu")
    on_gpu = evaluate(weights, pictures, device="cuda", precision="bfloat16", num_workers=2)
    assert on_gpu.num_images == 12
    assert abs(on_gpu.accuracy - on_cpu.accuracy) <= 2 / 12  # near ties may fall otherwise
