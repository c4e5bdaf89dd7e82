"""Sets of images: the digits, and folders with what goes wrong in them."""

from pathlib import Path

import numpy as np
import pytest

from visionmamba.data import Digits, ImageFolder, open_images


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    train, val = Digits().build()
    assert (len(train), len(val)) == (1437, 360)
    assert np.bincount(val.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    seen = {train.image(index).tobytes() for index in range(len(train))}
    assert all(val.image(index).tobytes() not in seen for index in range(len(val)))
    assert val.labels[:8] == Digits().build().val.labels[:8]


def test_folder_names_its_classes_and_sorts_its_files(folder: Path) -> None:
    train, val = ImageFolder(root=folder).build()
    assert train.class_names == val.class_names == ("cat", "dog")
    assert train.labels == (0, 0, 0, 1, 1, 1)
    assert train.file(4) == folder / "train" / "dog" / "1.png"
    assert len(val) == 4


def test_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; wanted one that"):
        ImageFolder(root=tmp_path / "nowhere").build()


def test_missing_val_is_named(folder: Path) -> None:
    (folder / "val").rename(folder / "test")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*val; wanted .*val/CLASS"):
        ImageFolder(root=folder).build()


def test_empty_class_folder_is_named(folder: Path) -> None:
    (folder / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*train/bird holds no images; add some"):
        ImageFolder(root=folder).build()


def test_classes_that_differ_are_named(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "hound")
    with pytest.raises(ValueError, match=r"only in train: dog; only in val: hound"):
        ImageFolder(root=folder).build()


def test_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no class folders"):
        open_images(tmp_path)


def test_hidden_and_other_files_are_ignored(folder: Path) -> None:
    for name in (".DS_Store", "._0.png", "readme.txt"):
        (folder / "train" / "cat" / name).write_text("x")
    (folder / "train" / ".cache").mkdir()
    assert len(ImageFolder(root=folder).build().train) == 6


def test_open_images_takes_a_split_or_plain_class_folders(folder: Path) -> None:
    assert len(open_images(folder)) == 4
    assert len(open_images(folder, split="train")) == 6
    assert len(open_images(folder / "train")) == 6
    assert len(open_images("digits")) == 360
