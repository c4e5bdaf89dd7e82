"""Finding pictures and masks in the known layouts, and what is said of folders that are not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.drawn_masks import (
    CLASS_NAMES,
    ade20k,
    bands,
    cityscapes,
    mask_folder,
    pixels,
    save_image,
    save_mask,
)
from visionmamba.data import (
    ADE20K,
    IGNORE,
    Cityscapes,
    MaskError,
    MaskFolder,
    Shapes,
    mask_source,
    open_masks,
)

pytestmark = pytest.mark.once


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return mask_folder(tmp_path / "set")


def test_folder_pairs_pictures_and_masks_and_names_its_classes(root: Path) -> None:
    splits = MaskFolder(root=root).build()
    assert splits.train.class_names == splits.val.class_names == CLASS_NAMES
    assert splits.train.palette == ((0, 0, 255), (90, 90, 90), (255, 0, 0))
    assert [len(one) for one in splits] == [2, 2]
    assert splits.val.file(1) == root / "val" / "images" / "1.png"
    assert np.array_equal(splits.val.mask(1), bands(13, 9))


def test_val_split_may_be_another_folder(root: Path) -> None:
    (root / "val").rename(root / "test")
    masks = MaskFolder(root=root, val_split="test").build().val
    assert masks.file(0) == root / "test" / "images" / "0.png"


@pytest.mark.parametrize("name", ["../set/val", "..", "", "val/images"])
def test_val_split_stays_in_the_root(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match="val_split must be the name of a folder in"):
        MaskFolder(root=root, val_split=name).open("val")


def test_classes_may_stand_in_a_text_file(root: Path) -> None:
    (root / "classes.json").unlink()
    (root / "classes.txt").write_text("sky\n\nroad \ncar\n")
    masks = MaskFolder(root=root).open("train")
    assert masks.class_names == CLASS_NAMES
    assert masks.palette is None


def test_ignore_index_is_ignored_beside_255(root: Path) -> None:
    content = json.dumps({"classes": ["nothing", *CLASS_NAMES[1:]], "ignore_index": 0})
    (root / "classes.json").write_text(content)
    mask = MaskFolder(root=root).open("train").mask(0)
    assert set(np.unique(mask)) == {1, 2, IGNORE}
    assert np.array_equal(mask == IGNORE, np.isin(bands(12, 16), (0, 255)))


def test_missing_class_file_is_named(root: Path) -> None:
    (root / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*classes.json and no .*classes.txt; write"):
        MaskFolder(root=root).build()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('["sky", "road"]', "names no classes"),
        ('{"classes": 3}', "must name 2 to 255 classes, got no list"),
        ('{"classes": ["sky"]}', "must name 2 to 255 classes, got 1"),
        (json.dumps({"classes": [str(n) for n in range(256)]}), "2 to 255 classes, got 256"),
        ('{"classes": ["sky", 3]}', "has the class 3, wanted"),
        ('{"classes": ["sky", "\\u001b[31m"]}', "has the class .*, wanted one of printable text"),
        (json.dumps({"classes": ["sky", "x" * 201]}), "a class name of 201 characters"),
        ('{"classes": ["sky", "sky"]}', "names the class sky more than once"),
        ('{"classes": ["a", "b"], "palette": [[1, 2, 3]]}', "palette as 2 lists"),
        ('{"classes": ["a", "b"], "palette": [[1, 2, 3], [1, 2, 300]]}', "palette as 2 lists"),
        ('{"classes": ["a", "b"], "ignore_index": 300}', "ignore_index from 0 to 255, got 300"),
        ('{"classes": ["a", "b"], "ignore_index": "0"}', "ignore_index from 0 to 255"),
        (" " * ((1 << 20) + 1), "has 1048577 bytes, too many"),
    ],
)
def test_bad_class_file_is_explained(root: Path, content: str, message: str) -> None:
    (root / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        MaskFolder(root=root).open("train")


def test_class_file_outside_of_the_root_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "classes.json").rename(tmp_path / "secret.json")
    (root / "classes.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match=r"is a link to .*secret.json, outside of"):
        MaskFolder(root=root).open("train")


def test_missing_mask_is_named(root: Path) -> None:
    (root / "train" / "masks" / "1.png").unlink()
    with pytest.raises(
        MaskError, match=r"1 of the 2 images in .*train/images have no mask, the first: .*1.png"
    ):
        MaskFolder(root=root).build()


def test_missing_mask_can_be_left_out(root: Path) -> None:
    (root / "train" / "masks" / "1.png").unlink()
    masks = MaskFolder(root=root, on_unreadable="skip").open("train")
    assert len(masks) == 1
    assert len(masks.unreadable) == 1
    assert "1.png has no mask" in masks.unreadable[0]


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_file_outside_of_the_root_is_refused(root: Path, tmp_path: Path, kind: str) -> None:
    file = root / "train" / kind / "0.png"
    file.rename(tmp_path / "secret.png")
    file.symlink_to(tmp_path / "secret.png")
    with pytest.raises(MaskError, match=r"0.png is a link to .*secret.png, outside of"):
        MaskFolder(root=root).open("train")
    masks = MaskFolder(root=root, on_unreadable="skip").open("train")
    assert masks.image_files == (root / "train" / "images" / "1.png",)
    assert "outside of" in masks.unreadable[0]


def test_whole_folder_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (root / "train" / "images").rename(tmp_path / "elsewhere")
    (root / "train" / "images").symlink_to(tmp_path / "elsewhere")
    assert len(MaskFolder(root=root).open("train")) == 2


def test_hidden_and_other_files_are_no_pictures(root: Path) -> None:
    for name in (".0.png", "notes.txt"):
        (root / "train" / "images" / name).write_text("no picture")
    (root / "train" / "images" / "folder.png").mkdir()
    assert len(MaskFolder(root=root).open("train")) == 2


def test_missing_folders_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; wanted one that"):
        MaskFolder(root=tmp_path / "nowhere").build()
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*test/images; wanted"):
        MaskFolder(root=root).open("test")


def test_empty_folder_is_named(root: Path) -> None:
    for file in (root / "val").glob("*/*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"val/images holds no images; add some"):
        MaskFolder(root=root).build()


def test_ade20k_counts_from_one_and_ignores_zero(tmp_path: Path) -> None:
    masks = ADE20K(root=ade20k(tmp_path)).build().val
    assert len(masks.class_names) == 150
    assert (masks.class_names[0], masks.class_names[12], masks.class_names[149]) == (
        *("wall", "person", "flag"),
    )
    assert np.array_equal(masks.mask(0), bands(10, 12, (IGNORE, 0, 12, 149)))


def test_ade20k_refuses_numbers_above_150(tmp_path: Path) -> None:
    file = ade20k(tmp_path) / "annotations" / "training" / "ADE_train_00000001.png"
    save_mask(file, bands(10, 12, (0, 151)))
    with pytest.raises(MaskError, match=r"holds the number 151 .*; the numbers .* are 0 to 150"):
        ADE20K(root=tmp_path).open("train").mask(0)


def test_ade20k_takes_first_names_from_its_list(tmp_path: Path) -> None:
    rows = [f"{n}\t0.1\t10\t1\t1\tclass {n}, synonym" for n in range(1, 151)]
    text = "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows])
    (ade20k(tmp_path) / "objectInfo150.txt").write_text(text)
    assert ADE20K(root=tmp_path).open("train").class_names[:2] == ("class 1", "class 2")
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="describes 149 classes, wanted 150"):
        ADE20K(root=tmp_path).open("train")


def test_names_of_ade20k_are_different() -> None:
    from visionmamba.data.class_tables import ADE20K_CLASSES

    assert len(set(ADE20K_CLASSES)) == 150


def test_cityscapes_keeps_the_classes_that_are_judged(tmp_path: Path) -> None:
    masks = Cityscapes(root=cityscapes(tmp_path)).build().train
    assert len(masks) == 1
    assert (len(masks.class_names), masks.class_names[13]) == (19, "car")
    assert masks.palette is not None
    assert masks.palette[13] == (0, 0, 142)
    assert np.array_equal(masks.mask(0), bands(10, 12, (IGNORE, 0, 13, 18)))


def test_cityscapes_prefers_train_ids(tmp_path: Path) -> None:
    folder = cityscapes(tmp_path) / "gtFine" / "train" / "ulm"
    mask = bands(10, 12, (255, 0, 13, 18))
    save_mask(folder / "ulm_000000_000019_gtFine_labelTrainIds.png", mask)
    found = Cityscapes(root=tmp_path).open("train")
    assert np.array_equal(found.mask(0), mask)


@pytest.mark.parametrize("source", [ADE20K, Cityscapes])
def test_secret_masks_are_not_looked_for(
    tmp_path: Path, source: type[ADE20K] | type[Cityscapes]
) -> None:
    with pytest.raises(ValueError, match=r"test.*; take train or val"):
        source(root=tmp_path).open("test")


def test_layout_is_recognised(tmp_path: Path) -> None:
    assert isinstance(mask_source(ade20k(tmp_path / "a")), ADE20K)
    assert isinstance(mask_source(cityscapes(tmp_path / "c")), Cityscapes)
    folder = mask_folder(tmp_path / "f")
    assert isinstance(mask_source(folder), MaskFolder)
    assert len(open_masks(folder, split="train")) == 2
    assert isinstance(mask_source(folder, format="ade20k"), ADE20K)


def test_unknown_layout_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pictures with masks in a known layout; wanted train"):
        open_masks(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_masks(tmp_path / "nowhere")


def test_mask_without_picture_is_no_reason_to_stop(root: Path) -> None:
    save_mask(root / "train" / "masks" / "lonely.png", bands(4, 4))
    masks = MaskFolder(root=root).open("train")
    assert len(masks) == 2
    assert masks.unreadable == ()
    assert [problem.kind for problem in masks.problems] == ["missing image"]


def test_picture_may_have_any_known_ending(root: Path) -> None:
    save_image(root / "train" / "images" / "photo.JPG", pixels(8, 8))
    save_mask(root / "train" / "masks" / "photo.png", bands(8, 8))
    assert len(MaskFolder(root=root).open("train")) == 3


def test_shapes_follow_from_the_seed() -> None:
    source = Shapes(num_train=6, num_val=3, image_size=32)
    first, second = source.build(), source.build()
    assert np.array_equal(first.train.mask(5), second.train.mask(5))
    assert first.train.image(5) == second.train.image(5)
    assert first.train.image(0) != first.val.image(0)
    assert replace(source, seed=1).build().train.image(0) != first.train.image(0)
    assert (len(first.train), len(first.val), first.val.size(0)) == (6, 3, (32, 32))


def test_shapes_show_every_class_where_its_colour_is() -> None:
    masks = open_masks("shapes", split="train")
    strongest = {1: 0, 2: 1, 3: 2}  # disc red, square green, triangle blue
    for kind, channel in strongest.items():
        index = next(i for i in range(len(masks)) if (masks.mask(i) == kind).any())
        inside = np.asarray(masks.image(index))[masks.mask(index) == kind]
        assert inside.mean(axis=0).argmax() == channel


def test_shuffled_shapes_keep_pictures_and_move_training_masks() -> None:
    source = Shapes(num_train=4, num_val=2, image_size=32)
    true, shuffled = source.build(), replace(source, shuffled=True).build()
    for index in range(4):
        assert shuffled.train.image(index) == true.train.image(index)
        assert np.array_equal(shuffled.train.mask(index), true.train.mask((index - 1) % 4))
    assert np.array_equal(shuffled.val.mask(0), true.val.mask(0))


@pytest.mark.parametrize("wrong", [{"num_train": 1}, {"image_size": 8}, {"seed": -1}])
def test_shapes_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
        Shapes(**wrong)
