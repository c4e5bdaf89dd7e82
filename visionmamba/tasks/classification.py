"""The task that trains a classifier: its loss and its metrics. Not for using one: classifier.py."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmamba.data import PADDING, Batch, Mixing, Preprocessing
from visionmamba.models.weights import save
from visionmamba.tasks.validation import SummedValidation

TASK_NAME = "classification"
"""What weights files call this task."""


class ClassificationTask(nn.Module):
    """A model trained with cross-entropy and judged by its top-1 and top-5 accuracy."""

    metric_names = ("val_loss", "val_accuracy", "val_top5_accuracy")
    monitor = "val_accuracy"
    validates_evenly = True

    def __init__(
        self,
        model: nn.Module,
        *,
        class_names: tuple[str, ...],
        preprocessing: Preprocessing,
        label_smoothing: float = 0.0,
        mixing: Mixing | None = None,
    ) -> None:
        """Takes a model with one output a class.

        Args:
            model: (B, C, H, W) to (B, K).
            class_names: K names.
            preprocessing: kept in the weights file.
            label_smoothing: share of the target spread over all classes, 0 to below 1.
            mixing: mixup and CutMix of the training batches; None never mixes.
        """
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {label_smoothing}"
            )
        self.model = model
        self.class_names = class_names
        self.preprocessing = preprocessing
        self.label_smoothing = label_smoothing
        self.mixing = mixing or Mixing()

    def training_loss(self, batch: Batch) -> Tensor:
        """Returns the mean cross-entropy of a batch, a float32 scalar."""
        images, targets = batch.images, batch.labels
        if self.mixing.is_active:
            images, targets = self.mixing.mix(images, targets, num_classes=len(self.class_names))
        logits = self.model(images).float()
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def begin_validation(self) -> SummedValidation[Batch]:
        """Returns a validation of the model that has seen no batch."""
        return SummedValidation(self._sums_of, metrics_of=self._metrics_of)

    def draw(self, batch: Batch) -> None:
        """None: there is no picture of what a classifier makes of a batch."""

    def save_weights(self, path: Path) -> None:
        """Writes the model with all that `Classifier.load` needs."""
        save(
            self.model,
            path,
            task=TASK_NAME,
            class_names=self.class_names,
            preprocessing=self.preprocessing.to_dict(),
        )

    def _sums_of(self, batch: Batch) -> Tensor:
        """Returns what a batch adds to the metrics, (4,) float32, rows of padding left out."""
        logits = self.model(batch.images).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum", ignore_index=PADDING)
        first, first_five = hits(logits, batch.labels)
        num_seen = (batch.labels != PADDING).sum()
        return torch.stack([loss, first.sum(), first_five.sum(), num_seen])

    def _metrics_of(self, sums: Tensor) -> dict[str, float]:
        *totals, num_seen = sums.tolist()
        means = [total / max(num_seen, 1) for total in totals]
        return dict(zip(self.metric_names, means, strict=True))


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (B,) booleans: the label is the most probable class, is among the first five."""
    ranked = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
    return ranked[:, 0], ranked.any(dim=-1)
