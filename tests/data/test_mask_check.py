"""The check names every file that training would stop at, and counts the rest."""

import csv
from pathlib import Path

import pytest

from tests.data.drawn_masks import (
    ade20k,
    bands,
    cityscapes,
    exif_behind_the_pixels,
    mask_folder,
    pixels,
    save_image,
    save_mask,
)
from visionmamba.data import MaskFolder, check_masks

pytestmark = pytest.mark.once


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return mask_folder(tmp_path / "set", sizes=((12, 16),) * 6)


def spoil(root: Path) -> list[tuple[str, str]]:
    """Spoils a file in each way; returns kind and name of what must be found, in order."""
    images, masks = root / "train" / "images", root / "train" / "masks"
    (masks / "0.png").unlink()
    save_mask(masks / "1.png", bands(6, 8))
    save_mask(masks / "2.png", bands(12, 16, (0, 3)))
    (masks / "3.png").write_bytes(b"no picture")
    (images / "4.png").write_bytes(b"no picture")
    save_mask(masks / "lonely.png", bands(12, 16))
    return [
        ("missing mask", "images/0.png"),
        ("unreadable", "images/4.png"),
        ("wrong size", "masks/1.png"),
        ("class index", "masks/2.png"),
        ("unreadable", "masks/3.png"),
        ("missing image", "masks/lonely.png"),
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_everything_wrong_is_found_once(root: Path, num_workers: int) -> None:
    expected = spoil(root)
    report = check_masks(root, num_workers=num_workers)
    folder = root / "train"
    found = [(one.kind, str(one.file.relative_to(folder))) for one in report.problems]
    assert found == expected
    for problem in report.problems:
        assert problem.file.name in problem.message
    assert report.num_problems["unreadable"] == 2
    assert report.splits[0].num_images == 1


def test_picture_turned_by_exif_behind_its_pixels_is_found(root: Path) -> None:
    exif_behind_the_pixels(root / "val" / "images" / "3.png")
    assert check_masks(root).num_problems == {"wrong size": 1}


def test_good_folder_has_no_problems_and_exact_shares(root: Path) -> None:
    report = check_masks(root)
    assert report.problems == ()
    assert [one.split for one in report.splits] == ["train", "val"]
    train = report.splits[0]
    assert train.pixels == (6 * 48,) * 3  # four bands of 12x4 px, one of them ignored
    assert train.shares == pytest.approx((1 / 3,) * 3)
    assert (train.images, train.ignored_pixels) == ((6, 6, 6), 6 * 48)
    assert train.ignored_share == pytest.approx(0.25)
    assert report.never_learnt == ()


def test_class_that_training_never_shows_is_named(root: Path) -> None:
    for number in range(6):
        save_mask(root / "train" / "masks" / f"{number}.png", bands(12, 16, (0, 1)))
    report = check_masks(root)
    assert report.never_learnt == ("car",)
    assert report.splits[1].shares[2] > 0


def test_split_of_another_name_and_test_are_checked_too(root: Path) -> None:
    (root / "val").rename(root / "test")
    assert [one.split for one in check_masks(root).splits] == ["train", "test"]
    source = MaskFolder(root=root, val_split="test")
    assert [one.split for one in check_masks(source).splits] == ["train", "val"]


def test_public_layouts_are_checked(tmp_path: Path) -> None:
    report = check_masks(ade20k(tmp_path / "a"))
    assert report.problems == ()
    assert [one.num_images for one in report.splits] == [1, 1]
    assert check_masks(cityscapes(tmp_path / "c")).problems == ()
    save_image(tmp_path / "a" / "images" / "training" / "ADE_train_00000002.jpg", pixels(8, 8))
    assert [one.kind for one in check_masks(tmp_path / "a").problems] == ["missing mask"]


def test_tables_are_written(root: Path, tmp_path: Path) -> None:
    spoil(root)
    folder = check_masks(root).save(tmp_path / "report")
    assert sorted(path.name for path in folder.iterdir()) == ["classes.csv", "problems.csv"]
    with (folder / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["sky", "road", "car", "(ignored)"]
    assert (rows[0]["train_pixels"], rows[0]["val_images"]) == ("48", "6")
    with (folder / "problems.csv").open(newline="") as file:
        problems = list(csv.DictReader(file))
    assert [row["kind"] for row in problems][:2] == ["missing mask", "unreadable"]


def test_progress_is_told(root: Path) -> None:
    told: list[tuple[int, int]] = []
    check_masks(root, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 12) for done in range(1, 13)]
