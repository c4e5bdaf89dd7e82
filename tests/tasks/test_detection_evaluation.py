"""Judging a detector's weights on a set: the numbers of training's validation, and its files."""

import contextlib
import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.tasks.truthful import CONFIG, MAX_DETECTIONS, Truthful
from visionmamba import save
from visionmamba.data import ArrayObjects, DetectionPreprocessing, DrawnObjects
from visionmamba.models import DetectionModel
from visionmamba.tasks import DetectionEvaluation, DetectionInference, evaluate_detection
from visionmamba.tasks.detection_metrics import COLUMNS, coco_json

pytestmark = pytest.mark.once

SIDE = 64
PREPROCESSING = DetectionPreprocessing(image_size=SIDE)
DATA = DrawnObjects(num_train=2, num_val=7, image_size=SIDE, max_objects=6, empty_share=0.15)
NAMES = ("disc", "square", "triangle")


class _Drawn:
    """The drawn pictures as another set."""

    def __init__(self, **changes: Any) -> None:
        self._pictures = replace(DATA.open("val"), **changes)

    def open(self, split: str) -> ArrayObjects:
        return self._pictures


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights whose model finds all objects but one of each picture."""
    known = Truthful(DATA.open("val"), PREPROCESSING, num_missed=1).eval()
    monkeypatch.setattr(DetectionModel, "forward", lambda _, images: known(images))
    path = tmp_path / "w.safetensors"
    preprocessing = PREPROCESSING.to_dict()
    save(CONFIG.build(), path, class_names=NAMES, preprocessing=preprocessing)
    return path


@pytest.fixture
def judged(weights: Path) -> DetectionEvaluation:
    return evaluate_detection(weights, DATA, device="cpu", batch_size=4)


def test_evaluation_counts_what_was_judged(judged: DetectionEvaluation) -> None:
    num_objects = sum(map(len, DATA.open("val").found))
    assert (judged.num_images, judged.num_objects) == (7, num_objects)
    assert judged.max_detections == MAX_DETECTIONS
    assert judged.boxes.ap is not None
    assert 0 < judged.boxes.ap < 0.95
    assert judged.images_per_second > 0
    assert judged.model_images_per_second > 0


def test_classes_tell_objects_and_detections(judged: DetectionEvaluation) -> None:
    rows = judged.classes()
    assert [row.name for row in rows] == list(NAMES)
    assert sum(row.num_objects for row in rows) == judged.num_objects
    num_pictures_with_objects = sum(len(one) > 0 for one in DATA.open("val").found)
    missed = sum(row.num_objects - row.num_detections for row in rows)
    assert missed == num_pictures_with_objects
    assert np.mean([row.box_ap for row in rows if row.box_ap is not None]) == pytest.approx(
        judged.boxes.ap
    )


def test_files_hold_the_tables(judged: DetectionEvaluation, tmp_path: Path) -> None:
    path = judged.save(tmp_path / "out")
    values = json.loads(path.read_text())
    assert values["boxes"] == judged.boxes.to_dict()
    assert values["masks"]["large"] is None
    with open(tmp_path / "out" / "average_precision.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["of", "boxes", "masks"]
    assert rows[0][1:] == list(COLUMNS)
    assert float(rows[1][1]) == pytest.approx(judged.boxes.ap, abs=1e-6)
    assert rows[2][-1] == ""
    with open(tmp_path / "out" / "per_class.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(NAMES)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_pycocotools_reads_the_detections(judged: DetectionEvaluation, tmp_path: Path) -> None:
    judged.save(tmp_path / "out")
    truth = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = coco_json(judged.records, NAMES, of="objects", masks=True)
        truth.createIndex()
        found = truth.loadRes(str(tmp_path / "out" / "detections.json"))
        evaluator = COCOeval(truth, found, "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    assert judged.masks is not None
    assert evaluator.stats[0] == pytest.approx(judged.masks.ap)


def test_windows_of_the_whole_picture_judge_as_one_pass(
    weights: Path, judged: DetectionEvaluation
) -> None:
    slide = DetectionInference(mode="slide", crop_size=SIDE, stride=SIDE)
    again = evaluate_detection(weights, DATA, device="cpu", inference=slide)
    assert again.inference == slide
    assert (again.boxes, again.masks) == (judged.boxes, judged.masks)


def test_fewer_detections_count_when_asked_for(weights: Path, judged: DetectionEvaluation) -> None:
    one = evaluate_detection(weights, DATA, device="cpu", max_detections=1)
    assert max(len(record.detections) for record in one.records) <= len(NAMES)
    assert len(one.detections()) < len(judged.detections())


def test_set_of_boxes_alone_judges_boxes(weights: Path, judged: DetectionEvaluation) -> None:
    found = tuple(replace(one, masks=None) for one in DATA.open("val").found)
    source: Any = _Drawn(found=found)
    boxes = evaluate_detection(weights, source, device="cpu")
    assert boxes.masks is None
    assert boxes.boxes == judged.boxes
    assert boxes.to_dict()["masks"] is None
    assert "segmentation" not in boxes.detections()[0]
    assert all(row.mask_ap is None for row in boxes.classes())


def test_classes_of_another_set_are_refused(weights: Path) -> None:
    source: Any = _Drawn(class_names=("disc", "square", "star"))
    with pytest.raises(ValueError, match=r"knows 3 classes .* \(for example star\)"):
        evaluate_detection(weights, source, device="cpu")


def test_results_carry_the_sets_own_numbers_of_classes(judged: DetectionEvaluation) -> None:
    numbered = replace(judged, category_ids=(18, 3, 44))
    assert {row["category_id"] for row in numbered.detections()} <= {18, 3, 44}


@pytest.mark.gpu
@pytest.mark.usefixtures("usual_algorithms")
def test_weights_are_judged_on_a_gpu_in_low_precision(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save(CONFIG.build(), path, class_names=NAMES, preprocessing=PREPROCESSING.to_dict())
    judged = evaluate_detection(path, DATA, device="cuda", precision="bfloat16", batch_size=3)
    assert judged.num_images == 7
