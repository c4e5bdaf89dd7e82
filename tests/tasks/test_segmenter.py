"""The predictor of masks: what it takes, what it answers, what it writes."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tasks.test_run_lengths import decoded
from visionmamba.data import (
    BatchTooLargeError,
    Preprocessing,
    SegmentationPreprocessing,
    UnreadableImageError,
)
from visionmamba.models import DeiTConfig, SegmenterConfig, VimConfig, load, save
from visionmamba.models.weights import METADATA_KEY, read_metadata
from visionmamba.tasks import Classifier, Inference, Segmentation, Segmenter
from visionmamba.tasks.segmentation import TASK_NAME

pytestmark = pytest.mark.once

CLASSES = ("red", "green", "blue")
PALETTE = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
PLAIN = SegmentationPreprocessing(crop_size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class _Brightest(torch.nn.Module):
    """The class of a pixel is its brightest channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(
        _Brightest(), preprocessing=PLAIN, class_names=CLASSES, palette=PALETTE, device="cpu"
    )


def picture() -> np.ndarray:
    """40 px wide and 30 high: red at the left, green at the right, a blue block in the corner."""
    pixels = np.full((30, 40, 3), 20, np.uint8)
    pixels[:, :10, 0] = 250
    pixels[:, 10:, 1] = 250
    pixels[:6, :5] = (0, 0, 250)
    return pixels


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    backbone = DeiTConfig(image_size=32, patch_size=16, d_model=32, depth=2, num_heads=1)
    model = SegmenterConfig(backbone=backbone, num_classes=3, head="segmenter").build()
    save(model, path, task=TASK_NAME, class_names=CLASSES, preprocessing=PLAIN.to_dict())
    return path


def test_answers_with_classes_and_shares_largest_first(segmenter: Segmenter) -> None:
    found = segmenter(picture())
    assert found.classes == ("green", "red", "blue")
    assert found.shares == (0.75, 270 / 1200, 30 / 1200)
    assert [found.labels[place] for place in ((0, 0), (29, 0), (0, 39))] == [2, 0, 1]
    assert found.indices == (1, 0, 2)
    np.testing.assert_array_equal(found.mask("blue"), found.labels == 2)
    with pytest.raises(ValueError, match="there is no class 'pink'; classes: red, green, blue"):
        found.mask("pink")


def test_classes_that_do_not_occur_are_left_out(segmenter: Segmenter) -> None:
    found = segmenter(np.full((8, 8, 3), (9, 0, 0), np.uint8))
    assert (found.classes, found.shares) == (("red",), (1.0,))
    assert found.class_names == CLASSES


def test_answer_is_frozen(segmenter: Segmenter) -> None:
    found = segmenter(picture())
    with pytest.raises(FrozenInstanceError):
        found.classes = ()  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        found.labels[0, 0] = 1


