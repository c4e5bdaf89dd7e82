"""The task that trains a classifier, and the predictor that uses one."""

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visionmamba
from visionmamba.data import Batch, BatchTooLargeError, Digits, Preprocessing, UnreadableImageError
from visionmamba.models import VimConfig, save
from visionmamba.tasks import Classification, ClassificationTask, Classifier, evaluate

CLASSES = ("cat", "dog", "eel", "fox", "gnu", "hen")
PREPROCESSING = Preprocessing(image_size=16)


def model(num_classes: int = len(CLASSES)) -> torch.nn.Module:
    torch.manual_seed(0)
    return VimConfig(
        image_size=16, patch_size=8, d_model=16, depth=1, num_classes=num_classes
    ).build()


def picture(seed: int = 0, side: int = 20) -> np.ndarray:
    pixels: np.ndarray = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return pixels


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(model(), path, class_names=CLASSES, preprocessing=PREPROCESSING.to_dict())
    return path


@pytest.fixture
def classifier(weights: Path) -> Classifier:
    return Classifier.load(weights, device="cpu")


class _Fixed(torch.nn.Module):
    """Gives the logits it was made with, whatever the picture."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(images)]


def fixed_task(logits: list[list[float]], label_smoothing: float = 0.0) -> ClassificationTask:
    return ClassificationTask(
        _Fixed(logits),
        class_names=CLASSES,
        preprocessing=PREPROCESSING,
        label_smoothing=label_smoothing,
    )


def batch(labels: list[int]) -> Batch:
    count = len(labels)
    return Batch(torch.zeros(count, 3, 16, 16), torch.tensor(labels), torch.arange(count))


def test_loss_is_the_cross_entropy() -> None:
    loss = fixed_task([[0.0] * 6, [math.log(5)] + [0.0] * 5]).training_loss(batch([3, 0]))
    assert loss.item() == pytest.approx((math.log(6) + math.log(2)) / 2)


def test_label_smoothing_spreads_the_target() -> None:
    loss = fixed_task([[math.log(5)] + [0.0] * 5], label_smoothing=0.6).training_loss(batch([0]))
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(10))


def test_label_smoothing_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing must be at least 0 and below 1, got 1"):
        fixed_task([], label_smoothing=1.0)


def test_metrics_count_every_picture_of_unequal_batches() -> None:
    ranked = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    task = fixed_task([ranked] * 3)
    validation = task.begin_validation()
    validation.update(batch([0, 1, 5]))
    validation.update(batch([0]))
    metrics = validation.metrics()
    assert metrics["val_accuracy"] == 0.5
    assert metrics["val_top5_accuracy"] == 0.75
    assert tuple(metrics) == task.metric_names
    assert validation.class_metrics() is None


def test_saved_task_is_a_classifier(tmp_path: Path) -> None:
    task = ClassificationTask(model(), class_names=CLASSES, preprocessing=PREPROCESSING)
    task.save_weights(tmp_path / "w.safetensors")
    loaded = Classifier.load(tmp_path / "w.safetensors")
    assert loaded.class_names == CLASSES
    assert loaded.preprocessing.to_dict() == PREPROCESSING.to_dict()


def test_probabilities_are_the_softmax_of_the_models_logits(classifier: Classifier) -> None:
    result = classifier(picture(), top_k=6)
    with torch.inference_mode():
        prepared = PREPROCESSING.build()(Image.fromarray(picture()))
        expected = classifier.model(prepared[None]).softmax(-1)[0]
    assert sum(result.probabilities) == pytest.approx(1, abs=1e-5)
    for label, probability in zip(result.labels, result.probabilities, strict=True):
        assert probability == pytest.approx(expected[CLASSES.index(label)].item(), abs=1e-6)


def test_classes_come_most_probable_first(classifier: Classifier) -> None:
    result = classifier(picture(), top_k=3)
    assert len(result.labels) == 3
    assert list(result.probabilities) == sorted(result.probabilities, reverse=True)
    assert (result.label, result.probability) == (result.labels[0], result.probabilities[0])


def test_path_pil_and_array_give_the_same(classifier: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    results = classifier([path, str(path), Image.fromarray(picture()), picture()])
    assert len({result.probabilities for result in results}) == 1
    assert [result.file for result in results] == [str(path), str(path), None, None]


def test_list_gives_a_list_and_one_gives_one(classifier: Classifier) -> None:
    assert isinstance(classifier([picture()]), list)
    assert isinstance(classifier(picture()), Classification)
    assert classifier([]) == []


def test_batch_size_changes_nothing(classifier: Classifier) -> None:
    pictures = [picture(seed) for seed in range(5)]
    one_by_one = classifier(pictures, batch_size=1)
    for together, alone in zip(classifier(pictures, batch_size=3), one_by_one, strict=True):
        assert together.labels == alone.labels
        assert together.probabilities == pytest.approx(alone.probabilities, abs=1e-6)


def test_gray_and_transparent_arrays_are_taken(classifier: Classifier) -> None:
    gray = picture()[:, :, 0]
    transparent = np.dstack([picture(), np.full((20, 20), 255, np.uint8)])
    results = classifier([gray, gray[:, :, None], transparent, picture()])
    assert results[0] == results[1]
    assert results[2] == results[3]


def test_sixteen_bit_pil_picture_is_scaled(classifier: Classifier) -> None:
    gray = picture()[:, :, 0]
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    assert classifier(deep) == classifier(Image.fromarray(gray))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((3, 8), np.float32), "must be uint8 with values 0 to 255, got float32; scale"),
        (
            np.zeros((2, 8, 8, 3), np.uint8),
            r"must be \(H, W\), .* got \(2, 8, 8, 3\); give several",
        ),
        (np.zeros((8, 8, 2), np.uint8), r"got \(8, 8, 2\)"),
        (np.zeros((0, 8), np.uint8), r"got \(0, 8\)"),
    ],
)
def test_wrong_array_is_refused(classifier: Classifier, wrong: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(wrong)


def test_other_kinds_are_refused(classifier: Classifier) -> None:
    with pytest.raises(ValueError, match="must be a path, a PIL image or a uint8 array, got int"):
        classifier([3])  # type: ignore[list-item]


def test_text_file_named_jpg_is_refused(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "note.jpg").write_text("buy milk")
    with pytest.raises(UnreadableImageError, match=r"note\.jpg is not an image"):
        classifier(tmp_path / "note.jpg")


@pytest.mark.parametrize("name", ["top_k", "batch_size"])
def test_counts_below_one_are_refused(classifier: Classifier, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        classifier(picture(), **{name: 0})


def test_absent_device_is_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match="device"):
        Classifier.load(weights, device="cuda:99")


def test_batch_that_does_not_fit_is_explained(classifier: Classifier) -> None:
    classifier.model.register_forward_pre_hook(lambda *_: torch.empty(1 << 60) and None)
    with pytest.raises(BatchTooLargeError, match="a batch of 2 images does not fit"):
        classifier([picture(), picture()])


def test_weights_of_another_task_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save(model(), path, task="segmentation", preprocessing=PREPROCESSING.to_dict())
    with pytest.raises(ValueError, match="was trained for segmentation, wanted classification"):
        Classifier.load(path)


def test_weights_without_preparation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save(model(), path)
    with pytest.raises(ValueError, match="does not say how pictures are prepared"):
        Classifier.load(path)


def test_damaged_header_is_named(tmp_path: Path) -> None:
    path, preprocessing = tmp_path / "w.safetensors", PREPROCESSING.to_dict()
    save(model(), path, preprocessing={**preprocessing, "mean": 3})
    with pytest.raises(ValueError, match=r"w\.safetensors has a damaged header \("):
        Classifier.load(path)


def test_result_is_frozen_plain_and_public(classifier: Classifier) -> None:
    result = classifier(picture(), top_k=2)
    with pytest.raises(FrozenInstanceError):
        result.labels = ()  # type: ignore[misc]
    assert json.loads(json.dumps(result.to_dict())) == {
        "file": None,
        "labels": list(result.labels),
        "probabilities": list(result.probabilities),
    }
    assert isinstance(result, visionmamba.Classification)
    assert isinstance(classifier, visionmamba.Classifier)


def test_result_saves_json_and_picture(classifier: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    result = classifier(path)
    written = result.save(tmp_path / "out")
    assert written == tmp_path / "out" / "picture.json"
    assert json.loads(written.read_text()) == result.to_dict()
    with Image.open(tmp_path / "out" / "picture.png") as image:
        assert image.width >= 240
        assert image.height > 240
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["picture.json", "picture.png"]


def test_kept_picture_is_small(classifier: Classifier) -> None:
    assert max(classifier(picture(side=900)).picture.size) == 512


def digits_weights(tmp_path: Path, class_names: tuple[str, ...] = tuple("0123456789")) -> Path:
    path = tmp_path / "digits.safetensors"
    preprocessing = Preprocessing(image_size=16, crop_fraction=1)
    save(model(10), path, class_names=class_names, preprocessing=preprocessing.to_dict())
    return path


def test_evaluation_agrees_with_the_predictions(tmp_path: Path) -> None:
    path = digits_weights(tmp_path)
    evaluation = evaluate(path, "digits", device="cpu", batch_size=100)
    val = Digits().build().val
    predicted = Classifier.load(path)([val.image(index) for index in range(len(val))])
    right = [val.class_names[y] == p.label for y, p in zip(val.labels, predicted, strict=True)]
    assert evaluation.accuracy == pytest.approx(sum(right) / 360)
    assert evaluation.num_images == 360
    assert list(evaluation.per_class) == list("0123456789")
    shares = [evaluation.per_class[val.class_names[label]] for label in val.labels]
    assert sum(shares) / 360 == pytest.approx(evaluation.accuracy)
    assert evaluation.accuracy <= evaluation.top5_accuracy <= 1


def test_evaluation_on_other_classes_is_refused(tmp_path: Path) -> None:
    path = digits_weights(tmp_path, tuple("abcdefghij"))
    with pytest.raises(ValueError, match=r"knows 10 classes and digits has 10, .*example 0\)"):
        evaluate(path, "digits")
