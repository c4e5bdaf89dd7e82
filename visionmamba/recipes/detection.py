"""DetectionRecipe: everything that decides the result of a run that learns objects."""

from dataclasses import dataclass, field, replace

from visionmamba.data import (
    DetectionAugmentation,
    DetectionEvalBatches,
    DetectionPreprocessing,
    DetectionSource,
    DetectionTrainBatches,
)
from visionmamba.models import DetectorConfig, load_detector
from visionmamba.recipes.dense import DenseRecipe
from visionmamba.tasks import DetectionInference, DetectionTask
from visionmamba.training import Experiment


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(DenseRecipe):
    """A run that learns boxes and masks of objects. Two equal recipes give equal weights on a CPU.

    Validation reports what the model's score_threshold, nms_threshold and max_detections leave.
    """

    data: DetectionSource
    """What to learn from."""
    model: DetectorConfig
    """What learns; its num_classes is taken from the data."""
    preprocessing: DetectionPreprocessing
    """How pictures become the model's input; also kept in the weights file."""
    augmentation: DetectionAugmentation
    """Random changes of the training pictures and their objects."""
    inference: DetectionInference = field(default_factory=DetectionInference)
    """How the weights are to be used later, kept in their file; validation goes over whole
    pictures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes(self.model.image_size, self.preprocessing.image_size, name="image_size")

    def build(self, *, num_workers: int = 0, rank: int = 0, num_ranks: int = 1) -> Experiment:
        """Reads the data and makes the model; its weights come from torch's global generator.

        Args:
            num_workers: processes that prepare images beside this one.
            rank: number of this process.
            num_ranks: processes that share each step.

        Raises:
            FileNotFoundError: the data or the weights are missing.
            ImportError: faster-coco-eval is not installed.
            ValueError: the data are empty or broken, have no masks, their classes disagree, they
                are less than a batch, the batch cannot be shared so, or the weights do not fit.
        """
        device_batch_size, passes = self.shares(num_ranks)
        splits = self.data.build()
        train = splits.train
        if not train.has_masks:
            raise ValueError(
                "the annotations to learn from have boxes but no masks, which this detector learns "
                "too; give annotations with a segmentation of every object"
            )
        model = replace(self.model, num_classes=len(train.class_names)).build()
        self._start(model, architecture="detector", load_whole=load_detector, rank=rank)
        return self._experiment(
            task=DetectionTask(
                model,
                class_names=train.class_names,
                category_ids=train.category_ids,
                preprocessing=self.preprocessing,
                inference=self.inference,
            ),
            train_batches=DetectionTrainBatches(
                train,
                self.preprocessing.build(self.augmentation),
                batch_size=device_batch_size,
                seed=self.seed,
                num_workers=num_workers,
                rank=rank,
                num_ranks=num_ranks,
                batches_per_step=passes,
                epoch_steps=self.epoch_steps,
            ),
            val_batches=DetectionEvalBatches(
                splits.val,
                self.preprocessing.build(),
                batch_size=device_batch_size,
                num_workers=num_workers,
                rank=rank,
                num_ranks=num_ranks,
            ),
            passes_per_step=passes,
            splits=splits,
        )