def test_path_pil_and_array_give_the_same(segmenter: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    found = segmenter([path, str(path), Image.fromarray(picture()), picture()])
    for one in found:
        np.testing.assert_array_equal(one.labels, found[0].labels)
    assert [one.file for one in found] == [str(path), str(path), None, None]


def test_list_gives_a_list_and_one_gives_one(segmenter: Segmenter) -> None:
    assert isinstance(segmenter(picture()), Segmentation)
    assert isinstance(segmenter((picture(),)), list)
    assert segmenter([]) == []


def test_labels_have_the_pictures_own_size() -> None:
    small = SegmentationPreprocessing(crop_size=32, short_side=16, mean=PLAIN.mean, std=PLAIN.std)
    segmenter = Segmenter(_Brightest(), preprocessing=small, class_names=CLASSES, device="cpu")
    found = segmenter([picture(), picture()[:, :7]])
    assert [one.labels.shape for one in found] == [(30, 40), (30, 7)]
    assert found[0].shares[0] == pytest.approx(0.75, abs=0.05)


def test_windows_see_what_the_whole_sees(weights: Path) -> None:
    covering = Inference(mode="slide", crop_size=64, stride=40)
    whole = Segmenter.load(weights, device="cpu")(picture())
    windows = Segmenter.load(weights, device="cpu", inference=covering)(picture())
    np.testing.assert_array_equal(whole.labels, windows.labels)


def test_overlay_mixes_picture_and_colours(segmenter: Segmenter) -> None:
    found = segmenter(picture())
    assert found.overlay().size == (40, 30)
    assert found.overlay(opacity=1).getpixel((0, 0)) == (0, 0, 200)
    assert found.overlay(opacity=0).getpixel((0, 0)) == (0, 0, 250)
    assert found.overlay(opacity=0.5).getpixel((0, 0)) == (0, 0, 225)
    with pytest.raises(ValueError, match="opacity must lie between 0 and 1, got 2"):
        found.overlay(opacity=2)


def test_legend_stands_below(segmenter: Segmenter) -> None:
    shown = segmenter(picture()).overlay(legend=True, opacity=1)
    assert shown.width == 240
    assert shown.height > 180
    assert shown.crop((0, 180, 240, shown.height)).getpixel((10, 10)) == (0, 200, 0)


def test_masks_in_the_answer_are_those_of_the_labels(segmenter: Segmenter) -> None:
    found = segmenter(picture())
    told = json.loads(json.dumps(found.to_dict()))
    assert (told["file"], told["height"], told["width"]) == (None, 30, 40)
    assert [one["name"] for one in told["classes"]] == ["green", "red", "blue"]
    for one in told["classes"]:
        np.testing.assert_array_equal(decoded(one["mask"]), found.labels == one["index"])


def test_saves_mask_overlay_and_json(segmenter: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "street.jpg"
    Image.fromarray(picture()).save(path)
    found = segmenter(path)
    written = found.save(tmp_path / "out")
    names = ["street.json", "street_mask.png", "street_overlay.png"]
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == names
    assert json.loads(written.read_text()) == found.to_dict()
    with Image.open(tmp_path / "out" / "street_mask.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), found.labels)
        assert mask.convert("RGB").getpixel((39, 0)) == (0, 200, 0)
    with Image.open(tmp_path / "out" / "street_overlay.png") as overlay:
        assert overlay.size == found.overlay(legend=True).size


@pytest.mark.parametrize("name", ["../street", "a/b", "a\\b", "/etc/passwd"])
def test_names_do_not_leave_the_folder(segmenter: Segmenter, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a name of files must be plain"):
        segmenter(picture()).save(tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


def test_picture_in_memory_is_called_image(segmenter: Segmenter, tmp_path: Path) -> None:
    assert segmenter(picture()).save(tmp_path).name == "image.json"


def test_colours_are_made_where_the_weights_have_none(weights: Path) -> None:
    palette = Segmenter.load(weights, device="cpu").palette
    assert len(set(palette)) == 3


def test_colours_of_many_classes_differ() -> None:
    names = tuple(map(str, range(150)))
    many = Segmenter(_Brightest(), preprocessing=PLAIN, class_names=names, device="cpu")
    assert len(set(many.palette)) == 150


def test_unreadable_picture_is_named(segmenter: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "note.jpg"
    path.write_text("buy milk")
    with pytest.raises(UnreadableImageError, match=r"note\.jpg is not an image"):
        segmenter(path)
    with pytest.raises(FileNotFoundError, match=r"there is no image .*absent\.jpg"):
        segmenter(tmp_path / "absent.jpg")


def test_picture_too_large_for_memory_points_to_windows(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(segmenter.model, "forward", full)
    with pytest.raises(BatchTooLargeError, match=r"picture of 30x40 .* --mode slide"):
        segmenter(picture())


def test_weights_of_a_classifier_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    config = VimConfig(image_size=16, patch_size=8, d_model=16, depth=1, num_classes=3)
    save(config.build(), path, preprocessing=Preprocessing(image_size=16).to_dict())
    with pytest.raises(ValueError, match="was trained for classification, wanted segmentation"):
        Segmenter.load(path)


def test_authors_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vim.pth"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="the authors' weights for classification, wanted seg"):
        Segmenter.load(path)


def test_a_classifier_refuses_segmenters(weights: Path) -> None:
    with pytest.raises(ValueError, match="was trained for segmentation, wanted classification"):
        Classifier.load(weights)


def test_weights_without_preparation_are_refused(tmp_path: Path) -> None:
    backbone = DeiTConfig(image_size=32, patch_size=16, d_model=32, depth=2, num_heads=1)
    model = SegmenterConfig(backbone=backbone, num_classes=3, head="segmenter").build()
    save(model, tmp_path / "w.safetensors", task=TASK_NAME)
    with pytest.raises(ValueError, match="does not say how pictures are prepared"):
        Segmenter.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"inference": {"crop_size": "wide"}}, "has damaged inference settings"),
        ({"inference": [1]}, "has damaged inference settings"),
        ({"palette": [[0, 0]] * 3}, "has damaged colours"),
        ({"palette": 7}, "has damaged colours"),
    ],
)
def test_damaged_header_is_named(tmp_path: Path, details: dict, message: str) -> None:
    backbone = DeiTConfig(image_size=32, patch_size=16, d_model=32, depth=2, num_heads=1)
    model = SegmenterConfig(backbone=backbone, num_classes=3, head="segmenter").build()
    path = tmp_path / "w.safetensors"
    options = {"class_names": CLASSES, "preprocessing": PLAIN.to_dict(), "details": details}
    save(model, path, task=TASK_NAME, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"w\.safetensors {message}"):
        Segmenter.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"crop_size": 5},
        {"crop_size": [5.5, 5]},
        {"mean": 3},
        {"mean": [float("nan")] * 3},
        {"short_side": [1]},
        {"short_side": float("inf")},
        {"interpolation": []},
    ],
)
def test_damaged_preprocessing_is_named(weights: Path, damage: dict[str, object]) -> None:
    preprocessing = {**PLAIN.to_dict(), **damage}
    save(load(weights), weights, task=TASK_NAME, class_names=CLASSES, preprocessing=preprocessing)
    with pytest.raises(ValueError, match=r"model\.safetensors has a damaged header \("):
        Segmenter.load(weights)


