"""The task that trains a segmenter: its loss and its metrics. Not for using one: segmenter.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from visionmamba.data import (
    IGNORE,
    PADDING,
    SegmentationBatch,
    SegmentationPreprocessing,
    restore_image,
)
from visionmamba.data.masks import MAX_CLASSES
from visionmamba.models.weights import save
from visionmamba.tasks.overlay import add_legend, draw_rows, paint_labels, palette_of
from visionmamba.tasks.sliding import Inference, predict_labels, score_bands
from visionmamba.tasks.validation import ClassMetrics, SummedValidation

TASK_NAME = "segmentation"
"""What weights files call this task."""

_NUM_DRAWN = 4


@dataclass(frozen=True, kw_only=True)
class PixelScores:
    """What a confusion matrix of pixels says; classes that are absent have None and do not count.

    As in the published evaluation (mmsegmentation): a class without true pixels that was predicted
    somewhere has an IoU of 0; only one that is in neither is absent from the mean.
    """

    miou: float
    """Mean over classes of intersection over union, 0 to 1."""
    macc: float
    """Mean over classes with true pixels of the share of them that is right."""
    aacc: float
    """Share of all labelled pixels that is right."""
    ious: tuple[float | None, ...]
    """Intersection over union of each class."""
    accuracies: tuple[float | None, ...]
    """Share of each class's true pixels that is right."""

    @classmethod
    def of(cls, confusion: NDArray[np.number]) -> "PixelScores":
        """Returns the scores of (K, K) counts of pixels, true classes down, predicted across."""
        counts = confusion.astype(np.float64)
        right, true = counts.diagonal(), counts.sum(axis=1)
        union = true + counts.sum(axis=0) - right
        ious, accuracies = _shares(right, union), _shares(right, true)
        return cls(
            miou=_mean(ious),
            macc=_mean(accuracies),
            aacc=float(right.sum() / max(counts.sum(), 1.0)),
            ious=ious,
            accuracies=accuracies,
        )


