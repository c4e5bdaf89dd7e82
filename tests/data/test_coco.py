"""Data sets in COCO's format: layouts, what is read, and what each broken file is told."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visionmamba.data import AnnotationError, Coco, UnreadableImageError

pytestmark = pytest.mark.once

Edit = Callable[[dict[str, Any]], object]


def content() -> dict[str, Any]:
    """Three images of 40x30 px: outline and crowd, run lengths, nothing."""
    return {
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": 40, "height": 30}
            for number in (5, 6, 9)
        ],
        "annotations": [
            {
                "id": 1, "image_id": 5, "category_id": 7, "bbox": [4, 5, 10, 8], "area": 80.0,
                "iscrowd": 0, "segmentation": [[4, 5, 14, 5, 14, 13, 4, 13]],
            },
            {
                "id": 2, "image_id": 6, "category_id": 3, "bbox": [0, 0, 2, 30], "iscrowd": 0,
                "segmentation": {"size": [30, 40], "counts": [0, 60, 1140]},
            },
            {
                "id": 3, "image_id": 5, "category_id": 3, "bbox": [20, 0, 20, 30], "area": 600,
                "iscrowd": 1, "segmentation": {"size": [30, 40], "counts": [600, 600]},
            },
        ],
    }  # fmt: skip


def write(root: Path, *, annotations: str, images: str, edit: Edit | None = None) -> Path:
    written = content()
    if edit is not None:
        edit(written)
    path = root / annotations
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written))
    (root / images).mkdir(parents=True, exist_ok=True)
    for number in (5, 6, 9):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(root / images / f"{number}.png")
    return root


def coco(tmp_path: Path, edit: Edit | None = None, **options: Any) -> Coco:
    for split in ("train", "val"):
        write(tmp_path, annotations=f"annotations/{split}.json", images=split, edit=edit)
    return Coco(root=tmp_path, **options)


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}.json", "images/{}"),
        ("annotations/{}.json", "images"),
        ("annotations/{}.json", "{}"),
        ("{}/annotations.json", "{}/images"),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
def test_known_layouts_are_found(tmp_path: Path, annotations: str, images: str) -> None:
    for split in ("train", "val"):
        write(tmp_path, annotations=annotations.format(split), images=images.format(split))
    train, val = Coco(root=tmp_path).build()
    assert (len(train), len(val)) == (2, 3)
    assert val.image(1).getpixel((0, 0)) == (6, 0, 0)


def test_file_names_may_count_from_the_root(tmp_path: Path) -> None:
    def edit(written: dict[str, Any]) -> None:
        for image in written["images"]:
            image["file_name"] = f"images/{image['file_name']}"

    write(tmp_path, annotations="annotations/val.json", images="images", edit=edit)
    assert Coco(root=tmp_path).open("val").image(0).size == (40, 30)


def test_given_places_are_taken(tmp_path: Path) -> None:
    write(tmp_path, annotations="labels/a.json", images="photos")
    given = Coco(root=tmp_path, val_annotations=Path("labels/a.json"), val_images=Path("photos"))
    assert len(given.open("val")) == 3


def test_objects_are_read_as_annotated(tmp_path: Path) -> None:
    val = coco(tmp_path).open("val")
    assert val.class_names == ("cat", "dog") and val.category_ids == (3, 7)
    first, second, nothing = (val.objects(index) for index in range(3))
    assert first.boxes.tolist() == [[4, 5, 14, 13], [20, 0, 40, 30]]
    assert first.labels.tolist() == [2, 1]
    assert first.is_crowd.tolist() == [False, True]
    assert first.image_id == 5 and first.areas.tolist() == [80, 600]
    assert second.masks is not None
    assert second.masks[0].tolist() == [0, 60, 1140]
    assert len(nothing) == 0 and nothing.masks == ()


def test_area_that_is_not_given_is_that_of_the_mask(tmp_path: Path) -> None:
    assert coco(tmp_path).open("val").objects(1).areas.tolist() == [60]


def test_training_leaves_out_empty_pictures_unless_asked(tmp_path: Path) -> None:
    source = coco(tmp_path)
    assert len(source.open("train")) == 2
    assert len(Coco(root=tmp_path, keep_empty=True).open("train")) == 3


def test_sets_may_have_boxes_only(tmp_path: Path) -> None:
    def edit(written: dict[str, Any]) -> None:
        for annotation in written["annotations"]:
            annotation["segmentation"] = []

    val = coco(tmp_path, edit).open("val")
    assert not val.has_masks
    assert val.objects(0).masks is None


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    def edit(written: dict[str, Any]) -> None:
        written["categories"][0]["name"] = "cat"

    assert coco(tmp_path, edit).open("val").class_names == ("cat (3)", "cat (7)")


def test_boxes_without_area_are_left_out_and_listed(tmp_path: Path) -> None:
    val = coco(tmp_path, lambda c: c["annotations"][0].update(bbox=[4, 5, 0, 8])).open("val")
    assert len(val.objects(0)) == 1
    assert "annotation 1 of image 5 (5.png)" in val.unreadable[0]


def test_boxes_are_cut_off_at_the_edge(tmp_path: Path) -> None:
    edit: Edit = lambda c: c["annotations"][0].update(bbox=[30.5, -1, 11, 8])  # noqa: E731
    assert coco(tmp_path, edit).open("val").objects(0).boxes[0].tolist() == [30.5, 0, 40, 7]


BROKEN: dict[str, tuple[Edit, str]] = {
    "no annotations": (lambda c: c.update(annotations=[]), "empty list of annotations"),
    "no categories": (lambda c: c.update(categories=[]), "empty list of categories"),
    "other format": (lambda c: c.pop("images"), "not in COCO's format"),
    "category twice": (
        lambda c: c["categories"].append({"id": 3, "name": "cow"}), "has the category",
    ),
    "unknown category": (
        lambda c: c["annotations"][0].update(category_id=99),
        r"annotation 1 of image 5 \(5.png\) has the category_id 99, .* 2 categories \(3, 7\)",
    ),
    "box outside": (
        lambda c: c["annotations"][0].update(bbox=[35, 5, 10, 8]),
        r"annotation 1 of image 5 \(5.png\) has the bbox \[35, 5, 10, 8\] .* outside the image of "
        "40x30 px",
    ),
    "negative box": (
        lambda c: c["annotations"][0].update(bbox=[5, 5, -1, 8]), "negative size",
    ),
    "box of texts": (
        lambda c: c["annotations"][0].update(bbox=["5", 5, 1, 8]), "four numbers",
    ),
    "no box": (lambda c: c["annotations"][0].pop("bbox"), "annotation 1 of image 5 .*four numbers"),
    "huge number": (
        lambda c: c["annotations"][0].update(bbox=[10**300, 5, 1, 8]), "four numbers",
    ),
    "crowd of 2": (lambda c: c["annotations"][0].update(iscrowd=2), "iscrowd 2"),
    "negative area": (lambda c: c["annotations"][0].update(area=-1), "area -1"),
    "broken mask": (
        lambda c: c["annotations"][1]["segmentation"].update(counts="o"),
        r"annotation 2 of image 6 \(6.png\) has a segmentation that has counts",
    ),
    "no such image": (
        lambda c: c["annotations"][0].update(image_id=77), "annotation 1 of image 77 belongs to no",
    ),
    "annotation id twice": (
        lambda c: c["annotations"][1].update(id=1), "number 1 of the list, has no id of its own",
    ),
    "annotation no object": (lambda c: c["annotations"].append(5), "number 3 of the list"),
    "image id twice": (lambda c: c["images"][1].update(id=5), "image 5 .* id of another image"),
    "image id no number": (lambda c: c["images"][1].update(id="5"), "image number 1 has the id 5"),
    "no size": (lambda c: c["images"][0].pop("height"), "image 5 .* has the height None"),
    "huge image": (lambda c: c["images"][0].update(height=10**9), "more than the limit"),
    "no mask": (
        lambda c: c["annotations"][0].pop("segmentation"),
        r"annotation 1 of image 5 \(5.png\) has no segmentation while others",
    ),
    "long name": (lambda c: c["images"][0].update(file_name="a" * 2000), "no usable file_name"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_annotations_are_named(tmp_path: Path, name: str) -> None:
    edit, reason = BROKEN[name]
    with pytest.raises(AnnotationError, match=reason) as caught:
        coco(tmp_path, edit).open("val")
    assert "val.json" in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../secret.png",
        "a/../../secret.png",
        "C:\\x.png",
        "..\\x.png",
        "",
        "a\0b",
        "\ud800",
        "x" * 300,
        5,
    ],
)
def test_file_names_never_leave_the_root(tmp_path: Path, name: object) -> None:
    source = coco(tmp_path, lambda c: c["images"][0].update(file_name=name))
    with pytest.raises(AnnotationError, match="image 5"):
        source.open("val")


def test_links_never_leave_the_root(tmp_path: Path) -> None:
    source = coco(tmp_path / "set")
    (tmp_path / "set/val/5.png").rename(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "set/val/5.png")
    with pytest.raises(UnreadableImageError, match="outside of"):
        source.open("val").image(0)


def test_link_to_itself_is_named_or_left_out(tmp_path: Path) -> None:
    source = coco(tmp_path)
    (tmp_path / "val/5.png").unlink()
    os.symlink("5.png", tmp_path / "val/5.png")
    with pytest.raises(UnreadableImageError, match=r"5\.png cannot be followed"):
        source.open("val").image(0)


def test_sets_of_crowds_alone_are_refused(tmp_path: Path) -> None:
    def only_crowds(content: dict[str, Any]) -> None:
        content["annotations"] = [one for one in content["annotations"] if one["iscrowd"]]

    with pytest.raises(AnnotationError, match="has crowds only"):
        coco(tmp_path, only_crowds).open("val")


def test_folder_of_pictures_may_be_a_link(tmp_path: Path) -> None:
    source = coco(tmp_path / "set")
    (tmp_path / "set/val").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set/val")
    assert source.open("val").image(0).size == (40, 30)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"images": [', "Expecting value at line 1, column 13"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"images": NaN}', "the number NaN"),
        (b'{"images": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2]", "got list"),
    ],
)
def test_malformed_json_is_refused_in_one_sentence(
    tmp_path: Path, text: bytes, reason: str
) -> None:
    source = coco(tmp_path)
    (tmp_path / "annotations/val.json").write_bytes(text)
    with pytest.raises(AnnotationError, match=reason):
        source.open("val")


def test_too_large_json_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="more than the limit of 100"):
        coco(tmp_path, max_json_bytes=100).open("val")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing"):
        Coco(root=tmp_path / "nothing").open("val")
    with pytest.raises(FileNotFoundError, match=r"no annotation file of val .*val2017.json"):
        Coco(root=tmp_path).open("val")
    source = coco(tmp_path)
    (tmp_path / "val/6.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"6\.png"):
        source.open("val").image(1)


def test_places_above_the_root_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="below the root"):
        coco(tmp_path, val_images=Path("../other")).open("val")


def test_picture_of_another_size_is_named(tmp_path: Path) -> None:
    source = coco(tmp_path)
    Image.new("RGB", (30, 40)).save(tmp_path / "val/6.png")
    with pytest.raises(UnreadableImageError, match=r"6\.png \(image 6\) is 30x40 px"):
        source.open("val").image(1)


def test_broken_ones_are_skipped_and_listed_when_asked(tmp_path: Path) -> None:
    def edit(written: dict[str, Any]) -> None:
        written["images"][2]["file_name"] = "../9.png"
        written["annotations"][2]["category_id"] = 99
        del written["annotations"][1]["segmentation"]

    val = coco(tmp_path, edit, on_unreadable="skip").open("val")
    assert len(val) == 2 and len(val.objects(0)) == 1
    named = zip(("image 9", "annotation 3", "annotation 2"), val.unreadable, strict=True)
    assert all(name in reason for name, reason in named)


def test_splits_must_have_the_same_categories(tmp_path: Path) -> None:
    source = coco(tmp_path)
    edit: Edit = lambda c: c["categories"].append({"id": 8, "name": "cow"})  # noqa: E731
    write(tmp_path, annotations="annotations/val.json", images="val", edit=edit)
    with pytest.raises(ValueError, match=r"category 8 \(cow\)"):
        source.build()


def test_large_tables_keep_every_object_with_its_image(tmp_path: Path) -> None:
    def edit(written: dict[str, Any]) -> None:
        written["annotations"] = [
            {
                "id": number, "image_id": (5, 6, 9)[number % 3], "category_id": 3, "iscrowd": 0,
                "bbox": [number, 0, 1, 1], "area": 1,
                "segmentation": [[number, 0, number + 1, 0, number + 1, 1, number, 1]],
            }
            for number in range(30)
        ]  # fmt: skip

    val = coco(tmp_path, edit).open("val")
    lefts = [val.objects(index).boxes[:, 0] for index in range(3)]
    assert [left.tolist() for left in lefts] == [list(range(start, 30, 3)) for start in range(3)]
    masks = val.objects(1).masks
    assert masks is not None
    assert [int(counts[0]) // 30 for counts in masks] == np.arange(1, 30, 3).tolist()
