"""Windows over large pictures: where they lie, and how what they show is put together."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visionmamba.data import DetectionPreprocessing
from visionmamba.data.object_masks import decode_mask, encode_mask
from visionmamba.tasks import DetectionInference
from visionmamba.tasks.detection_sizes import FoundObjects
from visionmamba.tasks.tiles import Window, cut_windows, find_objects, join_windows

pytestmark = pytest.mark.once

SIZE = (60, 100)
LEFT, RIGHT = Window(0, 0, 60, 60), Window(0, 40, 60, 100)
PLAIN = DetectionPreprocessing(
    image_size=32, interpolation="nearest", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)

Box = tuple[int, int, int, int]


def rectangle(box: Box, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 1
    return mask


def objects(*rows: tuple[Box, float, int]) -> FoundObjects:
    """Rectangles with scores and labels."""
    return FoundObjects(
        boxes=np.array([box for box, _, _ in rows], dtype=np.float64).reshape(-1, 4),
        scores=np.array([score for _, score, _ in rows]),
        labels=np.array([label for _, _, label in rows], dtype=np.int64),
        masks=tuple(encode_mask(rectangle(box)) for box, _, _ in rows),
    )


def joined(*found: FoundObjects, windows: Sequence[Window] = (LEFT, RIGHT)) -> FoundObjects:
    return join_windows(windows, found, size=SIZE)


def rows(found: FoundObjects) -> list[tuple[list[float], float, int]]:
    return list(
        zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    )


class Bright:
    """Finds every bright rectangle of its own gray value, as a perfect detector would."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.sizes += [tuple(image.shape) for image in images]
        return [self._find(image) for image in images]

    def _find(self, image: Tensor) -> dict[str, Tensor]:
        grays = (image[0] * 255).round().int()
        masks = [grays == value for value in sorted(set(grays.flatten().tolist()) - {0})]
        boxes = []
        for mask in masks:
            down, across = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
            boxes.append([int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1])
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "scores": torch.linspace(0.9, 0.6, len(masks)),
            "labels": torch.ones(len(masks), dtype=torch.int64),
            "masks": torch.stack(masks) if masks else torch.zeros(0, *grays.shape),
        }


def test_windows_cover_the_picture_and_end_with_it() -> None:
    inference = DetectionInference(mode="slide", crop_size=40, stride=30)
    windows = cut_windows((60, 100), inference)
    assert windows == [
        Window(top, left, top + 40, left + 40) for top in (0, 20) for left in (0, 30, 60)
    ]
    assert cut_windows((30, 35), inference) == [Window(0, 0, 30, 35)]
    assert cut_windows((60, 100), DetectionInference(crop_size=40, stride=30)) == [
        Window(0, 0, 60, 100)
    ]


def test_an_object_that_two_windows_show_whole_is_told_once() -> None:
    found = joined(objects(((45, 10, 55, 20), 0.7, 1)), objects(((45, 10, 55, 21), 0.8, 1)))
    assert rows(found) == [([45, 10, 55, 21], 0.8, 1)]


def test_an_object_that_an_edge_cuts_gives_way_to_the_whole_one() -> None:
    cut, whole = ((50, 10, 60, 20), 0.95, 1), ((50, 10, 75, 20), 0.6, 1)
    assert rows(joined(objects(cut), objects(whole))) == [([50, 10, 75, 20], 0.6, 1)]


def test_a_sliver_of_an_object_gives_way_too() -> None:
    sliver, whole = ((57, 12, 60, 15), 0.95, 1), ((45, 10, 75, 20), 0.6, 1)
    assert rows(joined(objects(sliver), objects(whole))) == [([45, 10, 75, 20], 0.6, 1)]


def test_what_is_hardly_believed_changes_nothing() -> None:
    piece, doubtful = ((30, 10, 60, 20), 0.9, 1), ((42, 8, 80, 22), 0.2, 1)
    assert rows(joined(objects(piece), objects(doubtful))) == [
        ([30, 10, 60, 20], 0.9, 1),
        ([42, 8, 80, 22], 0.2, 1),
    ]
    wide = ((40, 0, 100, 40), 0.2, 1)
    assert len(joined(objects(piece), objects(wide)).labels) == 2


def test_an_object_larger_than_windows_is_pieced_together() -> None:
    first, second = ((10, 10, 60, 20), 0.6, 2), ((40, 10, 90, 22), 0.9, 2)
    found = joined(objects(first), objects(second))
    assert rows(found) == [([10, 10, 90, 22], 0.9, 2)]
    expected = rectangle((10, 10, 60, 20)) | rectangle((40, 10, 90, 22))
    np.testing.assert_array_equal(decode_mask(found.masks[0], *SIZE), expected)


