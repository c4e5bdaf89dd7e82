"""Boxes and masks follow their picture through resizing, cutting and mirroring."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visionmamba.data import (
    DetectionAugmentation,
    DetectionPreprocessing,
    DrawnObjects,
    Objects,
    UnreadableImageError,
    box_transforms,
)
from visionmamba.data.box_transforms import BoxTransform
from visionmamba.data.object_masks import decode_mask, encode_mask

pytestmark = pytest.mark.once

FLAT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
STILL = DetectionAugmentation(min_scale=1, max_scale=1, horizontal_flip=0)
JITTER = DetectionAugmentation(min_scale=0.3, max_scale=2, vertical_flip=0.5)
EDGE_PX = 1.5  # resampled edges of a picture and nearest pixels of a mask differ by this


def transform(size: int | tuple[int, int], augmentation: DetectionAugmentation) -> BoxTransform:
    return DetectionPreprocessing(image_size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).build(
        augmentation
    )


def rectangles(*boxes: tuple[int, int, int, int], **changes: Any) -> tuple[Image.Image, Objects]:
    """A black picture of 60x40 px with a rectangle of its own colour for each object."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    masks = []
    for number, (left, top, right, bottom) in enumerate(boxes):
        pixels[top:bottom, left:right, number] = 255
        mask = np.zeros((40, 60), dtype=np.uint8)
        mask[top:bottom, left:right] = 1
        masks.append(encode_mask(mask))
    values: dict[str, Any] = {
        "image_id": 3,
        "height": 40,
        "width": 60,
        "boxes": np.array(boxes, dtype=np.float64).reshape(-1, 4),
        "labels": np.arange(1, len(boxes) + 1),
        "is_crowd": np.zeros(len(boxes), dtype=np.bool_),
        "areas": np.array([mask[1::2].sum() for mask in masks], dtype=np.float64),
        "masks": tuple(masks),
    }
    return Image.fromarray(pixels), Objects(**(values | changes))


def box_of(pixels: Tensor) -> list[int]:
    """Left, top, right, bottom around what is set in (H, W)."""
    rows, columns = pixels.any(dim=1).nonzero(), pixels.any(dim=0).nonzero()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@pytest.mark.parametrize("seed", range(25))
def test_boxes_are_tight_around_masks_and_masks_cover_their_pixels(seed: int) -> None:
    torch.manual_seed(seed)
    image, objects = rectangles((3, 4, 25, 33), (40, 2, 58, 20), (30, 25, 50, 39))
    pixels, target = transform((48, 56), JITTER)(image, objects)
    assert pixels.shape == (3, 48, 56) and target["size"] == (48, 56)
    assert target["masks"].shape == (len(target["labels"]), 48, 56)
    for box, label, mask, area in zip(
        target["boxes"], target["labels"], target["masks"], target["area"], strict=True
    ):
        assert box_of(mask) == box.tolist()
        assert mask.sum() == area == (box[2] - box[0]) * (box[3] - box[1])
        seen = pixels[label - 1] > 0.5
        left, top, right, bottom = (float(side) for side in box)
        assert np.abs(np.array(box_of(seen)) - (left, top, right, bottom)).max() <= EDGE_PX
        assert (seen != mask.bool()).sum() <= EDGE_PX * 2 * ((right - left) + (bottom - top))


@pytest.mark.parametrize("seed", range(25))
def test_boxes_without_masks_move_as_those_with_masks(seed: int) -> None:
    boxes = (3, 4, 25, 33), (40, 2, 58, 20), (30, 25, 50, 39)
    found = {}
    for masks in (True, False):
        torch.manual_seed(seed)
        image, objects = rectangles(*boxes, **({} if masks else {"masks": None}))
        target = transform((48, 56), JITTER)(image, objects)[1]
        assert ("masks" in target) == masks
        pairs = zip(target["labels"].tolist(), target["boxes"], strict=True)
        found[masks] = {label: box for label, box in pairs}
    for label, box in found[False].items():
        sides = (box[2:] - box[:2]).min()
        assert label in found[True] or sides < 2
        if label in found[True]:
            assert (found[True][label] - box).abs().max() <= 1


