"""SegmentationRecipe: everything that decides the result of a segmentation run."""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

from visionmamba.data import (
    SegmentationAugmentation,
    SegmentationEvalBatches,
    SegmentationPreprocessing,
    SegmentationSource,
    SegmentationTrainBatches,
)
from visionmamba.models import (
    SegmentationModel,
    SegmenterConfig,
    load_backbone,
    load_segmenter,
    read_header,
)
from visionmamba.models.hub import find_weights
from visionmamba.models.weights import METADATA_KEY, read_metadata, weights_file
from visionmamba.recipes.recipe import TaskRecipe, pair_of
from visionmamba.tasks import Inference, SegmentationTask
from visionmamba.training import Experiment


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(TaskRecipe):
    """A run that learns masks. Two equal recipes give equal weights on a CPU."""

    data: SegmentationSource
    """What to learn from."""
    model: SegmenterConfig
    """What learns; its num_classes is taken from the data."""
    preprocessing: SegmentationPreprocessing
    """How pictures become the model's input; also kept in the weights file."""
    augmentation: SegmentationAugmentation
    """Random changes of the training pictures and their masks."""
    epoch_steps: int | None = None
    """Steps of an epoch, that is, from one validation to the next; they go through the training
    pictures as often as they need. None makes an epoch of one pass over the pictures."""
    weights: Path | str | None = None
    """Weights to start from. Those of a classifier (a file or folder of this package, the authors'
    .pth, a published name) become the backbone; those of a segmenter go on as a whole, and must
    have the classes of the data."""
    backbone_only: bool = False
    """Take only the backbone from weights of a segmenter, for data with other classes."""
    inference: Inference = field(default_factory=Inference)
    """How pictures go through the model in validation; also kept in the weights file."""
    auxiliary_weight: float = 0.4
    """Factor of the auxiliary head's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch_steps is not None and self.epoch_steps < 1:
            raise ValueError(f"epoch_steps must be at least 1 or None, got {self.epoch_steps}")
        side, crop = pair_of(self.model.image_size), pair_of(self.preprocessing.crop_size)
        if side != crop:
            raise ValueError(
                f"model.backbone.image_size {side} and preprocessing.crop_size {crop} must be "
                "equal; set both"
            )
        if self.backbone_only and self.weights is None:
            raise ValueError("backbone_only says what to take of weights; give weights, too")

    def build(self, *, num_workers: int = 0, rank: int = 0, num_ranks: int = 1) -> Experiment:
        """Reads the data and makes the model; its weights come from torch's global generator.

        Args:
            num_workers: processes that prepare images beside this one.
            rank: number of this process.
            num_ranks: processes that share each step.

        Raises:
            FileNotFoundError: the data or the weights are missing.
            ImportError: the head is UperNet and transformers is not installed.
            ValueError: the data are empty, their classes disagree, they are less than a batch, the
                batch cannot be shared so, or the weights do not fit.
        """
        device_batch_size, passes = self.shares(num_ranks)
        splits = self.data.build()
        class_names = splits.train.class_names
        model = replace(self.model, num_classes=len(class_names)).build()
        if self.weights is not None:
            notes = _start_from(self.weights, model, backbone_only=self.backbone_only)
            if notes and rank == 0:
                warnings.warn(
                    f"{self.weights} starts the backbone, but {'; '.join(notes)}", stacklevel=2
                )
        return self._experiment(
            task=SegmentationTask(
                model,
                class_names=class_names,
                preprocessing=self.preprocessing,
                inference=self.inference,
                auxiliary_weight=self.auxiliary_weight,
                palette=splits.train.palette,
            ),
            train_batches=SegmentationTrainBatches(
                splits.train,
                self.preprocessing.build(self.augmentation),
                batch_size=device_batch_size,
                seed=self.seed,
                num_workers=num_workers,
                rank=rank,
                num_ranks=num_ranks,
                batches_per_step=passes,
                epoch_steps=self.epoch_steps,
            ),
            val_batches=SegmentationEvalBatches(
                splits.val,
                self.preprocessing.build(None),
                batch_size=device_batch_size,
                num_workers=num_workers,
                rank=rank,
                num_ranks=num_ranks,
            ),
            passes_per_step=passes,
            splits=splits,
        )


def _start_from(
    weights: Path | str, model: SegmentationModel, *, backbone_only: bool
) -> tuple[str, ...]:
    """Gives a new model weights of a classifier or of a segmenter; returns the notes."""
    path = weights_file(find_weights(weights))
    is_ours = path.suffix == ".safetensors" and METADATA_KEY in read_metadata(path)
    if backbone_only or not is_ours or read_header(path).architecture != "segmenter":
        return load_backbone(model, weights).notes
    load_segmenter(model, weights)
    return ()