class SegmentationTask(nn.Module):
    """A model trained with cross-entropy a pixel and judged by its mean IoU over the whole set."""

    metric_names = ("val_loss", "val_miou", "val_macc", "val_aacc")
    monitor = "val_miou"

    def __init__(
        self,
        model: nn.Module,
        *,
        class_names: tuple[str, ...],
        preprocessing: SegmentationPreprocessing,
        inference: Inference | None = None,
        auxiliary_weight: float = 0.4,
        palette: Sequence[Sequence[int]] | NDArray[np.uint8] | None = None,
    ) -> None:
        """Takes a model with one score a class and pixel.

        Args:
            model: (B, C, H, W) to (B, K, H, W); in training mode to that and the same of an
                auxiliary head, or None.
            class_names: K names.
            preprocessing: kept in the weights file.
            inference: how validation, and later the predictor, goes over a picture; None in one
                pass.
            auxiliary_weight: factor of the auxiliary head's loss.
            palette: colours of the classes, for pictures; None makes some.

        Raises:
            ValueError: too many classes for labels of eight bits, or the palette is of another
                number of classes.
        """
        super().__init__()
        if len(class_names) > MAX_CLASSES:
            raise ValueError(
                f"segmentation takes at most {MAX_CLASSES} classes, got {len(class_names)}"
            )
        if auxiliary_weight < 0:
            raise ValueError(f"auxiliary_weight must be at least 0, got {auxiliary_weight}")
        self.model = model
        self.class_names = class_names
        self.preprocessing = preprocessing
        self.inference = inference or Inference()
        self.auxiliary_weight = auxiliary_weight
        self.palette = palette_of(palette, len(class_names))

    @property
    def validates_evenly(self) -> bool:
        """Whether the model runs equally often for any batch: windows are as many as fit."""
        return self.inference.mode != "slide"

    def training_loss(self, batch: SegmentationBatch) -> Tensor:
        """Returns the mean cross-entropy of the labelled pixels of a batch, a float32 scalar.

        The auxiliary head's is added with its weight. A batch without labelled pixels costs 0.
        """
        logits, auxiliary = self.model(batch.images)
        loss = _mean_loss(logits, batch.masks)
        if auxiliary is not None and self.auxiliary_weight:
            loss = loss + self.auxiliary_weight * _mean_loss(auxiliary, batch.masks)
        return loss

    def begin_validation(self) -> SummedValidation[SegmentationBatch]:
        """Returns a validation of the model that has seen no batch.

        Its class metrics are "iou" and "accuracy", None for a class that does not occur.
        """
        return SummedValidation(
            self._sums_of, metrics_of=self._metrics_of, class_metrics_of=self._class_metrics_of
        )

    def draw(self, batch: SegmentationBatch) -> Image.Image | None:
        """Returns picture, true mask and predicted mask of the first four rows of a batch.

        Runs the model, which is in evaluation mode, without gradients. Pixels without a label are
        white, and the classes' colours are named below. None when the batch is nothing but padding,
        on which the model runs all the same: sharded ones need every process.
        """
        held = (batch.indices != PADDING).nonzero().flatten()[:_NUM_DRAWN]
        drawn_rows = held if len(held) else slice(1)
        images, masks = batch.images[drawn_rows], batch.masks[drawn_rows]
        size = masks.shape[-2], masks.shape[-1]
        with torch.no_grad():
            predicted = predict_labels(self.model, images, size=size, inference=self.inference)
        if not len(held):
            return None
        rows = [
            [
                restore_image(image, mean=self.preprocessing.mean, std=self.preprocessing.std),
                paint_labels(mask.to("cpu", torch.uint8).numpy(), self.palette),
                paint_labels(labels.numpy(), self.palette),
            ]
            for image, mask, labels in zip(images, masks, predicted, strict=True)
        ]
        drawn = draw_rows(rows, ("picture", "true mask", "predicted mask"))
        return add_legend(drawn, list(zip(self.class_names, self.palette, strict=True)))

    def save_weights(self, path: Path) -> None:
        """Writes the model with all that `Segmenter.load` needs."""
        save(
            self.model,
            path,
            task=TASK_NAME,
            class_names=self.class_names,
            preprocessing=self.preprocessing.to_dict(),
            details={
                "inference": self.inference.to_dict(),
                "palette": [list(colour) for colour in self.palette],
            },
        )

    def _sums_of(self, batch: SegmentationBatch) -> Tensor:
        """Returns what a batch adds to the metrics, (K * K + 2,) float64.

        The confusion matrix (true classes down, predicted ones across), row after row; the sum of
        the losses; the number of labelled pixels. The masks have the size at which to judge.
        """
        count = len(self.class_names)
        sums = torch.zeros(count**2 + 2, dtype=torch.float64, device=batch.images.device)
        size = batch.masks.shape[-2], batch.masks.shape[-1]
        for band in score_bands(self.model, batch.images, size=size, inference=self.inference):
            masks = batch.masks[:, band.rows, band.columns]
            confusion = count_pixels(masks, band.scores.argmax(dim=1), count)
            sums[:-2] += confusion.reshape(-1)
            sums[-2] += F.cross_entropy(band.scores, masks, ignore_index=IGNORE, reduction="sum")
            sums[-1] += confusion.sum()
        return sums

    def _metrics_of(self, sums: Tensor) -> dict[str, float]:
        scores = PixelScores.of(self._confusion(sums))
        loss, num_pixels = sums[-2:].tolist()
        values = (loss / max(num_pixels, 1.0), scores.miou, scores.macc, scores.aacc)
        return dict(zip(self.metric_names, values, strict=True))

    def _class_metrics_of(self, sums: Tensor) -> ClassMetrics:
        scores = PixelScores.of(self._confusion(sums))
        return {
            name: {"iou": iou, "accuracy": accuracy}
            for name, iou, accuracy in zip(
                self.class_names, scores.ious, scores.accuracies, strict=True
            )
        }

    def _confusion(self, sums: Tensor) -> NDArray[np.float64]:
        count = len(self.class_names)
        matrix: NDArray[np.float64] = sums[:-2].reshape(count, count).cpu().numpy()
        return matrix


def count_pixels(masks: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Returns (K, K) int64: how many pixels of the row's class were taken for the column's.

    Args:
        masks: any shape, int64; pixels of `IGNORE` do not count.
        predicted: the same shape, int64.
        num_classes: K.
    """
    is_labelled = masks != IGNORE
    pairs = masks[is_labelled] * num_classes + predicted[is_labelled]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def _mean_loss(logits: Tensor, masks: Tensor) -> Tensor:
    total = F.cross_entropy(logits.float(), masks, ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp_min(1)


def _shares(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> tuple[float | None, ...]:
    pairs = zip(parts.tolist(), wholes.tolist(), strict=True)
    return tuple(part / whole if whole else None for part, whole in pairs)


def _mean(values: Sequence[float | None]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / max(len(present), 1)
