"""Judging segmenters on pictures with masks."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from visionmamba.data import IGNORE, SegmentationPreprocessing, Shapes, open_masks
from visionmamba.models import DeiTConfig, SegmenterConfig, save
from visionmamba.tasks import (
    Inference,
    SegmentationEvaluation,
    Segmenter,
    evaluate_segmentation,
)
from visionmamba.tasks.segmentation import TASK_NAME

pytestmark = pytest.mark.once

CLASSES = ("sky", "road", "car")
TOLERANCE = 1e-6  # torchmetrics divides in float32


def write_weights(path: Path, class_names: tuple[str, ...] = CLASSES) -> Path:
    backbone = DeiTConfig(image_size=32, patch_size=8, d_model=32, depth=2, num_heads=1)
    count = len(class_names)
    model = SegmenterConfig(backbone=backbone, num_classes=count, head="segmenter").build()
    preprocessing = SegmentationPreprocessing(crop_size=32).to_dict()
    save(model, path, task=TASK_NAME, class_names=class_names, preprocessing=preprocessing)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "own.safetensors")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five pictures of two sizes with masks of three classes and unlabelled pixels."""
    root = tmp_path / "data"
    generator = np.random.default_rng(0)
    for split, count in (("val", 5), ("test", 1)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            size = (30, 40) if number % 2 else (36, 28)
            pixels = generator.integers(0, 256, (*size, 3), np.uint8)
            mask = generator.choice([0, 1, 2, IGNORE], size).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.mark.parametrize(
    "inference",
    [None, Inference(mode="slide", crop_size=16, stride=11, scales=(0.5, 1.0), flip=True)],
    ids=["whole", "windows"],
)
def test_one_matrix_over_the_set_as_torchmetrics(
    weights: Path, data: Path, inference: Inference | None
) -> None:
    found = evaluate_segmentation(weights, data, inference=inference, device="cpu", batch_size=2)
    pictures = open_masks(data)
    segmenter = Segmenter.load(weights, device="cpu", inference=inference)
    jaccard = MulticlassJaccardIndex(3, ignore_index=IGNORE)
    for index in range(len(pictures)):
        labels = segmenter(pictures.image(index)).labels
        jaccard.update(torch.tensor(labels)[None], torch.tensor(pictures.mask(index))[None])
    assert found.miou == pytest.approx(jaccard.compute().item(), abs=TOLERANCE)
    assert found.num_images == 5
    assert found.num_pixels == found.confusion.sum()
    assert found.num_pixels == sum((pictures.mask(i) != IGNORE).sum() for i in range(5))


def test_a_source_and_a_split_can_be_given(tmp_path: Path) -> None:
    source = Shapes(num_train=4, num_val=6, image_size=32)
    names = source.build().val.class_names
    weights = write_weights(tmp_path / "shapes.safetensors", names)
    found = evaluate_segmentation(weights, source, device="cpu", split="train", batch_size=4)
    assert found.num_images == 4
    assert found.num_pixels == 4 * 32 * 32


def test_test_split_is_judged(weights: Path, data: Path) -> None:
    assert evaluate_segmentation(weights, data, device="cpu", split="test").num_images == 1


def test_pictures_can_be_judged_at_another_size(weights: Path, data: Path) -> None:
    found = evaluate_segmentation(weights, data, device="cpu", short_side=64)
    assert found.num_pixels == evaluate_segmentation(weights, data, device="cpu").num_pixels


def test_unreadable_pictures_do_not_count(weights: Path, data: Path) -> None:
    (data / "val" / "images" / "1.png").write_text("buy milk")
    found = evaluate_segmentation(weights, data, device="cpu", on_unreadable="skip")
    assert found.num_images == 4
    assert len(found.unreadable) == 1
    assert "1.png" in found.unreadable[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((*CLASSES, "bus"), "knows 4 classes and .* has 3, which must be the same"),
        (("sky", "car", "road"), "knows 3 classes .* (their order differs)"),
    ],
)
def test_other_classes_are_refused(
    tmp_path: Path, data: Path, names: tuple[str, ...], message: str
) -> None:
    weights = write_weights(tmp_path / "other.safetensors", names)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        evaluate_segmentation(weights, data, device="cpu")


def evaluation() -> SegmentationEvaluation:
    return SegmentationEvaluation(
        miou=0.375,
        macc=0.75,
        aacc=0.75,
        num_images=1,
        num_pixels=4,
        inference=Inference(),
        images_per_second=1.0,
        model_images_per_second=2.0,
        class_names=CLASSES,
        confusion=np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]]),
        unreadable=(),
    )


def test_classes_say_what_they_are_taken_for() -> None:
    sky, road = evaluation().classes()
    assert (sky.num_pixels, sky.share, sky.iou, sky.accuracy, sky.taken_for) == (
        *(4, 1.0, 0.75, 0.75),
        "road",
    )
    assert (road.num_pixels, road.iou, road.accuracy, road.taken_for) == (0, 0.0, None, None)


def test_saves_tables_and_the_picture(tmp_path: Path) -> None:
    path = evaluation().save(tmp_path / "out")
    told = json.loads(path.read_text())
    assert told["miou"] == 0.375
    assert told["per_class"]["road"] == {"iou": 0.0, "accuracy": None}
    assert Inference.from_dict(told["inference"]) == Inference()
    with open(path.with_name("per_class.csv")) as file:
        assert list(csv.reader(file)) == [
            ["class", "pixels", "share", "iou", "accuracy", "taken_for"],
            ["sky", "4", "1.0", "0.75", "0.75", "road"],
            ["road", "0", "0.0", "0.0", "", ""],
        ]
    with open(path.with_name("confusion.csv")) as file:
        assert list(csv.reader(file))[1] == ["sky", "3", "1", "0"]
    with Image.open(path.with_name("confusion.png")) as picture:
        assert min(picture.size) > 800


@pytest.mark.gpu
def test_gpu_in_low_precision_agrees_with_the_cpu(weights: Path, data: Path) -> None:
    on_cpu = evaluate_segmentation(weights, data, device="cpu")
    on_gpu = evaluate_segmentation(
        weights, data, device="cuda", precision="bfloat16", num_workers=2
    )
    assert on_gpu.num_pixels == on_cpu.num_pixels
    assert abs(on_gpu.aacc - on_cpu.aacc) < 0.05  # near ties of an untrained model fall otherwise
