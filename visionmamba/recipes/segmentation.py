"""SegmentationRecipe: everything that decides the result of a segmentation run."""

from dataclasses import dataclass, field, replace

from visionmamba.data import (
    SegmentationAugmentation,
    SegmentationEvalBatches,
    SegmentationPreprocessing,
    SegmentationSource,
    SegmentationTrainBatches,
)
from visionmamba.models import SegmenterConfig, load_segmenter
from visionmamba.recipes.dense import DenseRecipe
from visionmamba.tasks import Inference, SegmentationTask
from visionmamba.training import Experiment


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(DenseRecipe):
    """A run that learns masks. Two equal recipes give equal weights on a CPU."""

    data: SegmentationSource
    """What to learn from."""
    model: SegmenterConfig
    """What learns; its num_classes is taken from the data."""
    preprocessing: SegmentationPreprocessing
    """How pictures become the model's input; also kept in the weights file."""
    augmentation: SegmentationAugmentation
    """Random changes of the training pictures and their masks."""
    inference: Inference = field(default_factory=Inference)
    """How pictures go through the model in validation; also kept in the weights file."""
    auxiliary_weight: float = 0.4
    """Factor of the auxiliary head's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes(self.model.image_size, self.preprocessing.crop_size, name="crop_size")

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
        self._start(model, architecture="segmenter", load_whole=load_segmenter, rank=rank)
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
