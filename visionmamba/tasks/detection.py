"""The task that trains a detector: its loss and its metrics. Not for using one: detector.py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from visionmamba.data import (
    PADDING,
    DetectionBatch,
    DetectionPreprocessing,
    DetectionTarget,
    restore_image,
)
from visionmamba.models import DetectionModel
from visionmamba.models.weights import save
from visionmamba.tasks.detection_metrics import (
    COLUMNS,
    CocoMetric,
    DetectionScores,
    require_evaluator,
)
from visionmamba.tasks.detection_sizes import FoundObjects, own_objects
from visionmamba.tasks.overlay import add_legend, draw_objects, draw_rows, palette_of
from visionmamba.tasks.tiles import DetectionInference
from visionmamba.tasks.validation import ClassMetrics, Processes

TASK_NAME = "detection"
"""What weights files call this task."""

_NUM_DRAWN = 4
_DRAWN_SIDE_PX = 384


class DetectionTask(nn.Module):
    """A detector trained with its own losses and judged by COCO's average precision."""

    metric_names = tuple(f"val_{kind}_{column}" for kind in ("box", "mask") for column in COLUMNS)
    monitor = "val_mask_ap"
    validates_evenly = True  # each batch is one run of the model, padding or not

    def __init__(
        self,
        model: DetectionModel,
        *,
        class_names: tuple[str, ...],
        preprocessing: DetectionPreprocessing,
        category_ids: Sequence[int] | None = None,
        inference: DetectionInference | None = None,
        palette: Sequence[Sequence[int]] | NDArray[np.uint8] | None = None,
    ) -> None:
        """Takes a detector of boxes and masks.

        Args:
            model: its config says how many detections of a picture are reported and count.
            class_names: K names; label k is the k-th, counted from 1.
            preprocessing: kept in the weights file.
            category_ids: numbers of the classes in the annotation files, for results in COCO's
                format; None counts from 1. Kept in the weights file.
            inference: how the weights are to be used later, kept in their file; validation goes
                over whole pictures. None is whole pictures later, too, or windows of the model's
                size.
            palette: one colour a class; None makes some.

        Raises:
            ImportError: faster-coco-eval is not installed.
            ValueError: there are not as many ids or colours as classes.
        """
        super().__init__()
        require_evaluator()
        ids = tuple(range(1, len(class_names) + 1)) if category_ids is None else category_ids
        if len(ids) != len(class_names):
            raise ValueError(
                f"category_ids must number the {len(class_names)} classes, got {len(ids)}"
            )
        self.model: nn.Module = model
        self.max_detections = model.config.max_detections
        self.class_names = class_names
        self.category_ids = tuple(ids)
        self.preprocessing = preprocessing
        self.inference = inference or DetectionInference.of_size(preprocessing.size)
        self.palette = palette_of(palette, len(class_names))

    def training_loss(self, batch: DetectionBatch) -> Tensor:
        """Returns the sum of the detector's losses, a float32 scalar."""
        losses: dict[str, Tensor] = self.model(batch.images, batch.targets)
        return torch.stack(list(losses.values())).sum()

    def begin_validation(self) -> "DetectionValidation":
        """Returns a validation of the model that has seen no batch."""
        return DetectionValidation(
            self.model, class_names=self.class_names, max_detections=self.max_detections
        )

    def draw(self, batch: DetectionBatch) -> Image.Image | None:
        """Returns picture, objects and detections of the first four rows of a batch.

        Runs the model, which is in evaluation mode, without gradients. Detections are those with
        the inference's min_score and more. None when the batch is nothing but padding, on which the
        model runs all the same: sharded ones need every process.
        """
        held = held_rows(batch)[:_NUM_DRAWN]
        rows = held or [0]
        images = [batch.images[row] for row in rows]
        targets = [batch.targets[row] for row in rows]
        with torch.no_grad():
            found = detect_objects(self.model, images, [target["size"] for target in targets])
        if not held:
            return None
        drawn = [
            self._draw_row(image, target, one)
            for image, target, one in zip(images, targets, found, strict=True)
        ]
        score = f"detections, score {self.inference.min_score:g} and more"
        picture = draw_rows(drawn, ("picture", "objects", score), side=_DRAWN_SIDE_PX)
        if len(self.class_names) == 1:
            return picture  # in which each object has a colour of its own
        return add_legend(picture, list(zip(self.class_names, self.palette, strict=True)))

    def save_weights(self, path: Path) -> None:
        """Writes the model with all that `Detector.load` needs."""
        save(
            self.model,
            path,
            task=TASK_NAME,
            class_names=self.class_names,
            preprocessing=self.preprocessing.to_dict(),
            details={
                "category_ids": list(self.category_ids),
                "inference": self.inference.to_dict(),
                "palette": [list(colour) for colour in self.palette],
            },
        )

    def _draw_row(
        self, image: Tensor, target: DetectionTarget, found: FoundObjects
    ) -> list[Image.Image]:
        height, width = target["size"]
        photograph = restore_image(image, mean=self.preprocessing.mean, std=self.preprocessing.std)
        photograph = photograph.resize((width, height), Image.Resampling.BILINEAR)
        sure = found.take(found.scores >= self.inference.min_score)
        style: dict[str, Any] = {
            "class_names": self.class_names,
            "palette": self.palette,
            "scale": max(1, _DRAWN_SIDE_PX // max(height, width)),
        }
        return [
            photograph,
            draw_objects(
                photograph,
                boxes=target["boxes"].cpu().double().numpy(),
                labels=target["labels"].cpu().numpy(),
                masks=target.get("run_lengths"),
                **style,
            ),
            draw_objects(
                photograph,
                boxes=sure.boxes,
                labels=sure.labels,
                masks=sure.masks,
                scores=sure.scores,
                **style,
            ),
        ]


class DetectionValidation:
    """What a detector finds in the pictures of batch after batch, scored when all are seen."""

    def __init__(
        self, model: nn.Module, *, class_names: Sequence[str], max_detections: int
    ) -> None:
        """Takes the model, which `update` runs as it then is, and what `CocoMetric` does."""
        self._model = model
        self._metric = CocoMetric(
            class_names=class_names, with_masks=True, max_detections=max_detections
        )
        self._scores: DetectionScores | None = None

    def update(self, batch: DetectionBatch) -> None:
        """Runs the model on a batch, whose rows of padding do not count."""
        found = detect_objects(
            self._model, batch.images, [target["size"] for target in batch.targets]
        )
        rows = held_rows(batch)
        self._metric.update([batch.targets[row] for row in rows], [found[row] for row in rows])

    def merge(self, processes: Processes) -> None:
        """Gives the main process the detections of all; each calls this once, at the end."""
        for records in processes.gather_to_main(self._metric.records)[1:]:
            self._metric.add(records)

    def metrics(self) -> dict[str, float]:
        """Returns the average precisions of all pictures by the task's names for them.

        Those of a size that no object has are left out.

        Raises:
            ValueError: there is no object at all.
        """
        scores = self._scored()
        both = (("box", scores.boxes), ("mask", scores.masks))
        return {
            f"val_{kind}_{column}": value
            for kind, precision in both
            if precision is not None
            for column, value in precision.to_dict().items()
            if value is not None
        }

    def class_metrics(self) -> ClassMetrics:
        """Returns "box_ap" and "mask_ap" of each class by its name; None where it has no object."""
        scores = self._scored()
        assert scores.masks is not None
        return {
            name: {"box_ap": box_ap, "mask_ap": mask_ap}
            for name, box_ap, mask_ap in zip(
                self._metric.class_names, scores.boxes.classes, scores.masks.classes, strict=True
            )
        }

    def _scored(self) -> DetectionScores:
        if self._scores is None:
            self._scores = self._metric.scores()
            if self._scores.boxes.ap is None:
                raise ValueError(
                    f"none of the {len(self._metric)} pictures to validate on has an object, so "
                    "there is no average precision; give some that have"
                )
        return self._scores


def detect_objects(
    model: Callable[[Sequence[Tensor]], Any],
    images: Sequence[Tensor],
    own_sizes: Sequence[tuple[int, int]],
) -> list[FoundObjects]:
    """Returns what a model finds in prepared pictures, in the pixels of the pictures' files.

    Args:
        model: a detector in evaluation mode.
        images: (3, h, w) of any sizes.
        own_sizes: (height, width) of each picture in its file.
    """
    answers = model(images)
    return [
        own_objects(answer, size=(image.shape[1], image.shape[2]), own_size=own_size)
        for answer, image, own_size in zip(answers, images, own_sizes, strict=True)
    ]


def held_rows(batch: DetectionBatch) -> list[int]:
    """Returns the rows of a batch that are pictures, not padding."""
    return [row for row, index in enumerate(batch.indices.tolist()) if index != PADDING]
