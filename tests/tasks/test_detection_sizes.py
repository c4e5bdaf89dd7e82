"""Detections follow their picture from the model's input to its file."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from visionmamba.data.object_masks import decode_mask, mask_area
from visionmamba.tasks.detection_sizes import own_objects

pytestmark = pytest.mark.once


def found(height: int, width: int) -> dict[str, torch.Tensor]:
    """Two rectangles, of a quarter and of half of a picture."""
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, : height // 2, : width // 2] = True
    masks[1, :, width // 2 :] = True
    boxes = torch.tensor([[0, 0, width / 2, height / 2], [width / 2, 0, width, height]])
    scores, labels = torch.tensor([0.5, 0.25]), torch.tensor([3, 1])
    return {"boxes": boxes, "masks": masks, "scores": scores, "labels": labels}


@pytest.mark.parametrize("own_size", [(40, 60), (8, 12), (40, 12), (20, 30)])
def test_boxes_and_masks_are_resized_alike(own_size: tuple[int, int]) -> None:
    resized = own_objects(found(20, 30), size=(20, 30), own_size=own_size)
    expected = found(*own_size)
    np.testing.assert_allclose(resized.boxes, expected["boxes"])
    for counts, mask in zip(resized.masks, expected["masks"].numpy(), strict=True):
        np.testing.assert_array_equal(decode_mask(counts, *own_size), mask)
    assert resized.scores.tolist() == [0.5, 0.25]
    assert resized.labels.tolist() == [3, 1]


@pytest.mark.parametrize("own_size", [(37, 51), (9, 90), (200, 11), (60, 60)])
def test_masks_are_what_resizing_the_whole_picture_gives(own_size: tuple[int, int]) -> None:
    rows, columns = torch.meshgrid(torch.arange(60.0), torch.arange(60.0), indexing="ij")
    mask = ((rows - 21) ** 2 + (columns - 35) ** 2 < 200)[None]
    one = {
        "boxes": torch.tensor([[20.6, 6.7, 49.2, 35.4]]),
        "masks": mask,
        "scores": torch.ones(1),
        "labels": torch.ones(1),
    }
    (counts,) = own_objects(one, size=(60, 60), own_size=own_size).masks
    whole = F.interpolate(mask[None].float(), own_size, mode="bilinear", antialias=True)[0, 0]
    differ = decode_mask(counts, *own_size) != (whole >= 0.5).numpy()
    assert differ.sum() <= 0.01 * mask_area(counts)  # Pillow rounds shares to 1 / 255


def test_what_a_window_found_lies_in_the_picture() -> None:
    in_window = own_objects(
        found(20, 30), size=(20, 30), own_size=(10, 15), at=(7, 20), picture_size=(50, 40)
    )
    np.testing.assert_allclose(in_window.boxes[0], [20, 7, 27.5, 12])
    expected = np.zeros((50, 40), np.uint8)
    expected[7:17, 28:35] = 1  # from 27.5 on
    held = decode_mask(in_window.masks[1], 50, 40)
    np.testing.assert_array_equal(held[:, 28:], expected[:, 28:])
    assert not held[:, :27].any()


def test_probabilities_belong_to_an_object_from_a_half_on() -> None:
    shares = {**found(20, 30), "masks": found(20, 30)["masks"][:, None] * 0.5}
    held = own_objects(shares, size=(20, 30), own_size=(20, 30)).masks
    assert [mask_area(counts) for counts in held] == [150, 300]


@pytest.mark.parametrize("box", [[-9.0, -9, -1, -1], [3, 3, 3, 9], [28, 18, 40, 40]])
def test_boxes_without_pixels_have_empty_masks(box: list[float]) -> None:
    empty = {**found(20, 30), "boxes": torch.tensor([box, box])}
    empty["masks"] = torch.zeros_like(empty["masks"])
    resized = own_objects(empty, size=(20, 30), own_size=(7, 9))
    assert [mask_area(counts) for counts in resized.masks] == [0, 0]
    assert [int(counts.sum()) for counts in resized.masks] == [63, 63]


def test_no_detections_stay_none() -> None:
    none = {name: values[:0] for name, values in found(20, 30).items()}
    resized = own_objects(none, size=(20, 30), own_size=(4, 6))
    assert resized.boxes.shape == (0, 4)
    assert resized.masks == ()


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masks must be \(2, 10, 30\), got \(2, 20, 30\)"):
        own_objects(found(20, 30), size=(10, 30), own_size=(4, 6))


def test_some_can_be_taken() -> None:
    every = own_objects(found(20, 30), size=(20, 30), own_size=(20, 30))
    assert every.take(every.scores < 0.4).labels.tolist() == [1]
    assert every.take(np.array([1, 0])).labels.tolist() == [1, 3]