@pytest.mark.parametrize("seed", range(10))
def test_drawn_objects_keep_their_pixels(seed: int) -> None:
    torch.manual_seed(seed)
    drawn = DrawnObjects(num_train=2, num_val=1, image_size=48, large_share=1).open("val")
    image, objects = drawn.image(0), drawn.objects(0)
    assert objects.masks is not None
    whole = np.stack([decode_mask(mask, 48, 48) for mask in objects.masks])
    still = DetectionAugmentation(min_scale=1, max_scale=1, vertical_flip=0.5)
    target = transform(48, still)(image, objects)[1]
    masks = target["masks"].numpy()
    sides = (slice(None), slice(None, None, -1))
    flips = [(row, column) for row in sides for column in sides]
    assert any(np.array_equal(masks, whole[:, row, column]) for row, column in flips)


@pytest.mark.parametrize("seed", range(25))
def test_masks_are_the_nearest_pixels_of_what_is_cut_out(seed: int) -> None:
    masks = np.random.default_rng(seed).random((6, 40, 60)) < [[[0.7]], [[0.01]], [[0.0]]] * 2
    masks[3:, 20:] = False
    counts = tuple(encode_mask(mask) for mask in masks)
    image, objects = rectangles(*[(0, 0, 60, 40)] * 3)
    several = {"labels": np.arange(1, 7), "is_crowd": np.zeros(6, dtype=np.bool_)}
    objects = replace(objects, masks=counts, **several)
    size = (70, 56)
    change = transform(size, replace(JITTER, min_scale=0.2, max_scale=3))
    torch.manual_seed(seed)
    window = change._draw(image, change.augmentation or STILL)
    torch.manual_seed(seed)
    target = change(image, objects)[1]
    shown = np.zeros((6, *size), dtype=np.uint8)
    rows, columns = (
        ((start + np.arange(num) + 0.5) * (whole / resized)).astype(int)
        for start, num, whole, resized in zip(
            window[1:3], window[3:5], (40, 60), window.resized, strict=True
        )
    )
    seen = masks[:, rows[:: -1 if window.is_upside_down else 1]]
    seen = seen[:, :, columns[:: -1 if window.is_mirrored else 1]]
    shown[:, : window.height, : window.width] = seen
    kept = shown.any(axis=(1, 2))
    assert np.array_equal(target["masks"], shown[kept])
    assert target["labels"].tolist() == (np.flatnonzero(kept) + 1).tolist()
    assert target["boxes"].tolist() == [box_of(mask) for mask in target["masks"]]
    assert target["area"].tolist() == shown[kept].sum(axis=(1, 2)).tolist()


@pytest.mark.parametrize("scale", [0.6, 1.5])
def test_pixels_are_normalised_as_in_evaluation_and_then_padded(scale: float) -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    preprocessing = DetectionPreprocessing(image_size=(40, 60))
    augmentation = DetectionAugmentation(min_scale=scale, max_scale=scale, horizontal_flip=0)
    change = preprocessing.build(augmentation)
    torch.manual_seed(0)
    window = change._draw(image, augmentation)
    shown = change._resized(image, window)
    torch.manual_seed(0)
    pixels, _ = change(image, rectangles()[1])
    normalized = replace(preprocessing, image_size=shown.size[::-1]).build().pixels(shown)
    expected = torch.zeros(3, 40, 60)
    expected[:, : window.height, : window.width] = normalized
    assert torch.equal(pixels, expected)


def test_evaluation_cuts_nothing_out() -> None:
    with pytest.raises(ValueError, match="build\\(\\) with an augmentation"):
        DetectionPreprocessing().build().cut(*rectangles())


def test_masks_beyond_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box_transforms, "_MAX_MASK_BYTES", 48 * 48 - 1)
    drawn = DrawnObjects(num_train=2, num_val=1, image_size=48, large_share=1).open("val")
    still = DetectionAugmentation(min_scale=1, max_scale=1)
    with pytest.raises(UnreadableImageError, match=r"masks of 48x48 px are more than can be"):
        transform(48, still)(drawn.image(0), drawn.objects(0))


