"""Scores of whole pictures and of windows over them, against the published way to lay windows."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.data import BatchTooLargeError
from visionmamba.tasks import Inference, sliding
from visionmamba.tasks.sliding import (
    Band,
    explain_large_picture,
    predict_labels,
    resize_span,
    score_bands,
)

pytestmark = pytest.mark.once

NUM_CLASSES = 5
SLIDE = Inference(mode="slide", crop_size=16, stride=11, num_windows=3)
TOLERANCE = 1e-5  # of scores of size 1, added up in another order
SIZES = [(40, 25), (25, 40), (16, 16), (9, 9), (10, 45)]


@pytest.fixture
def model() -> torch.nn.Module:
    """Scores that depend on where a window ends: a convolution with zeros around it."""
    return torch.nn.Conv2d(3, NUM_CLASSES, 3, padding=1).requires_grad_(False)


def published(model: torch.nn.Module, images: Tensor, crop: int, stride: int) -> Tensor:
    """Mean scores of windows as mmsegmentation lays them, over the whole picture at once."""
    height, width = images.shape[-2:]
    sums = torch.zeros(len(images), NUM_CLASSES, height, width)
    counts = torch.zeros(height, width)
    for row in range(max(height - crop + stride - 1, 0) // stride + 1):
        for column in range(max(width - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + crop, height), min(column * stride + crop, width)
            down, across = slice(max(bottom - crop, 0), bottom), slice(max(right - crop, 0), right)
            sums[:, :, down, across] += model(images[:, :, down, across])
            counts[down, across] += 1
    return sums / counts


def assembled(bands: Iterable[Band], size: tuple[int, int], batch: int = 2) -> Tensor:
    scores = torch.full((batch, NUM_CLASSES, *size), float("nan"))
    for band in bands:
        scores[:, :, band.rows, band.columns] = band.scores
    return scores


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


@pytest.fixture(params=[2**24, 2000], ids=["one band", "many bands"])
def band_limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliding, "_MAX_BAND_SCORES", request.param)


@pytest.mark.usefixtures("band_limit")
@pytest.mark.parametrize("target", [None, (61, 70), (20, 13)])
@pytest.mark.parametrize("size", SIZES)
def test_windows_score_as_published(
    model: torch.nn.Module, size: tuple[int, int], target: tuple[int, int] | None
) -> None:
    images, wanted = torch.randn(2, 3, *size), target or size
    expected = resized(published(model, images, 16, 11), wanted)
    found = assembled(score_bands(model, images, size=wanted, inference=SLIDE), wanted)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.usefixtures("band_limit")
@pytest.mark.parametrize("target", [None, (71, 80), (20, 13)])
def test_whole_picture_scores_as_the_model_does(
    model: torch.nn.Module, target: tuple[int, int] | None
) -> None:
    images, wanted = torch.randn(2, 3, 30, 41), target or (30, 41)
    found = assembled(score_bands(model, images, size=wanted, inference=Inference()), wanted)
    torch.testing.assert_close(found, resized(model(images), wanted), atol=TOLERANCE, rtol=0)


@pytest.mark.usefixtures("band_limit")
@pytest.mark.parametrize("size", [(24, 19), (19, 24)])
def test_scales_and_mirror_images_average_their_probabilities(
    model: torch.nn.Module, size: tuple[int, int]
) -> None:
    images, scales = torch.randn(2, 3, *size), (0.5, 1.0, 1.75)
    total = torch.zeros(2, NUM_CLASSES, *size)
    for scale in scales:
        scaled = resized(images, (round(scale * size[0]), round(scale * size[1])))
        mirrored = published(model, scaled.flip(-1), 16, 11).flip(-1)
        for scores in (published(model, scaled, 16, 11), mirrored):
            total += resized(scores, size).softmax(dim=1)
    inference = Inference(mode="slide", crop_size=16, stride=11, scales=scales, flip=True)
    found = assembled(score_bands(model, images, size=size, inference=inference), size)
    torch.testing.assert_close(found.exp(), total / 6, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_mirrored_picture_gets_mirrored_labels_when_both_are_judged(
    model: torch.nn.Module, mode: sliding.Mode
) -> None:
    images = torch.randn(1, 3, 24, 39)
    inference = Inference(mode=mode, crop_size=16, stride=11, flip=True)
    labels = predict_labels(model, images, size=(24, 39), inference=inference)
    mirrored = predict_labels(model, images.flip(-1), size=(24, 39), inference=inference)
    assert torch.equal(mirrored.flip(-1), labels)


def test_labels_are_the_highest_scores(model: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 20, 30)
    labels = predict_labels(model, images, size=(20, 30), inference=Inference())
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), model(images).argmax(dim=1))


@pytest.mark.parametrize(("source", "target"), [(7, 7), (7, 19), (19, 7), (5, 1), (1, 4)])
def test_span_is_a_part_of_the_resized_whole(source: int, target: int) -> None:
    x = torch.randn(1, 2, source, 3)
    whole = resized(x, (target, 3))
    for start in range(target):
        part = resize_span(x, -2, start, target, target)
        torch.testing.assert_close(part, whole[:, :, start:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("turn", [False, True], ids=["high", "wide"])
def test_held_scores_do_not_grow_with_the_longer_side(
    turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    take = sliding._View.take

    def noting(self: sliding._View, start: int, stop: int) -> Tensor:
        rows = take(self, start, stop)
        assert self._sums is not None
        held.append(self._sums.untyped_storage().nbytes())
        return rows

    def scores(windows: Tensor) -> Tensor:
        return windows[:, :1].expand(-1, 40, -1, -1)

    monkeypatch.setattr(sliding, "_MAX_BAND_SCORES", 2**14)
    monkeypatch.setattr(sliding._View, "take", noting)
    inference = Inference(mode="slide", crop_size=32, stride=21)
    most = []
    for length in (128, 512):
        held.clear()
        size = (48, length) if turn else (length, 48)
        labels = predict_labels(scores, torch.zeros(1, 3, *size), size=size, inference=inference)
        assert labels.shape == (1, *size)
        most.append(max(held))
    assert most[1] <= 1.2 * most[0]
    assert most[1] < 40 * 48 * 512 * 4 / 4


def test_pictures_stay_where_they_are_while_windows_go_to_the_model() -> None:
    devices = set()

    def scores(windows: Tensor) -> Tensor:
        devices.add(windows.device.type)
        return windows

    images, size = torch.zeros(1, 3, 40, 20), (40, 20)
    list(score_bands(scores, images, size=size, inference=SLIDE, device=torch.device("meta")))
    assert devices == {"meta"}


def test_settings_survive_the_header_of_a_file() -> None:
    inference = Inference(mode="slide", crop_size=64, stride=40, scales=(0.5, 1.0), flip=True)
    assert Inference.from_dict(inference.to_dict()) == inference
    assert Inference.from_dict({}) == Inference()
    with pytest.raises(ValueError, match=r"inference knows mode, .*; got tiles"):
        Inference.from_dict({"tiles": 3})


@pytest.mark.parametrize(
    "values",
    [{"crop_size": 512.5}, {"mode": []}, {"flip": 1}, {"num_windows": True}, {"scales": "12"}],
)
def test_settings_of_another_type_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is of the wrong type"):
        Inference.from_dict(values)


@pytest.mark.parametrize(("num_windows", "most"), [(1, 1), (3, 3), (4, 4), (100, 8)])
def test_no_more_windows_at_once_than_asked_for(
    model: torch.nn.Module, num_windows: int, most: int
) -> None:
    seen: list[int] = []

    def scores(windows: Tensor) -> Tensor:
        seen.append(len(windows))
        found: Tensor = model(windows)
        return found

    images, size = torch.randn(4, 3, 40, 25), (40, 25)
    inference = replace(SLIDE, num_windows=num_windows)
    found = assembled(score_bands(scores, images, size=size, inference=inference), size, 4)
    assert max(seen) == most
    torch.testing.assert_close(found, published(model, images, 16, 11), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tiled"}, 'mode must be "whole" or "slide", got \'tiled\''),
        ({"crop_size": 0}, "crop_size must be at least 1, got 0"),
        ({"stride": 600}, "stride must lie between 1 and crop_size=512, .* got 600"),
        ({"scales": ()}, r"scales must be numbers above 0 and at most 16, got \(\)"),
        ({"scales": (0.0,)}, "scales must be numbers above 0"),
        ({"num_windows": 0}, "num_windows must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inference(**options)


@pytest.mark.parametrize(
    ("mode", "remedy"), [("whole", "--mode slide"), ("slide", "lower num_windows or crop_size")]
)
def test_picture_too_large_for_memory_says_what_to_do(mode: sliding.Mode, remedy: str) -> None:
    with (
        pytest.raises(BatchTooLargeError, match=f"picture of 30x20.*{remedy}"),
        explain_large_picture(Inference(mode=mode), (30, 20)),
    ):
        raise MemoryError


def test_several_pictures_too_large_for_memory_name_the_batch_size() -> None:
    with (
        pytest.raises(BatchTooLargeError, match=r"4 pictures of 30x20 .* --batch-size"),
        explain_large_picture(SLIDE, (30, 20), num_images=4),
    ):
        raise MemoryError
