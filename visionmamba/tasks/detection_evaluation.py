"""How well a detector does on pictures with objects: COCO's average precision, and speed."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track

from visionmamba.data import (
    MAX_PIXELS,
    DetectionBatch,
    DetectionEvalBatches,
    DetectionSet,
    DetectionSource,
    explain_out_of_memory,
    open_objects,
)
from visionmamba.data.sets import OnUnreadable
from visionmamba.models import DetectionModel
from visionmamba.tasks.detection import detect_objects, held_rows
from visionmamba.tasks.detection_metrics import (
    COLUMNS,
    AveragePrecision,
    CocoMetric,
    PictureRecord,
    require_evaluator,
)
from visionmamba.tasks.detection_sizes import FoundObjects
from visionmamba.tasks.detector import Detector
from visionmamba.tasks.evaluation import TimedModel, class_difference
from visionmamba.tasks.files import csv_text, replace_file
from visionmamba.tasks.tiles import DetectionInference, find_objects

DetectionSplit = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class DetectionClassResult:
    """What became of the objects of one class."""

    name: str
    """Name of the class."""
    num_objects: int
    """Objects of it, crowds aside."""
    num_detections: int
    """Detections that count, of any score."""
    box_ap: float | None
    """Average precision of its boxes; None when it has no objects."""
    mask_ap: float | None
    """Average precision of its masks; None when it has no objects, or the set no masks."""


@dataclass(frozen=True, kw_only=True)
class DetectionEvaluation:
    """How well a detector does on a set of pictures with objects."""

    boxes: AveragePrecision
    """Of boxes."""
    masks: AveragePrecision | None
    """Of masks; None where the set has boxes only."""
    max_detections: int
    """Detections of a picture and class that count, best first."""
    num_images: int
    """Pictures judged."""
    num_objects: int
    """Objects to be found in them, crowds aside."""
    inference: DetectionInference
    """Whole pictures or windows."""
    images_per_second: float
    """Pictures per second, reading, preparing and comparing included."""
    model_images_per_second: float
    """Pictures per second of the model alone, with all windows of a picture; the first batch (where
    kernels are built) left out."""
    class_names: tuple[str, ...] = field(repr=False)
    """Names of the classes; label k is the k-th, counted from 1."""
    category_ids: tuple[int, ...] = field(repr=False)
    """Numbers of the classes in the set's annotation file."""
    records: tuple[PictureRecord, ...] = field(repr=False)
    """Objects and detections of each picture."""
    unreadable: tuple[str, ...]
    """Files and objects that were left out, with the reasons."""

    def classes(self) -> list[DetectionClassResult]:
        """Returns one row for each class, in their order."""
        counts = {
            of: _count_labels(self.records, of=of, num_classes=len(self.class_names))
            for of in ("objects", "detections")
        }
        mask_aps = (None,) * len(self.class_names) if self.masks is None else self.masks.classes
        return [
            DetectionClassResult(
                name=name,
                num_objects=counts["objects"][index],
                num_detections=counts["detections"][index],
                box_ap=box_ap,
                mask_ap=mask_ap,
            )
            for index, (name, box_ap, mask_ap) in enumerate(
                zip(self.class_names, self.boxes.classes, mask_aps, strict=True)
            )
        ]

    def detections(self) -> list[dict[str, Any]]:
        """Returns what was found as COCO's results list it, with the set's numbers of classes."""
        rows: list[dict[str, Any]] = []
        for record in self.records:
            for found in record.detections:
                left, top, right, bottom = found["box"]
                row = {
                    "image_id": record.image_id,
                    "category_id": self.category_ids[found["label"] - 1],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": found["score"],
                }
                if "counts" in found:
                    size = [record.height, record.width]
                    row["segmentation"] = {"size": size, "counts": found["counts"]}
                rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON; what was found is in detections.json."""
        return {
            "boxes": self.boxes.to_dict(),
            "masks": None if self.masks is None else self.masks.to_dict(),
            "max_detections": self.max_detections,
            "num_images": self.num_images,
            "num_objects": self.num_objects,
            "inference": self.inference.to_dict(),
            "images_per_second": self.images_per_second,
            "model_images_per_second": self.model_images_per_second,
            "per_class": {
                row.name: {"box_ap": row.box_ap, "mask_ap": row.mask_ap} for row in self.classes()
            },
            "unreadable": list(self.unreadable),
        }

    def save(self, folder: str | Path) -> Path:
        """Writes all there is to know into a folder, made when missing.

        evaluation.json, average_precision.csv (boxes and masks by the columns of papers),
        per_class.csv, and detections.json, which COCO's own tools and servers read.

        Returns:
            The path of evaluation.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table: list[Sequence[object]] = [("of", *COLUMNS), ("boxes", *_cells(self.boxes))]
        if self.masks is not None:
            table.append(("masks", *_cells(self.masks)))
        replace_file(folder / "average_precision.csv", csv_text(table))
        per_class: list[Sequence[object]] = [
            ("class", "objects", "detections", "box_ap", "mask_ap")
        ]
        per_class += [
            (row.name, row.num_objects, row.num_detections, _cell(row.box_ap), _cell(row.mask_ap))
            for row in self.classes()
        ]
        replace_file(folder / "per_class.csv", csv_text(per_class))
        replace_file(folder / "detections.json", json.dumps(self.detections()) + "\n")
        target = folder / "evaluation.json"
        replace_file(target, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        return target


def evaluate_detection(
    weights: str | os.PathLike[str],
    data: str | Path | DetectionSource,
    *,
    split: DetectionSplit = "val",
    images: Path | None = None,
    inference: DetectionInference | None = None,
    max_detections: int | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    batch_size: int = 1,
    num_workers: int = 0,
    on_unreadable: OnUnreadable = "fail",
    max_pixels: int = MAX_PIXELS,
    progress: bool = False,
) -> DetectionEvaluation:
    """Returns how well weights do on pictures with objects.

    Pictures are prepared as the weights say; boxes and masks are judged in the pixels of the files.
    All that the model reports counts, whatever the inference's min_score.

    Args:
        weights: whatever `Detector.load` takes.
        data: what `open_objects` takes: "objects", a folder in COCO's layout or one annotation
            file; or a source, which says itself what becomes of unreadable files and how large they
            may be.
        split: which part of the data.
        images: folder of the pictures of an annotation file.
        inference: windows instead of the weights' own way over a picture.
        max_detections: detections of a picture and class that count; None takes as many as the
            weights report of a picture. COCO's tables have 100.
        precision: "bfloat16" runs the model under autocast.
        device: "auto" takes the GPU when there is one.
        batch_size: pictures that go through the model at once; windows have a number of their own.
        num_workers: processes that read pictures beside this one.
        on_unreadable: stop at a picture or an annotation that is broken, or leave it out and list
            it.
        max_pixels: width times height beyond which a file counts as unreadable.
        progress: show a bar on a terminal.

    Raises:
        FileNotFoundError: the weights or the data are missing.
        ImportError: faster-coco-eval is not installed.
        ValueError: the classes of both disagree, either is damaged, or there is nothing to judge.
        BatchTooLargeError: a batch does not fit into memory.
    """
    require_evaluator()
    detector = Detector.load(weights, device=device, inference=inference)
    assert isinstance(detector.model, DetectionModel)
    pictures: DetectionSet
    if isinstance(data, str | Path):
        pictures = open_objects(
            data, split=split, images=images, on_unreadable=on_unreadable, max_pixels=max_pixels
        )
    else:
        pictures = data.open(split)
    if pictures.class_names != detector.class_names:
        raise ValueError(
            class_difference(weights, data, detector.class_names, pictures.class_names)
        )
    batches = DetectionEvalBatches(
        pictures, detector.preprocessing.build(), batch_size=batch_size, num_workers=num_workers
    )
    metric = CocoMetric(
        class_names=pictures.class_names,
        with_masks=pictures.has_masks,
        max_detections=detector.model.config.max_detections
        if max_detections is None
        else max_detections,
    )
    model = TimedModel(detector.model, detector.device)
    inference, at_once, option = detector.inference, batch_size, "batch_size"
    if inference.mode == "slide":
        at_once, option = inference.num_windows, "num_windows"
    started = time.perf_counter()
    shown = track(
        batches,
        description=f"{len(pictures)} pictures",
        console=Console(stderr=True),
        disable=not progress or not Console(stderr=True).is_terminal,
    )
    for batch in shown:
        rows = held_rows(batch)
        if not rows:
            continue
        with (
            explain_out_of_memory(at_once, option=option),
            torch.inference_mode(),
            torch.autocast(detector.device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            found = list(_found(model, detector, pictures, batch, rows))
        metric.update([batch.targets[row] for row in rows], found)
        model.end_batch(len(rows))
    seconds = time.perf_counter() - started
    if not len(metric):
        first = batches.unreadable[0] if batches.unreadable else "the set is empty"
        raise ValueError(
            f"none of the {len(pictures)} pictures of {data} can be judged; the first: {first}"
        )
    scores = metric.scores()
    counts = _count_labels(metric.records, of="objects", num_classes=len(pictures.class_names))
    return DetectionEvaluation(
        boxes=scores.boxes,
        masks=scores.masks,
        max_detections=metric.max_detections,
        num_images=len(metric),
        num_objects=sum(counts),
        inference=detector.inference,
        images_per_second=round(len(metric) / seconds, 2),
        model_images_per_second=round(model.images_per_second, 2),
        class_names=pictures.class_names,
        category_ids=pictures.category_ids,
        records=metric.records,
        unreadable=batches.unreadable,
    )


def _found(
    model: TimedModel,
    detector: Detector,
    pictures: DetectionSet,
    batch: DetectionBatch,
    rows: Sequence[int],
) -> Iterator[FoundObjects]:
    """Yields the objects of some rows of a batch, in the pixels of their pictures."""
    if detector.inference.mode == "whole":
        inputs = [batch.images[row].to(detector.device) for row in rows]
        yield from detect_objects(model, inputs, [batch.targets[row]["size"] for row in rows])
        return
    for row in rows:
        yield find_objects(
            model,
            pictures.image(int(batch.indices[row])),
            preprocessing=detector.preprocessing,
            inference=detector.inference,
            device=detector.device,
        )


def _count_labels(
    records: Sequence[PictureRecord], *, of: Literal["objects", "detections"], num_classes: int
) -> list[int]:
    counts = [0] * num_classes
    for record in records:
        for one in getattr(record, of):
            counts[one["label"] - 1] += not one.get("is_crowd", False)
    return counts


def _cells(precision: AveragePrecision) -> list[object]:
    return [_cell(value) for value in precision.to_dict().values()]


def _cell(value: float | None) -> object:
    return "" if value is None else round(value, 6)
