"""The predictor of objects: what it takes, what it answers, what it writes."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tasks.test_run_lengths import decoded
from visionmamba.data import (
    BatchTooLargeError,
    DetectionPreprocessing,
    Preprocessing,
    UnreadableImageError,
)
from visionmamba.models import DeiTConfig, DetectorConfig, SegmenterConfig, load, save
from visionmamba.models.weights import METADATA_KEY, read_metadata
from visionmamba.tasks import Classifier, DetectionInference, Detections, Detector, Segmenter

pytestmark = pytest.mark.once

CLASSES = ("red", "green", "blue")
PALETTE = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
PLAIN = DetectionPreprocessing(
    image_size=40, interpolation="nearest", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)


class _Brightest(torch.nn.Module):
    """What is bright in a channel is an object of its class, the surer the brighter."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self._find(image) for image in images]

    def _find(self, image: Tensor) -> dict[str, Tensor]:
        labels = [label for label in (1, 2, 3) if (image[label - 1] > 0.3).any()]
        masks = image[[label - 1 for label in labels]] > 0.3
        boxes = []
        for mask in masks:
            down, across = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
            boxes.append([int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1])
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "scores": torch.tensor([float(image[label - 1].max()) for label in labels]),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": masks,
        }


def detector(**options: Any) -> Detector:
    settings: dict[str, Any] = {
        "preprocessing": PLAIN,
        "class_names": CLASSES,
        "palette": PALETTE,
        "device": "cpu",
    }
    return Detector(_Brightest(), **(settings | options))


