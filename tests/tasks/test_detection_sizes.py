"""Detections follow their picture from the model's input to its file."""

import pytest
import torch

from visionmamba.tasks.detection_sizes import resize_detections

pytestmark = pytest.mark.once


def found(height: int, width: int) -> dict[str, torch.Tensor]:
    """Two rectangles, of a quarter and of half of a picture."""
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, : height // 2, : width // 2] = True
    masks[1, :, width // 2 :] = True
    boxes = torch.tensor([[0, 0, width / 2, height / 2], [width / 2, 0, width, height]])
    return {"boxes": boxes, "masks": masks, "scores": torch.tensor([0.5, 0.25])}


@pytest.mark.parametrize("own_size", [(40, 60), (8, 12), (40, 12), (20, 30)])
def test_boxes_and_masks_are_resized_alike(own_size: tuple[int, int]) -> None:
    resized = resize_detections(found(20, 30), size=(20, 30), own_size=own_size)
    expected = found(*own_size)
    assert torch.allclose(resized["boxes"], expected["boxes"])
    assert torch.equal(resized["masks"], expected["masks"])
    assert torch.equal(resized["scores"], expected["scores"])


def test_no_detections_stay_none() -> None:
    none = {name: values[:0] for name, values in found(20, 30).items()}
    resized = resize_detections(none, size=(20, 30), own_size=(40, 60))
    assert resized["boxes"].shape == (0, 4) and resized["masks"].shape == (0, 40, 60)


def test_many_masks_are_resized_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resize_detections(found(20, 30), size=(20, 30), own_size=(40, 60))
    monkeypatch.setattr("visionmamba.tasks.detection_sizes._MAX_PIXELS_AT_ONCE", 1)
    parts = resize_detections(found(20, 30), size=(20, 30), own_size=(40, 60))
    assert torch.equal(whole["masks"], parts["masks"])


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masks must be \(n, 10, 30\)"):
        resize_detections(found(20, 30), size=(10, 30), own_size=(40, 60))