def test_picture_that_fits_is_left_as_it_is() -> None:
    image, objects = rectangles((3, 4, 25, 33))
    pixels, target = transform((40, 60), STILL)(image, objects)
    assert torch.equal(pixels[0] > 0.5, target["masks"][0].bool())
    assert target["boxes"].tolist() == [[3, 4, 25, 33]]


def test_mirroring_twice_gives_the_first_target() -> None:
    image, objects = rectangles((3, 4, 25, 33))
    flips = DetectionAugmentation(min_scale=1, max_scale=1, horizontal_flip=1, vertical_flip=1)
    pixels, target = transform((40, 60), flips)(image, objects)
    assert target["boxes"].tolist() == [[35, 7, 57, 36]]
    assert box_of(pixels[0] > 0.5) == [35, 7, 57, 36]


def test_small_pictures_are_padded_at_the_right_and_the_bottom() -> None:
    image, objects = rectangles((0, 0, 60, 40))
    half = DetectionAugmentation(min_scale=0.5, max_scale=0.5)
    pixels, target = transform((60, 60), half)(image, objects)
    assert target["boxes"].tolist() == [[0, 0, 30, 20]]
    assert not pixels[:, 20:].any() and not pixels[:, :, 30:].any()


def test_objects_outside_of_the_cut_and_crowds_are_left_out() -> None:
    image, objects = rectangles((0, 0, 4, 4), (20, 0, 60, 40), is_crowd=np.array([False, True]))
    large = DetectionAugmentation(min_scale=4, max_scale=4)
    for seed in range(8):
        torch.manual_seed(seed)
        target = transform((40, 60), large)(image, objects)[1]
        assert 2 not in target["labels"]
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()


def test_picture_without_objects_gives_empty_tensors() -> None:
    image, objects = rectangles()
    target = transform((32, 32), JITTER)(image, objects)[1]
    assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (0,) and target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, 32, 32) and target["masks"].dtype == torch.uint8


def test_scales_are_drawn_from_the_whole_range() -> None:
    image, objects = rectangles((0, 0, 60, 40))
    change = transform((60, 60), DetectionAugmentation())
    widths = [float(change(image, objects)[1]["boxes"][:, 2].sum()) for _ in range(200)]
    assert min(widths) < 12
    assert 0.4 < np.mean([width >= 60 for width in widths]) < 0.65  # scale of 1 to 2 of 0.1 to 2


def test_draws_depend_on_torchs_seed_alone() -> None:
    image, objects = rectangles((3, 4, 25, 33))
    change = transform((48, 56), JITTER)
    drawn = []
    for numpy_seed in (1, 2):
        np.random.seed(numpy_seed)
        torch.manual_seed(5)
        drawn.append(change(image, objects)[0])
    assert torch.equal(*drawn)


def test_evaluation_resizes_the_picture_and_keeps_the_targets() -> None:
    image, objects = rectangles((3, 4, 25, 33))
    change = DetectionPreprocessing(image_size=30, **FLAT).build()
    pixels, target = change(image, objects)
    assert pixels.shape == (3, 20, 30)
    assert target["boxes"].tolist() == [[3, 4, 25, 33]] and target["size"] == (40, 60)
    assert "masks" not in target and np.array_equal(target["run_lengths"], objects.masks)


def test_objects_of_another_picture_are_refused() -> None:
    image, objects = rectangles((3, 4, 25, 33))
    with pytest.raises(ValueError, match="60x40 px and the image has 40x60"):
        transform(32, JITTER)(image.transpose(Image.Transpose.ROTATE_90), objects)


def test_preprocessing_survives_the_header_of_a_file() -> None:
    preprocessing = DetectionPreprocessing(image_size=(64, 96), interpolation="bicubic")
    assert DetectionPreprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    with pytest.raises(ValueError, match="needs the keys"):
        DetectionPreprocessing.from_dict({"image_size": [1, 1]})


@pytest.mark.parametrize(
    "options", [{"min_scale": 0}, {"min_scale": 1, "max_scale": 0.5}, {"vertical_flip": 2}]
)
def test_changes_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        DetectionAugmentation(**options)
