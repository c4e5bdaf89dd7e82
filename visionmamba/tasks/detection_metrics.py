"""COCO's average precision of boxes and masks, computed by faster-coco-eval. Knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visionmamba.data.box_transforms import DetectionTarget
from visionmamba.data.object_masks import Counts, encode_mask, mask_area
from visionmamba.tasks.detection_sizes import FoundObjects
from visionmamba.tasks.run_lengths import compress

COLUMNS = ("ap", "ap50", "ap75", "small", "medium", "large")
"""Numbers of `AveragePrecision`, in the order of papers' tables."""

_THRESHOLD_50, _THRESHOLD_75 = 0, 5  # places in COCO's IoU thresholds 0.5, 0.55, ... 0.95
_ALL_SIZES = 0
_NO_OBJECTS = -1  # what COCO's tables hold where no object is to be found


@dataclass(frozen=True, kw_only=True)
class AveragePrecision:
    """COCO's average precision, 0 to 1; None where there is no object to find.

    The mean over classes, IoU thresholds 0.5, 0.55, ... 0.95 and 101 recalls of the precision.
    """

    ap: float | None
    ap50: float | None
    """At IoU 0.5 alone."""
    ap75: float | None
    """At IoU 0.75 alone."""
    small: float | None
    """Objects of less than 32 x 32 pixels of their picture's file."""
    medium: float | None
    """Objects of 32 x 32 to 96 x 96 pixels."""
    large: float | None
    """Objects of more than 96 x 96 pixels."""
    classes: tuple[float | None, ...]
    """`ap` of each class."""

    @classmethod
    def of(cls, precision: NDArray[np.float64]) -> "AveragePrecision":
        """Returns what an evaluator's table says.

        Args:
            precision: (10 thresholds, recalls, classes, 4 sizes), -1 where there are no objects.
        """
        every = precision[..., _ALL_SIZES]
        return cls(
            ap=_mean(every),
            ap50=_mean(every[_THRESHOLD_50]),
            ap75=_mean(every[_THRESHOLD_75]),
            small=_mean(precision[..., 1]),
            medium=_mean(precision[..., 2]),
            large=_mean(precision[..., 3]),
            classes=tuple(_mean(every[:, :, index]) for index in range(every.shape[2])),
        )

    def to_dict(self) -> dict[str, float | None]:
        """Returns the numbers by `COLUMNS`, without the classes."""
        return {name: getattr(self, name) for name in COLUMNS}


@dataclass(frozen=True, kw_only=True)
class DetectionScores:
    """How good detections are."""

    boxes: AveragePrecision
    masks: AveragePrecision | None
    """None where the set has boxes only, or the detections had no masks."""


class PictureRecord(NamedTuple):
    """Objects and detections of one picture, small enough to send between processes."""

    image_id: int
    height: int
    width: int
    objects: list[dict[str, Any]]
    """"box", "label", "is_crowd", "area" and with masks "counts"."""
    detections: list[dict[str, Any]]
    """"box", "label", "score" and with masks "counts" and "area"."""


class CocoMetric:
    """Collects objects and detections picture by picture, and scores them all at once.

    Over several processes: each updates with its own pictures, all send their `records` to one,
    which calls `add` with the others' and `scores`.
    """

    def __init__(
        self, *, class_names: Sequence[str], with_masks: bool, max_detections: int = 100
    ) -> None:
        """Takes what to judge.

        Args:
            class_names: label k is the k-th, counted from 1.
            with_masks: whether masks are judged beside boxes.
            max_detections: of a picture and class those with the highest scores count; COCO's
                tables have 100, crowded pictures need more.

        Raises:
            ValueError: a number is out of range.
        """
        if max_detections < 1 or not class_names:
            raise ValueError(
                f"max_detections must be at least 1 and classes be named, got {max_detections} and "
                f"{len(class_names)} classes"
            )
        self.class_names = tuple(class_names)
        self.with_masks = with_masks
        self.max_detections = max_detections
        self._records: dict[int, PictureRecord] = {}

    def __len__(self) -> int:
        """Pictures so far."""
        return len(self._records)

    @property
    def records(self) -> tuple[PictureRecord, ...]:
        """What was collected so far, in plain values."""
        return tuple(self._records.values())

    def update(self, targets: Sequence[DetectionTarget], found: Sequence[FoundObjects]) -> None:
        """Takes some pictures.

        Args:
            targets: of evaluation, without rows of padding; boxes and masks in the pixels of
                "size".
            found: one a target, in the same pixels, in any order.

        Raises:
            ValueError: lengths or sizes disagree, a label has no name, scores or boxes are not
                finite, or a picture came before.
        """
        if len(targets) != len(found):
            raise ValueError(
                f"each picture needs its detections, got {len(targets)} targets and "
                f"detections of {len(found)}"
            )
        self.add([_record(target, one, self) for target, one in zip(targets, found, strict=True)])

    def add(self, records: Sequence[PictureRecord]) -> None:
        """Takes what another process collected; ValueError for a picture that came before."""
        for record in records:
            if record.image_id in self._records:
                raise ValueError(
                    f"image {record.image_id} was judged before; give each picture once, or start "
                    "with a new metric"
                )
            self._records[record.image_id] = record

    def scores(self) -> DetectionScores:
        """Returns the scores of all pictures so far.

        Raises:
            ImportError: faster-coco-eval is not installed.
            ValueError: there were no pictures.
        """
        if not self._records:
            raise ValueError("there are no pictures to score; update with some first")
        records = sorted(self._records.values())
        return DetectionScores(
            boxes=self._evaluate(records, masks=False),
            masks=self._evaluate(records, masks=True) if self.with_masks else None,
        )

    def _evaluate(self, records: Sequence[PictureRecord], *, masks: bool) -> AveragePrecision:
        require_evaluator()
        from faster_coco_eval import COCO, COCOeval_faster

        objects, detections = (
            COCO(coco_json(records, self.class_names, of=of, masks=masks))
            for of in ("objects", "detections")
        )
        evaluator = COCOeval_faster(objects, detections, "segm" if masks else "bbox")
        evaluator.params.maxDets = [self.max_detections]
        evaluator.evaluate()
        evaluator.accumulate()
        # the table itself: the evaluators' summaries look for 100 detections and give -1 without
        return AveragePrecision.of(evaluator.eval["precision"][..., -1])