def picture() -> np.ndarray:
    """80 px wide and 60 high: a red block, and a green one scored higher."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[10:30, 4:24, 0] = 204
    pixels[40:60, 40:80, 1] = 255
    return pixels


def model() -> torch.nn.Module:
    backbone = DeiTConfig(image_size=32, patch_size=16, d_model=32, depth=1, num_heads=1)
    config = DetectorConfig(
        backbone=backbone,
        num_classes=3,
        head="mask",
        channels=8,
        box_width=16,
        num_proposals=4,
        score_threshold=0.0,
        max_detections=5,
    )
    torch.manual_seed(0)
    return config.build()


def written(path: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {
        "task": "detection",
        "class_names": CLASSES,
        "preprocessing": PLAIN.to_dict(),
    }
    save(model(), path, **(settings | options))
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return written(tmp_path / "model.safetensors")


def test_answers_in_the_pixels_of_the_picture_best_first() -> None:
    found = detector()(picture())
    assert found.classes == ("green", "red")
    assert found.labels.tolist() == [2, 1]
    assert found.scores.tolist() == pytest.approx([1.0, 0.8])
    assert found.boxes.tolist() == [[40, 40, 80, 60], [4, 10, 24, 30]]
    assert found.masks.shape == (2, 60, 80)
    np.testing.assert_array_equal(found.masks[1], picture()[..., 0] > 0)
    np.testing.assert_array_equal(found.mask(0), picture()[..., 1] > 0)
    assert found.counts == {"green": 1, "red": 1}
    assert len(found) == 2


def test_low_scores_are_left_out() -> None:
    assert detector()(picture(), min_score=0.9).classes == ("green",)
    sure = DetectionInference(min_score=0.9)
    assert detector(inference=sure)(picture()).classes == ("green",)
    assert len(detector(inference=sure)(picture(), min_score=0)) == 2
    with pytest.raises(ValueError, match="min_score must lie between 0 and 1, got 7"):
        detector()(picture(), min_score=7)


def test_an_empty_picture_has_no_objects() -> None:
    found = detector()(np.zeros((9, 7), np.uint8))
    assert (len(found), found.classes, found.counts) == (0, (), {})
    assert found.masks.shape == (0, 9, 7)
    assert found.overlay(legend=True).width >= 7
    assert found.to_dict()["objects"] == []


def test_answer_is_frozen() -> None:
    found = detector()(picture())
    with pytest.raises(FrozenInstanceError):
        found.classes = ()  # type: ignore[misc]
    for values in (found.boxes, found.scores, found.labels, found.run_lengths[0]):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


def test_path_pil_and_array_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    found = detector()([path, str(path), Image.fromarray(picture()), picture()])
    assert all(one.boxes.tolist() == found[0].boxes.tolist() for one in found)
    assert [one.file for one in found] == [str(path), str(path), None, None]


def test_list_gives_a_list_and_one_gives_one() -> None:
    assert isinstance(detector()(picture()), Detections)
    assert isinstance(detector()((picture(),)), list)
    assert detector()([]) == []


def test_windows_find_what_the_whole_shows() -> None:
    slide = DetectionInference(mode="slide", crop_size=40, stride=20, num_windows=2)
    whole, windows = detector()(picture()), detector(inference=slide)(picture())
    assert windows.boxes.tolist() == whole.boxes.tolist()
    np.testing.assert_array_equal(windows.masks, whole.masks)


def test_overlay_colours_masks_and_draws_boxes() -> None:
    found = detector()(picture())
    assert found.overlay().size == (80, 60)
    solid = found.overlay(opacity=1)
    assert solid.getpixel((14, 20)) == (200, 0, 0)
    assert solid.getpixel((60, 50)) == (0, 200, 0)
    assert found.overlay(opacity=0).getpixel((14, 20)) == (204, 0, 0)
    assert found.overlay(opacity=0).getpixel((4, 20)) == (200, 0, 0)
    with pytest.raises(ValueError, match="opacity must lie between 0 and 1, got 2"):
        found.overlay(opacity=2)


def test_objects_of_a_single_class_have_colours_of_their_own() -> None:
    names, ids = ("cell",), [7]
    one_class = Detector(
        _TwoCells(), preprocessing=PLAIN, class_names=names, category_ids=ids, device="cpu"
    )
    found = one_class(picture())
    drawn = found.overlay(opacity=1)
    assert drawn.getpixel((4, 4)) != drawn.getpixel((24, 24))
    legend = found.overlay(legend=True).crop((0, 420, 560, 440))
    assert legend.getpixel((10, 10)) == (255, 255, 255)
    assert found.counts == {"cell": 2}


class _TwoCells(torch.nn.Module):
    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        masks = torch.zeros(2, *images[0].shape[1:])
        masks[0, :5, :5] = masks[1, 10:15, 10:15] = 0.9
        return [
            {
                "boxes": torch.tensor([[0.0, 0, 5, 5], [10, 10, 15, 15]]),
                "scores": torch.tensor([0.9, 0.8]),
                "labels": torch.ones(2, dtype=torch.int64),
                "masks": masks[:, None],  # as torchvision's
            }
        ]


def test_legend_names_and_counts_the_classes() -> None:
    shown = detector()(picture()).overlay(legend=True)
    assert shown.width == 80 * 7
    assert shown.height > 60 * 7
    legend = shown.crop((0, 420, shown.width, shown.height))
    assert legend.getpixel((10, 10)) == (0, 200, 0)


def test_plain_values_hold_boxes_and_run_lengths() -> None:
    found = detector(category_ids=[7, 3, 9])(picture())
    told = json.loads(json.dumps(found.to_dict()))
    assert (told["file"], told["height"], told["width"]) == (None, 60, 80)
    assert [(one["name"], one["category_id"]) for one in told["objects"]] == [
        ("green", 3),
        ("red", 7),
    ]
    assert told["objects"][0]["box"] == [40, 40, 80, 60]
    for number, one in enumerate(told["objects"]):
        np.testing.assert_array_equal(decoded(one["mask"]), found.mask(number))


def test_coco_results_have_sides_instead_of_corners() -> None:
    (green, red) = detector(category_ids=[7, 3, 9])(picture()).coco_results(12)
    assert (red["image_id"], red["category_id"], red["bbox"]) == (12, 7, [4, 10, 20, 20])
    assert green["segmentation"]["size"] == [60, 80]


def test_saves_overlay_and_json(tmp_path: Path) -> None:
    path = tmp_path / "street.jpg"
    Image.fromarray(picture()).save(path, quality=100)
    found = detector()(path)
    saved = found.save(tmp_path / "out")
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "street.json",
        "street_overlay.png",
    ]
    assert json.loads(saved.read_text()) == found.to_dict()
    with Image.open(tmp_path / "out" / "street_overlay.png") as overlay:
        assert overlay.size == found.overlay(legend=True).size
    assert detector()(picture()).save(tmp_path).name == "image.json"


@pytest.mark.parametrize("name", ["../street", "a/b", "a\\b", "/etc/passwd"])
def test_names_do_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a name of files must be plain"):
        detector()(picture()).save(tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (75, 130, 3)])
def test_weights_take_pictures_of_any_size(
    weights: Path, shape: tuple[int, ...], mode: Any
) -> None:
    inference = DetectionInference(mode=mode, crop_size=80, stride=50, min_score=0.0)
    loaded = Detector.load(weights, device="cpu", inference=inference)
    found = loaded(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    assert found.masks.shape == (len(found), *shape[:2])
    assert (found.boxes[:, 2:] <= (shape[1], shape[0])).all()
    assert (np.diff(found.scores) <= 0).all()


def test_settings_come_with_the_weights(tmp_path: Path) -> None:
    inference = DetectionInference(mode="slide", crop_size=64, stride=32, min_score=0.25)
    details = {"inference": inference.to_dict(), "category_ids": [7, 3, 9], "palette": PALETTE}
    loaded = Detector.load(written(tmp_path / "w.safetensors", details=details), device="cpu")
    assert loaded.inference == inference
    assert loaded.category_ids == (7, 3, 9)
    assert loaded.palette == tuple(PALETTE)
    assert loaded.preprocessing.size == (40, 40)


def test_weights_need_not_say_more_than_classes_and_preparation(weights: Path) -> None:
    loaded = Detector.load(weights, device="cpu")
    assert loaded.inference == DetectionInference()
    assert loaded.category_ids == (1, 2, 3)
    assert len(set(loaded.palette)) == 3


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"inference": {"crop_size": "wide"}}, "has damaged inference settings"),
        ({"inference": {"flip": True}}, "has damaged inference settings"),
        ({"palette": [[0, 0]] * 3}, "has damaged colours"),
        ({"category_ids": [1, 1, 2]}, "has a damaged header .category_ids must be 3 different"),
        ({"category_ids": [1, 2]}, "has a damaged header"),
        ({"category_ids": "all"}, "has a damaged header"),
    ],
)
def test_damaged_header_is_named(tmp_path: Path, details: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "w.safetensors", details=details)
    with pytest.raises(ValueError, match=rf"w\.safetensors {message}"):
        Detector.load(path, device="cpu")


@pytest.mark.parametrize(
    "damage",
    [
        {"image_size": 5},
        {"image_size": [5.5, 5]},
        {"mean": 3},
        {"mean": [float("nan")] * 3},
        {"std": [0.0, 1.0, 1.0]},
        {"interpolation": []},
    ],
)
def test_damaged_preprocessing_is_named(weights: Path, damage: dict[str, object]) -> None:
    preprocessing = {**PLAIN.to_dict(), **damage}
    save(load(weights), weights, preprocessing=preprocessing)
    with pytest.raises(ValueError, match=r"model\.safetensors has a damaged header \("):
        Detector.load(weights, device="cpu")


def test_other_number_of_names_than_classes_is_refused(weights: Path) -> None:
    header = json.loads(read_metadata(weights)[METADATA_KEY])
    metadata = {METADATA_KEY: json.dumps({**header, "class_names": CLASSES[:2]})}
    save_file(load_file(weights), weights, metadata)
    with pytest.raises(ValueError, match=r"names 2 classes, and its model has 3"):
        Detector.load(weights, device="cpu")


def test_weights_of_other_tasks_are_refused(weights: Path, tmp_path: Path) -> None:
    backbone = DeiTConfig(image_size=32, patch_size=16, d_model=32, depth=2, num_heads=1)
    segmenter, classifier = tmp_path / "segmenter.safetensors", tmp_path / "c.safetensors"
    save(SegmenterConfig(backbone=backbone, num_classes=3, head="segmenter").build(), segmenter)
    save(backbone.build(), classifier, preprocessing=Preprocessing(image_size=32).to_dict())
    for path, task in ((segmenter, "segmentation"), (classifier, "classification")):
        with pytest.raises(ValueError, match=f"was trained for {task}, wanted detection"):
            Detector.load(path)
    with pytest.raises(ValueError, match="was trained for detection, wanted segmentation; use the"):
        Segmenter.load(weights)
    with pytest.raises(ValueError, match="was trained for detection, wanted classification; use"):
        Classifier.load(weights)


def test_authors_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vim.pth"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"wanted detection; train a detector that starts from"):
        Detector.load(path)


def test_weights_without_preparation_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "w.safetensors", preprocessing={})
    with pytest.raises(ValueError, match="does not say how pictures are prepared"):
        Detector.load(path)


def test_unreadable_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "note.jpg"
    path.write_text("buy milk")
    with pytest.raises(UnreadableImageError, match=r"note\.jpg is not an image"):
        detector()(path)
    with pytest.raises(FileNotFoundError, match=r"there is no image .*absent\.jpg"):
        detector()(tmp_path / "absent.jpg")


@pytest.mark.parametrize(
    ("inference", "message"),
    [
        (DetectionInference(), "a batch of 1 image does not fit"),
        (DetectionInference(mode="slide", num_windows=4), "lower num_windows, for example to 2"),
    ],
)
def test_running_out_of_memory_names_the_remedy(
    inference: DetectionInference, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: list[Tensor]) -> list[dict[str, Tensor]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    short = detector(inference=inference)
    monkeypatch.setattr(short.model, "forward", full)
    with pytest.raises(BatchTooLargeError, match=message):
        short(picture())


def test_wrong_numbers_of_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be 3 different whole numbers.*got \[1, 2\]"):
        detector(category_ids=[1, 2])


@pytest.mark.gpu
@pytest.mark.usefixtures("usual_algorithms")
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_gpu_agrees_with_the_cpu(weights: Path, mode: Any) -> None:
    inference = DetectionInference(mode=mode, crop_size=80, stride=50, min_score=0.0)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    found = [
        Detector.load(weights, device=device, inference=inference)(pixels)
        for device in ("cpu", "cuda")
    ]
    assert len(found[0]) == len(found[1])
    np.testing.assert_allclose(found[0].scores, found[1].scores, atol=1e-3)
