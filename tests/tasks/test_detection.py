"""The task that trains a detector: its loss, its metrics over all pictures, its pictures."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tasks.truthful import CONFIG, MAX_DETECTIONS, Truthful
from visionmamba.data import (
    ArrayObjects,
    DetectionAugmentation,
    DetectionBatch,
    DetectionEvalBatches,
    DetectionPreprocessing,
    DrawnObjects,
)
from visionmamba.models import DetectorConfig, VimConfig
from visionmamba.tasks import DetectionInference, DetectionTask, Detector
from visionmamba.tasks.detection import DetectionValidation

pytestmark = pytest.mark.once

SIDE = 64
PREPROCESSING = DetectionPreprocessing(image_size=SIDE)
PICTURES = DrawnObjects(num_train=2, num_val=7, image_size=SIDE, empty_share=0.15).open("val")


def task(
    *,
    pictures: ArrayObjects = PICTURES,
    preprocessing: DetectionPreprocessing = PREPROCESSING,
    num_missed: int = 0,
    **options: Any,
) -> DetectionTask:
    model: Any = Truthful(pictures, preprocessing, num_missed=num_missed)
    names = pictures.class_names
    return DetectionTask(model, class_names=names, preprocessing=preprocessing, **options).eval()


def batches(
    *,
    pictures: ArrayObjects = PICTURES,
    preprocessing: DetectionPreprocessing = PREPROCESSING,
    **options: Any,
) -> DetectionEvalBatches:
    return DetectionEvalBatches(pictures, preprocessing.build(), **{"batch_size": 4, **options})


def validated(judged: DetectionTask, given: DetectionEvalBatches) -> DetectionValidation:
    validation = judged.begin_validation()
    for batch in given:
        validation.update(batch)
    return validation


def without_objects(pictures: ArrayObjects, *, label: int | None = None) -> ArrayObjects:
    """The pictures without objects of a label, or without any."""
    found = []
    for one in pictures.found:
        kept = [i for i, held in enumerate(one.labels.tolist()) if label not in (None, held)]
        assert one.masks is not None
        found.append(
            replace(
                one,
                boxes=one.boxes[kept],
                labels=one.labels[kept],
                is_crowd=one.is_crowd[kept],
                areas=one.areas[kept],
                masks=tuple(one.masks[i] for i in kept),
            )
        )
    return replace(pictures, found=tuple(found))


@pytest.mark.parametrize("factor", [1, 2])
def test_truth_fed_back_as_detections_scores_one(factor: int) -> None:
    larger = replace(PREPROCESSING, image_size=factor * SIDE)
    judged = task(preprocessing=larger)
    metrics = validated(judged, batches(preprocessing=larger)).metrics()
    assert {"val_box_ap", "val_mask_ap", "val_mask_small", "val_mask_medium"} <= metrics.keys()
    assert set(metrics.values()) == {1.0}


def test_what_is_missed_costs_precision_at_every_threshold() -> None:
    metrics = validated(task(num_missed=1), batches()).metrics()
    assert 0 < metrics["val_box_ap"] < 0.95
    assert metrics["val_box_ap"] == metrics["val_box_ap50"] == metrics["val_mask_ap75"]


def test_sizes_without_objects_are_left_out() -> None:
    metrics = validated(task(), batches()).metrics()
    assert "val_box_large" not in metrics
    assert set(metrics) < set(DetectionTask.metric_names)
    assert DetectionTask.metric_names[:3] == ("val_box_ap", "val_box_ap50", "val_box_ap75")


def test_classes_without_objects_cannot_be_judged() -> None:
    pictures = without_objects(PICTURES, label=2)
    classes = validated(task(pictures=pictures), batches(pictures=pictures)).class_metrics()
    assert classes["square"] == {"box_ap": None, "mask_ap": None}
    assert classes["disc"] == {"box_ap": 1.0, "mask_ap": 1.0}
    assert list(classes) == ["disc", "square", "triangle"]


def test_set_without_any_object_is_refused() -> None:
    pictures = without_objects(PICTURES)
    validation = validated(task(pictures=pictures), batches(pictures=pictures))
    with pytest.raises(ValueError, match="none of the 7 pictures to validate on has an object"):
        validation.metrics()


class _Two:
    """Two processes, of which this is the main one."""

    def __init__(self, other: DetectionValidation) -> None:
        self._other = other

    def sum(self, values: Tensor) -> Tensor:
        raise AssertionError("average precision is no sum")

    def gather_to_main(self, value: Any) -> list[Any]:
        return [value, self._other._metric.records]


def test_processes_together_score_as_one_does() -> None:
    judged = task(num_missed=1)
    first, second = (
        validated(judged, batches(batch_size=3, rank=rank, num_ranks=2)) for rank in (0, 1)
    )
    first.merge(_Two(second))
    alone = validated(judged, batches())
    assert first.metrics() == alone.metrics()
    assert first.class_metrics() == alone.class_metrics()


def test_padding_is_run_and_does_not_count() -> None:
    judged = task()
    validation = validated(judged, batches(batch_size=2, rank=1, num_ranks=3))  # 2 pictures, 3 rows
    assert isinstance(judged.model, Truthful)
    assert judged.model.num_runs == 2
    assert len(validation._metric) == 2
    assert DetectionTask.validates_evenly


def test_loss_is_the_sum_of_the_detectors() -> None:
    (batch, *_) = batches()
    assert task().train().training_loss(batch).item() == 3.0


def test_no_more_detections_count_than_the_model_reports() -> None:
    assert task().begin_validation()._metric.max_detections == MAX_DETECTIONS


def test_drawing_shows_up_to_four_pictures_with_objects_and_detections() -> None:
    (batch, *_) = batches(batch_size=6)
    drawn = task(palette=[(1, 2, 3), (250, 0, 0), (0, 250, 0)]).draw(batch)
    assert drawn is not None
    assert drawn.width > 3 * 380
    assert 4 * 380 < drawn.height < 5 * 400
    truth, found = (drawn.crop((left, 20, left + 384, 1500)) for left in (396, 784))
    for column in (truth, found):
        colours = {colour for _, colour in column.getcolors(1 << 24)}
        assert {(1, 2, 3), (250, 0, 0), (0, 250, 0)} <= colours


def test_drawing_of_padding_runs_the_model_as_any_other() -> None:
    (batch, *_) = batches()
    judged = task()
    assert judged.draw(batch._replace(indices=torch.full((4,), -1))) is None
    assert isinstance(judged.model, Truthful)
    assert judged.model.num_runs == 1


def test_drawing_leaves_the_batch_as_it_is() -> None:
    (batch, *_) = batches()
    before = [image.clone() for image in batch.images]
    task().draw(batch)
    assert all(torch.equal(*pair) for pair in zip(batch.images, before, strict=True))


def test_saved_task_is_a_detector(tmp_path: Path) -> None:
    backbone = VimConfig(image_size=SIDE, d_model=16, depth=1, readout="mean")
    config = DetectorConfig(backbone=backbone, num_classes=3, channels=8, box_width=8)
    inference = DetectionInference(mode="slide", crop_size=48, stride=32, min_score=0.25)
    colours = [(0, 0, 9), (9, 0, 0), (0, 9, 0)]
    saved = DetectionTask(
        config.build(),
        class_names=PICTURES.class_names,
        preprocessing=PREPROCESSING,
        category_ids=(18, 3, 44),
        inference=inference,
        palette=colours,
    )
    saved.save_weights(tmp_path / "w.safetensors")
    loaded = Detector.load(tmp_path / "w.safetensors", device="cpu")
    assert loaded.class_names == PICTURES.class_names
    assert loaded.category_ids == (18, 3, 44)
    assert loaded.inference == inference
    assert loaded.palette == tuple(colours)
    assert loaded.preprocessing.to_dict() == PREPROCESSING.to_dict()


def test_wrong_number_of_category_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="category_ids must number the 3 classes, got 2"):
        task(category_ids=(1, 2))


def test_missing_evaluator_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'visionmamba\[detection\]'"):
        task()


@pytest.mark.gpu
@pytest.mark.usefixtures("usual_algorithms")
def test_detector_trains_in_bfloat16() -> None:
    model = CONFIG.build().cuda().train()
    learning = DetectionTask(model, class_names=PICTURES.class_names, preprocessing=PREPROCESSING)
    objects = [PICTURES.objects(index) for index in range(2)]
    transform = PREPROCESSING.build(DetectionAugmentation(min_scale=1.0, max_scale=1.0))
    pairs = [transform(PICTURES.image(i), one) for i, one in enumerate(objects)]
    batch = DetectionBatch(
        [image.cuda() for image, _ in pairs],
        [_on_gpu(target) for _, target in pairs],
        torch.arange(2),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(45):
        with torch.autocast("cuda", torch.bfloat16):
            loss = learning.training_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert loss.dtype == torch.float32
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def _on_gpu(target: Any) -> Any:
    return {
        name: value.cuda() if isinstance(value, Tensor) else value for name, value in target.items()
    }