def require_evaluator() -> None:
    """Raises ImportError, which says what to install, unless average precision can be computed."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "average precision needs faster-coco-eval; install it with: pip install "
            "'visionmamba[detection]'"
        ) from error


def coco_json(
    records: Sequence[PictureRecord], class_names: Sequence[str], *, of: str, masks: bool
) -> dict[str, Any]:
    """Returns the "objects" or the "detections" of pictures as COCO's evaluators take them.

    Args:
        records: the pictures.
        class_names: category k is the k-th, counted from 1.
        of: which of the two.
        masks: whether their masks are to be compared rather than their boxes: the area of a
            detection, which decides for which sizes it counts, follows suit.
    """
    annotations: list[dict[str, Any]] = []
    for record in records:
        size = [record.height, record.width]
        for found in getattr(record, of):
            left, top, right, bottom = found["box"]
            area = (right - left) * (bottom - top)
            annotation = {
                "id": len(annotations) + 1,
                "image_id": record.image_id,
                "category_id": found["label"],
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": int(found.get("is_crowd", False)),
                "area": found["area"] if masks or of == "objects" else area,
            }
            if of == "detections":
                annotation["score"] = found["score"]
            if masks:
                annotation["segmentation"] = {"size": size, "counts": found["counts"]}
            annotations.append(annotation)
    return {
        "info": {},
        "images": [
            {"id": record.image_id, "height": record.height, "width": record.width}
            for record in records
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(class_names, start=1)],
        "annotations": annotations,
    }


def _record(target: DetectionTarget, found: FoundObjects, metric: CocoMetric) -> PictureRecord:
    height, width = target["size"]
    objects = [
        {"box": box, "label": label, "is_crowd": bool(is_crowd), "area": area}
        for box, label, is_crowd, area in zip(
            target["boxes"].double().tolist(),
            target["labels"].tolist(),
            target["iscrowd"].tolist(),
            target["area"].double().tolist(),
            strict=True,
        )
    ]
    title = f"image {target['image_id']}"
    boxes, scores, labels = found.boxes, found.scores, found.labels
    if boxes.shape != (len(scores), 4) or scores.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"detections of {title} must have boxes (n, 4), scores (n,) and labels (n,), got "
            f"{boxes.shape}, {scores.shape} and {labels.shape}"
        )
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError(f"detections of {title} have boxes or scores that are not finite")
    num_classes = len(metric.class_names)
    every_label = np.concatenate([labels, target["labels"].cpu().numpy()])
    if ((every_label < 1) | (every_label > num_classes)).any():
        raise ValueError(
            f"labels of {title} must lie between 1 and {num_classes}, got {every_label.min()} "
            f"to {every_label.max()}"
        )
    order = _best_first(scores, labels, metric.max_detections)
    detections: list[dict[str, Any]] = [
        {"box": box, "label": label, "score": score}
        for box, label, score in zip(
            boxes[order].tolist(), labels[order].tolist(), scores[order].tolist(), strict=True
        )
    ]
    if metric.with_masks:
        _add_masks(objects, _target_masks(target, title))
        _add_masks(detections, _found_masks(found, order, (height, width), title))
    return PictureRecord(target["image_id"], height, width, objects, detections)


def _best_first(
    scores: NDArray[np.float64], labels: NDArray[np.int64], max_detections: int
) -> NDArray[np.intp]:
    """Returns the places of the detections that count, at most so many of a class."""
    order = np.argsort(-scores, kind="stable")
    by_class = np.argsort(labels[order], kind="stable")
    sorted_labels = labels[order][by_class]
    first = np.searchsorted(sorted_labels, sorted_labels)
    is_kept = np.arange(len(order)) - first < max_detections
    return order[np.sort(by_class[is_kept])]


def _add_masks(rows: list[dict[str, Any]], masks: Sequence[Counts]) -> None:
    for row, counts in zip(rows, masks, strict=True):
        row["counts"] = compress(counts)
        row.setdefault("area", float(mask_area(counts)))


def _target_masks(target: DetectionTarget, title: str) -> Sequence[Counts]:
    if "run_lengths" in target:
        return target["run_lengths"]
    if "masks" in target:
        return [encode_mask(mask.cpu().numpy()) for mask in target["masks"]]
    raise ValueError(
        f"the objects of {title} have no masks to judge; use a set with masks, or with_masks=False"
    )


def _found_masks(
    found: FoundObjects, order: NDArray[np.intp], size: tuple[int, int], title: str
) -> Sequence[Counts]:
    if len(found.masks) != len(found.labels):
        raise ValueError(
            f"the detections of {title} have no masks to judge; use a model with masks, or "
            "with_masks=False"
        )
    for counts in found.masks:
        if counts.sum() != size[0] * size[1]:
            raise ValueError(
                f"masks of {title} must have {size[0]}x{size[1]} pixels, got {counts.sum()}"
            )
    return [found.masks[place] for place in order]


def _mean(precision: NDArray[np.float64]) -> float | None:
    known = precision[precision > _NO_OBJECTS]
    return float(known.mean()) if known.size else None
