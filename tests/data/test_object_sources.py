"""Data with objects by a word or a path, and what is counted of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_coco import content, write
from visionmamba.data import ArrayObjects, Coco, check_objects, open_objects

pytestmark = pytest.mark.once


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        write(tmp_path, annotations=f"annotations/{split}.json", images=split)
    return tmp_path


def test_the_word_gives_the_drawn_set() -> None:
    assert isinstance(open_objects("objects"), ArrayObjects)


def test_a_folder_gives_one_of_its_splits(root: Path) -> None:
    assert len(open_objects(root, split="val")) == 3
    assert len(open_objects(str(root), split="train")) == 2  # without the empty one
    with pytest.raises(ValueError, match="splits train and val, got test"):
        open_objects(root, split="test")


def test_a_file_gives_all_of_its_pictures(root: Path) -> None:
    opened = open_objects(root / "annotations" / "train.json", images=root / "train")
    assert len(opened) == 3
    assert opened.image(0).size == (40, 30)
    assert opened.class_names == ("cat", "dog")


@pytest.mark.parametrize("folder", ["annotations", "annotations/images", "images", "."])
def test_pictures_of_a_file_are_found_around_it(tmp_path: Path, folder: str) -> None:
    write(tmp_path, annotations="annotations/all.json", images=folder)
    opened = open_objects(tmp_path / "annotations" / "all.json")
    assert opened.file(0) == (tmp_path / folder / "5.png").absolute()


def test_pictures_of_a_file_do_not_leave_their_folder(root: Path) -> None:
    (root / "val" / "5.png").unlink()
    (root / "val" / "5.png").symlink_to(root / "train" / "5.png")
    opened = open_objects(root / "annotations" / "val.json", images=root / "val")
    with pytest.raises(ValueError, match="outside of"):
        opened.image(0)


def test_missing_parts_are_named(root: Path) -> None:
    file = root / "annotations" / "val.json"
    with pytest.raises(FileNotFoundError, match=r"the image 5\.png of .*on the command line --im"):
        open_objects(file)
    with pytest.raises(FileNotFoundError, match="there is no folder of images nowhere"):
        open_objects(file, images=Path("nowhere"))
    with pytest.raises(FileNotFoundError, match=r"there is no annotation file .*absent\.json"):
        open_objects(root / "absent.json")
    with pytest.raises(ValueError, match=r"only wanted beside an annotation file \(\.json\)"):
        open_objects(root, images=root)


def test_splits_are_known_without_opening_them(root: Path) -> None:
    (root / "annotations" / "train.json").unlink()
    assert Coco(root=root).has("val")
    assert not Coco(root=root).has("train")
    assert [one.split for one in check_objects(root).splits] == ["val"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_objects_are_counted_by_class_and_size(root: Path, num_workers: int) -> None:
    done: list[tuple[int, int]] = []
    report = check_objects(
        root, num_workers=num_workers, progress=lambda number, total: done.append((number, total))
    )
    assert done == [(number, 6) for number in range(1, 7)]
    assert report.is_usable and report.problems == ()
    (train, val) = report.splits
    assert train == type(train)(**{**vars(val), "split": "train"})
    assert (val.num_images, val.num_empty, val.most_objects, val.num_crowds) == (3, 1, 1, 1)
    assert (val.objects, val.images) == ((1, 1), (1, 1))
    assert val.sizes == ((1, 0, 0), (1, 0, 0))  # crowds aside


def test_sizes_are_bounded_as_in_coco(tmp_path: Path) -> None:
    written = content()
    areas = (1023.9, 1024, 9215.9, 9216)
    written["annotations"] = [
        {**written["annotations"][1], "id": number, "area": area}
        for number, area in enumerate(areas)
    ]
    write(tmp_path, annotations="annotations/val.json", images="val")
    (tmp_path / "annotations" / "val.json").write_text(json.dumps(written))
    (counts,) = check_objects(tmp_path).splits
    assert counts.sizes == ((1, 2, 1), (0, 0, 0))
    assert np.sum(counts.objects) == counts.most_objects == 4


def test_classes_of_both_splits_are_told_when_they_differ(root: Path) -> None:
    written = content()
    written["categories"].insert(0, {"id": 1, "name": "cow"})
    (root / "annotations" / "val.json").write_text(json.dumps(written))
    report = check_objects(root)
    assert report.class_names == ("cat", "dog", "cow")
    assert [one.objects for one in report.splits] == [(1, 1, 0), (1, 1, 0)]
    assert report.num_problems == {"categories": 1}
    assert report.never_learnt == ("cow",)
    assert not report.is_usable
