"""Recipe: everything that decides the result of a classification run."""

from dataclasses import dataclass, replace
from typing import Any

from visionmamba.data import (
    Augmentation,
    Digits,
    EvalBatches,
    ImageFolder,
    ImageSplits,
    Preprocessing,
    TrainBatches,
)
from visionmamba.models import DeiTConfig, VimConfig
from visionmamba.tasks import ClassificationTask
from visionmamba.training import Experiment, OptimizerConfig, Precision


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run: data, model, preparation, optimizer. Two equal recipes give equal weights on a CPU."""

    name: str
    """Name of the recipe."""
    data: Digits | ImageFolder
    """What to learn from."""
    model: VimConfig | DeiTConfig
    """What learns; its num_classes is taken from the data."""
    preprocessing: Preprocessing
    """How pictures become the model's input; also kept in the weights file."""
    augmentation: Augmentation
    """Random changes of the training pictures."""
    optimizer: OptimizerConfig
    """How it learns."""
    epochs: int
    """Passes over the training pictures."""
    batch_size: int
    """Pictures in a batch, in training and in validation."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    precision: Precision = "float32"
    """"bfloat16" runs forward and backward under autocast; weights stay float32."""
    log_every_steps: int = 10
    """Distance of the training rows in metrics.csv."""
    seed: int = 0
    """Seed of the initial weights, the order, the changes of the pictures and dropout."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if _pair(self.model.image_size) != self.preprocessing.size:
            raise ValueError(
                f"model.image_size {_pair(self.model.image_size)} and preprocessing.image_size "
                f"{self.preprocessing.size} must be equal; set both"
            )
        if self.model.in_channels != self.preprocessing.num_channels:
            raise ValueError(
                f"model.in_channels={self.model.in_channels} does not fit "
                f"preprocessing.channels={self.preprocessing.channels!r}, which gives "
                f"{self.preprocessing.num_channels}; set both"
            )

    def build(self, *, num_workers: int = 0) -> Experiment:
        """Reads the data and makes the model; its weights come from torch's global generator.

        Raises:
            FileNotFoundError: the data are missing.
            ValueError: the data are empty, their classes disagree, or they are less than a batch.
        """
        splits = self.data.build()
        class_names = splits.train.class_names
        model = replace(self.model, num_classes=len(class_names)).build()
        return Experiment(
            task=ClassificationTask(
                model,
                class_names=class_names,
                preprocessing=self.preprocessing,
                label_smoothing=self.label_smoothing,
            ),
            train_batches=TrainBatches(
                splits.train,
                self.preprocessing.build(self.augmentation),
                batch_size=self.batch_size,
                seed=self.seed,
                num_workers=num_workers,
            ),
            val_batches=EvalBatches(
                splits.val,
                self.preprocessing.build(),
                batch_size=self.batch_size,
                num_workers=num_workers,
            ),
            optimizer=self.optimizer,
            epochs=self.epochs,
            batch_size=self.batch_size,
            precision=self.precision,
            log_every_steps=self.log_every_steps,
            data_summary=_summary(splits),
        )


def _summary(splits: ImageSplits) -> dict[str, Any]:
    return {
        "train_images": len(splits.train),
        "val_images": len(splits.val),
        "class_names": list(splits.train.class_names),
        "unreadable": {
            "train": list(splits.train.unreadable),
            "val": list(splits.val.unreadable),
        },
    }


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
