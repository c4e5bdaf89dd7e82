"""COCO's average precision: closed forms, and what pycocotools says of the same detections."""

import contextlib
import io
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from visionmamba.data import DetectionEvalBatches, DetectionPreprocessing, DrawnObjects
from visionmamba.data.box_transforms import DetectionTarget
from visionmamba.data.object_masks import encode_mask
from visionmamba.tasks.detection_metrics import COLUMNS, CocoMetric, coco_json
from visionmamba.tasks.detection_sizes import FoundObjects

pytestmark = pytest.mark.once

SIDE = 128
NAMES = ("disc", "square", "triangle")
SAME = 1e-12  # the same sums in another order


def rectangles(boxes: Tensor) -> Tensor:
    """(n, SIDE, SIDE) bool: masks that fill whole-numbered boxes."""
    places = torch.arange(SIDE)
    left, top, right, bottom = (boxes[:, side, None] for side in range(4))
    rows, columns = (places >= top) & (places < bottom), (places >= left) & (places < right)
    return rows[:, :, None] & columns[:, None, :]


def target(boxes: list[list[float]], labels: list[int], **changes: Any) -> DetectionTarget:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = rectangles(corners)
    values: dict[str, Any] = {
        "boxes": corners,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "area": masks.sum(dim=(1, 2)).float(),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "image_id": 0,
        "size": (SIDE, SIDE),
        "run_lengths": tuple(encode_mask(mask.numpy()) for mask in masks),
    }
    return values | changes  # type: ignore[return-value]


def detections(boxes: list[list[float]], labels: list[int], scores: list[float]) -> FoundObjects:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return FoundObjects(
        boxes=corners.double().numpy(),
        scores=np.array(scores, dtype=np.float64),
        labels=np.array(labels, dtype=np.int64),
        masks=tuple(encode_mask(mask.numpy()) for mask in rectangles(corners)),
    )


def itself(truth: DetectionTarget) -> FoundObjects:
    """The objects as detections, crowds aside."""
    every = FoundObjects(
        boxes=truth["boxes"].double().numpy(),
        scores=np.ones(len(truth["labels"])),
        labels=truth["labels"].numpy(),
        masks=truth["run_lengths"],
    )
    return every.take(truth["iscrowd"].numpy() == 0)


def metric(**options: Any) -> CocoMetric:
    return CocoMetric(**({"class_names": NAMES, "with_masks": True} | options))


def noisy(seed: int, *, num_pictures: int = 12) -> tuple[list[DetectionTarget], list[FoundObjects]]:
    """Objects of all sizes, crowds among them, and detections of every quality."""
    generator = np.random.default_rng(seed)
    targets, found = [], []
    for number in range(num_pictures):
        count = int(generator.integers(0, 9))
        sides = generator.integers(4, SIDE, (count, 2))
        corners = (generator.random((count, 2)) * (SIDE - sides)).astype(int)
        boxes = np.concatenate([corners, corners + sides], axis=1)
        labels = generator.integers(1, 4, count)
        is_crowd = generator.random(count) < 0.15
        targets.append(
            target(
                boxes.tolist(),
                labels.tolist(),
                image_id=number,
                iscrowd=torch.from_numpy(is_crowd.astype(np.int64)),
            )
        )
        copies = boxes.repeat(3, axis=0) + generator.integers(-6, 7, (3 * count, 4))
        guesses = np.concatenate([copies, generator.integers(0, SIDE, (3, 4))]).clip(0, SIDE)
        guesses = np.concatenate(
            [guesses.reshape(-1, 2, 2).min(1), guesses.reshape(-1, 2, 2).max(1)], 1
        )
        kinds = np.where(
            generator.random(len(guesses)) < 0.8,
            np.concatenate([labels.repeat(3), [1, 2, 3]]),
            generator.integers(1, 4, len(guesses)),
        )
        scores = generator.random(len(guesses)).round(2)  # with ties
        found.append(detections(guesses.tolist(), kinds.tolist(), scores.tolist()))
    return targets, found