def test_other_number_of_names_than_classes_is_refused(weights: Path) -> None:
    header = json.loads(read_metadata(weights)[METADATA_KEY])
    metadata = {METADATA_KEY: json.dumps({**header, "class_names": CLASSES[:2]})}
    save_file(load_file(weights), weights, metadata)
    with pytest.raises(ValueError, match=r"names 2 classes, and its model has 3"):
        Segmenter.load(weights)


def test_strip_that_would_become_huge_is_unreadable() -> None:
    grown = SegmentationPreprocessing(crop_size=32, short_side=512)
    segmenter = Segmenter(_Brightest(), preprocessing=grown, class_names=CLASSES, device="cpu")
    with pytest.raises(UnreadableImageError, match=r"the picture is too long: .* cut it into"):
        segmenter(Image.new("RGB", (60_000, 1)))


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (33, 2)])
def test_thin_and_tiny_pictures_are_taken(
    weights: Path, shape: tuple[int, int], mode: Literal["whole", "slide"]
) -> None:
    inference = Inference(mode=mode, crop_size=32, stride=21)
    found = Segmenter.load(weights, device="cpu", inference=inference)(np.zeros(shape, np.uint8))
    assert found.labels.shape == shape
    assert found.to_dict()["width"] == shape[1]


@pytest.mark.gpu
def test_gpu_agrees_with_the_cpu(weights: Path) -> None:
    slide = Inference(mode="slide", crop_size=32, stride=21, scales=(1.0, 1.5), flip=True)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    labels = [
        Segmenter.load(weights, device=device, inference=slide)(pixels).labels
        for device in ("cpu", "cuda")
    ]
    assert (labels[0] == labels[1]).mean() > 0.999  # near ties may fall otherwise