def test_pieces_of_many_windows_are_one_object() -> None:
    windows = [Window(0, left, 60, left + 40) for left in range(0, 61, 20)]
    pieces = [objects(((max(left, 5), 30, min(left + 40, 95), 35), 0.5, 1))
              for left in range(0, 61, 20)]  # fmt: skip
    assert rows(joined(*pieces, windows=windows)) == [([5, 30, 95, 35], 0.5, 1)]


def test_objects_of_other_classes_or_places_stay_apart() -> None:
    first = objects(((45, 10, 55, 20), 0.7, 1), ((2, 2, 8, 8), 0.2, 1))
    second = objects(((45, 10, 55, 20), 0.8, 2), ((42, 40, 50, 50), 0.3, 1))
    found = joined(first, second)
    assert found.scores.tolist() == [0.8, 0.7, 0.3, 0.2]
    assert found.labels.tolist() == [2, 1, 1, 1]


def test_neighbours_that_touch_stay_apart() -> None:
    whole, neighbour = ((44, 10, 52, 20), 0.7, 1), ((51, 10, 60, 20), 0.9, 1)
    beyond = ((51, 10, 70, 20), 0.8, 1)
    found = joined(objects(whole, neighbour), objects(beyond, whole))
    assert found.boxes.tolist() == [[51, 10, 70, 20], [44, 10, 52, 20]]


def test_what_one_window_tells_is_not_judged_again() -> None:
    twice = objects(((10, 10, 20, 20), 0.9, 1), ((10, 10, 20, 21), 0.8, 1))
    assert len(joined(twice, objects()).labels) == 2


def test_nothing_found_is_nothing() -> None:
    found = joined(objects(), objects())
    assert found.boxes.shape == (0, 4)
    assert found.labels.dtype == np.int64


@pytest.mark.parametrize(("crop_size", "num_windows"), [(32, 1), (40, 3)])
def test_windows_find_the_objects_of_a_large_picture(crop_size: int, num_windows: int) -> None:
    generator = np.random.default_rng(0)
    pixels = np.zeros((75, 105), np.uint8)
    boxes = []
    for row in range(5):
        for column in range(7):
            width, height = generator.integers(4, 9, 2).tolist()
            left, top = 15 * column + 3, 15 * row + 3
            pixels[top : top + height, left : left + width] = 60 + row * 7 + column
            boxes.append([left, top, left + width, top + height])
    model = Bright()
    found = find_objects(
        model,
        Image.fromarray(pixels).convert("RGB"),
        preprocessing=replace(PLAIN, image_size=crop_size),
        inference=DetectionInference(
            mode="slide", crop_size=crop_size, stride=crop_size - 16, num_windows=num_windows
        ),
    )
    assert sorted(found.boxes.tolist()) == sorted(boxes)
    assert set(model.sizes) == {(3, crop_size, crop_size)}
    for box, counts in zip(found.boxes.astype(int).tolist(), found.masks, strict=True):
        expected = rectangle(tuple(box), (75, 105))
        np.testing.assert_array_equal(decode_mask(counts, 75, 105), expected)


def test_objects_come_in_the_pixels_of_the_picture() -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[16:32, 40:80] = 200
    found = find_objects(
        Bright(), Image.fromarray(pixels), preprocessing=PLAIN, inference=DetectionInference()
    )
    assert found.boxes.tolist() == [[40, 16, 80, 32]]
    np.testing.assert_array_equal(decode_mask(found.masks[0], 64, 128), pixels[..., 0] > 0)


def test_low_scores_are_left_out_before_windows_meet() -> None:
    pixels = np.zeros((32, 32), np.uint8)
    pixels[2:6, 2:6], pixels[10:14, 10:14] = 100, 200  # scored 0.9 and 0.6
    found = find_objects(
        Bright(),
        Image.fromarray(pixels).convert("RGB"),
        preprocessing=PLAIN,
        inference=DetectionInference(),
        min_score=0.7,
    )
    assert found.boxes.tolist() == [[2, 2, 6, 6]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "tiles"}, 'mode must be "whole" or "slide"'),
        ({"stride": 2000}, "stride must lie between 1 and crop_size=1024"),
        ({"num_windows": 0}, "num_windows must be at least 1"),
        ({"min_score": 1.5}, "min_score must lie between 0 and 1, got 1.5"),
        ({"scales": [1.0]}, "inference knows .*; got scales"),
        ({"min_score": "high"}, "min_score is of the wrong type"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionInference.from_dict(change)


def test_settings_come_back_from_a_header() -> None:
    inference = DetectionInference(mode="slide", crop_size=64, stride=32, min_score=1)
    assert DetectionInference.from_dict(inference.to_dict()) == inference