def pycocotools_stats(judged: CocoMetric, *, masks: bool) -> list[float]:
    """AP, AP50, AP75 and those of small, medium and large objects by the original evaluator."""
    sides = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for of in ("objects", "detections"):
            sides[of] = COCO()
            sides[of].dataset = coco_json(judged.records, NAMES, of=of, masks=masks)
            sides[of].createIndex()
        evaluator = COCOeval(sides["objects"], sides["detections"], "segm" if masks else "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats[:6].tolist()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("seed", range(2))
def test_scores_are_those_of_pycocotools(seed: int) -> None:
    judged = metric(max_detections=100)
    judged.update(*noisy(seed))
    scores = judged.scores()
    assert scores.masks is not None
    for masks, precision in ((False, scores.boxes), (True, scores.masks)):
        ours = list(precision.to_dict().values())
        expected = pycocotools_stats(judged, masks=masks)
        assert ours == pytest.approx(expected, abs=SAME)
        assert 0.02 < expected[0] < 0.9


def test_columns_are_those_of_papers() -> None:
    assert COLUMNS == ("ap", "ap50", "ap75", "small", "medium", "large")


@pytest.mark.parametrize("max_detections", [100, 300])
def test_truth_as_detections_scores_one(max_detections: int) -> None:
    drawn = DrawnObjects(num_train=2, num_val=12, image_size=SIDE, empty_share=0.25).open("val")
    batches = DetectionEvalBatches(
        drawn, DetectionPreprocessing(image_size=64).build(), batch_size=4
    )
    judged = metric(max_detections=max_detections)
    for batch in batches:
        judged.update(batch.targets, [itself(one) for one in batch.targets])
    scores = judged.scores()
    assert scores.masks is not None
    for precision in (scores.boxes, scores.masks):
        assert precision.to_dict() == pytest.approx(dict.fromkeys(COLUMNS, 1.0))
        assert precision.classes == pytest.approx((1.0, 1.0, 1.0))


def test_all_of_many_objects_count_when_asked() -> None:
    places = [[x, y, x + 8, y + 8] for x in range(0, SIDE, 8) for y in range(0, SIDE, 8)]
    truth = target(places, [1] * 256)
    found = {}
    for max_detections in (100, 300):
        judged = metric(class_names=("cell",), max_detections=max_detections)
        judged.update([truth], [itself(truth)])
        found[max_detections] = judged.scores().boxes
    assert found[300].ap == found[300].small == 1
    assert found[100].ap == pytest.approx(40 / 101)  # of 101 recalls those up to 100 / 256


def test_half_of_the_objects_found_is_half_of_the_recalls() -> None:
    judged = metric(class_names=("cell",))
    truth = target([[0, 0, 20, 20], [40, 40, 60, 60]], [1, 1])
    judged.update([truth], [detections([[0, 0, 20, 20]], [1], [0.9])])
    assert judged.scores().boxes.ap == pytest.approx(51 / 101)


def test_overlap_decides_at_which_thresholds_a_box_counts() -> None:
    judged = metric(class_names=("cell",), with_masks=False)
    truth = target([[0, 0, 20, 20]], [1])
    judged.update([truth], [detections([[0, 0, 20, 12.5]], [1], [0.9])])  # an IoU of 0.625
    scores = judged.scores()
    assert scores.boxes.ap50 == pytest.approx(1)
    assert scores.boxes.ap75 == 0
    assert scores.boxes.ap == pytest.approx(0.3)


def test_sizes_without_objects_have_no_score() -> None:
    judged = metric()
    truth = target([[0, 0, 20, 20]], [2])
    judged.update([truth], [itself(truth)])
    boxes = judged.scores().boxes
    assert (boxes.small, boxes.medium, boxes.large) == (1, None, None)
    assert boxes.classes == (None, 1, None)


def test_nothing_found_scores_nought() -> None:
    judged = metric()
    judged.update([target([[0, 0, 20, 20]], [2])], [detections([], [], [])])
    scores = judged.scores()
    assert scores.masks is not None
    assert scores.boxes.ap == scores.masks.ap == 0


def test_pictures_without_any_object_have_no_score() -> None:
    judged = metric()
    judged.update([target([], [])], [detections([], [], [])])
    assert judged.scores().boxes.ap is None


def test_detections_in_crowds_do_not_count() -> None:
    boxes = [[0, 0, 20, 20], [40, 40, 120, 120]]
    truth = target(boxes, [1, 1], iscrowd=torch.tensor([0, 1]))
    judged = metric(class_names=("cell",))
    found = detections([*boxes, [50, 50, 70, 70]], [1, 1, 1], [0.5, 0.9, 0.8])
    judged.update([truth], [found])
    assert judged.scores().boxes.ap == pytest.approx(1)


def test_boxes_alone_are_judged_when_there_are_no_masks() -> None:
    truth = target([[0, 0, 20, 20]], [1])
    found = itself(truth)._replace(masks=())
    del truth["run_lengths"]
    judged = metric(with_masks=False)
    judged.update([truth], [found])
    assert judged.scores().masks is None and judged.scores().boxes.ap == 1


def test_parts_of_several_processes_score_as_the_whole() -> None:
    targets, found = noisy(0)
    whole, first, second = metric(), metric(), metric()
    whole.update(targets, found)
    second.update(targets[1::2], found[1::2])
    first.update(targets[::2], found[::2])
    first.add(pickle.loads(pickle.dumps(second.records)))
    assert first.scores() == whole.scores() and len(first) == len(whole)


def test_pictures_are_judged_once() -> None:
    truth = target([[0, 0, 20, 20]], [1])
    judged = metric()
    judged.update([truth], [itself(truth)])
    with pytest.raises(ValueError, match="image 0 was judged before"):
        judged.update([truth], [itself(truth)])


def test_no_pictures_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="no pictures to score"):
        metric().scores()


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    judged = metric()
    judged.update([target([], [])], [detections([], [], [])])
    with pytest.raises(ImportError, match=r"visionmamba\[detection\]"):
        judged.scores()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": np.array([4])}, "between 1 and 3, got 1 to 4"),
        ({"labels": np.array([0])}, "between 1 and 3"),
        ({"scores": np.array([float("nan")])}, "not finite"),
        ({"boxes": np.zeros((2, 4))}, r"boxes \(n, 4\)"),
        ({"masks": (np.array([25]),)}, "masks of image 0 must have 128x128 pixels, got 25"),
        ({"masks": ()}, "detections of image 0 have no masks to judge"),
    ],
)
def test_detections_that_cannot_be_judged_are_refused(changes: dict[str, Any], reason: str) -> None:
    truth = target([[0, 0, 20, 20]], [1])
    with pytest.raises(ValueError, match=reason):
        metric().update([truth], [itself(truth)._replace(**changes)])
