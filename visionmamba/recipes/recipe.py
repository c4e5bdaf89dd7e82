"""TaskRecipe: what recipes of all tasks share; Recipe: all that decides a classification run."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from visionmamba.data import (
    Augmentation,
    DataSource,
    DetectionSplits,
    EvalBatches,
    ImageSet,
    ImageSplits,
    KeptEvalBatches,
    Mixing,
    Preprocessing,
    ResidentTrainBatches,
    SegmentationSplits,
    TrainBatches,
)
from visionmamba.models import DeiT, DeiTConfig, Vim, VimConfig
from visionmamba.models.adapt import fit_positions
from visionmamba.models.hub import find_weights
from visionmamba.models.weights import config_of, load_strictly, read_header, read_tensors
from visionmamba.tasks import ClassificationTask
from visionmamba.training import Experiment, OptimizerConfig, Precision
from visionmamba.training.experiment import Batches, EpochBatches, Task


@dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """What a run of any task says of its steps, their arithmetic and its records."""

    name: str
    """Name of the recipe."""
    optimizer: OptimizerConfig
    """How it learns."""
    epochs: int
    """Epochs of the run, each of which ends with a validation."""
    batch_size: int
    """Pictures of an optimizer step, over all devices and passes."""
    device_batch_size: int | None = None
    """Pictures that one device takes at once, in training and in validation; None gives each its
    share of batch_size. With less, several passes make a step, which is the same but for rounding
    and for what each pass does on its own: it draws mixing, dropout and drop path, in detection the
    boxes that it learns from, and in segmentation takes the mean loss over its own labelled pixels
    and has its own batch norms."""
    ema_decay: float | None = None
    """Decay a step of a moving average of the weights, which is judged and kept beside them; None
    keeps none."""
    precision: Precision = "float32"
    """"bfloat16" runs forward and backward under autocast; weights stay float32."""
    compile: bool = False
    """Runs every block through torch.compile."""
    log_every_steps: int = 10
    """Distance of the training rows in metrics.csv."""
    seed: int = 0
    """Seed of the initial weights, the order, the changes of the pictures and dropout."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "device_batch_size", "log_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay must lie between 0 and 1, or be None, got {self.ema_decay}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def shares(self, num_devices: int) -> tuple[int, int]:
        """Returns pictures of a device's pass and passes of a step.

        Raises:
            ValueError: they do not make up batch_size.
        """
        if self.device_batch_size is None:
            if self.batch_size % num_devices:
                raise ValueError(
                    f"batch_size={self.batch_size} cannot be shared equally by {num_devices} "
                    f"devices; make it a multiple of {num_devices}"
                )
            return self.batch_size // num_devices, 1
        at_once = self.device_batch_size * num_devices
        if self.batch_size % at_once:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of {at_once}, which {num_devices} "
                f"devices take at once with device_batch_size={self.device_batch_size}; change one "
                "of them"
            )
        return self.device_batch_size, self.batch_size // at_once

    def _experiment(
        self,
        *,
        task: Task,
        train_batches: EpochBatches,
        val_batches: Batches,
        passes_per_step: int,
        splits: ImageSplits | SegmentationSplits | DetectionSplits,
    ) -> Experiment:
        """Returns what the training loop asks for, with the parts that a task decides."""
        return Experiment(
            task=task,
            train_batches=train_batches,
            val_batches=val_batches,
            optimizer=self.optimizer,
            epochs=self.epochs,
            batch_size=self.batch_size,
            passes_per_step=passes_per_step,
            ema_decay=self.ema_decay,
            compile_blocks=self.compile,
            precision=self.precision,
            log_every_steps=self.log_every_steps,
            data_summary={
                "train_images": len(splits.train),
                "val_images": len(splits.val),
                "class_names": list(splits.train.class_names),
            },
        )


@dataclass(frozen=True, kw_only=True)
class Recipe(TaskRecipe):
    """A run: data, model, preparation, optimizer. Two equal recipes give equal weights on a CPU.

    An epoch is a pass over the training pictures.
    """

    data: DataSource
    """What to learn from."""
    model: VimConfig | DeiTConfig
    """What learns; its num_classes is taken from the data."""
    preprocessing: Preprocessing
    """How pictures become the model's input; also kept in the weights file."""
    augmentation: Augmentation
    """Random changes of the training pictures."""
    weights: Path | str | None = None
    """Weights to start from: a file or folder of this package, the authors' .pth, or a published
    name. They are fitted to the model: another number of classes gets a new head, another image
    size or stride a resized position embedding."""
    mixing: Mixing = field(default_factory=Mixing)
    """Mixup and CutMix of the training batches."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    resident: bool = False
    """Decodes all pictures once, keeps the training set in the device's memory and changes it
    there, and the prepared validation set in the machine's: for sets of some GB, where processes
    that prepare pictures cannot keep up. Crops, mirroring, colours and erasing alone; the resize is
    bilinear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if pair_of(self.model.image_size) != self.preprocessing.size:
            raise ValueError(
                f"model.image_size {pair_of(self.model.image_size)} and preprocessing.image_size "
                f"{self.preprocessing.size} must be equal; set both"
            )
        if self.model.in_channels != self.preprocessing.num_channels:
            raise ValueError(
                f"model.in_channels={self.model.in_channels} does not fit "
                f"preprocessing.channels={self.preprocessing.channels!r}, which gives "
                f"{self.preprocessing.num_channels}; set both"
            )

    def build(self, *, num_workers: int = 0, rank: int = 0, num_ranks: int = 1) -> Experiment:
        """Reads the data and makes the model; its weights come from torch's global generator.

        Args:
            num_workers: processes that prepare images beside this one.
            rank: number of this process.
            num_ranks: processes that share each step.

        Raises:
            FileNotFoundError: the data or the weights are missing.
            ValueError: the data are empty, their classes disagree, they are less than a batch, the
                batch cannot be shared so, or the weights do not fit.
        """
        device_batch_size, passes = self.shares(num_ranks)
        splits = self.data.build()
        class_names = splits.train.class_names
        config = replace(self.model, num_classes=len(class_names))
        val_batches = EvalBatches(
            splits.val,
            self.preprocessing.build(),
            batch_size=device_batch_size,
            num_workers=num_workers,
            rank=rank,
            num_ranks=num_ranks,
        )
        return self._experiment(
            task=ClassificationTask(
                config.build() if self.weights is None else _start_from(self.weights, config),
                class_names=class_names,
                preprocessing=self.preprocessing,
                label_smoothing=self.label_smoothing,
                mixing=self.mixing,
            ),
            train_batches=self._train_batches(
                splits.train,
                batch_size=device_batch_size,
                seed=self.seed,
                num_workers=num_workers,
                rank=rank,
                num_ranks=num_ranks,
                batches_per_step=passes,
            ),
            val_batches=KeptEvalBatches(val_batches) if self.resident else val_batches,
            passes_per_step=passes,
            splits=splits,
        )

    def _train_batches(
        self, images: ImageSet, **options: Any
    ) -> TrainBatches | ResidentTrainBatches:
        if self.resident:
            return ResidentTrainBatches(images, self.preprocessing, self.augmentation, **options)
        repeats, transform = self.augmentation.repeats, self.preprocessing.build(self.augmentation)
        return TrainBatches(images, transform, repeats=repeats, **options)


def _start_from(weights: Path | str, config: VimConfig | DeiTConfig) -> Vim | DeiT:
    """Returns a model with the weights fitted to the configuration, in training mode."""
    if isinstance(config, VimConfig):
        options = {item.name: getattr(config, item.name) for item in fields(config)}
        return Vim.from_pretrained(weights, **options).train()
    path = find_weights(weights)
    held = config_of(read_header(path), path)
    if not isinstance(held, DeiTConfig):
        raise ValueError(f"{weights} holds a Vim and the recipe's model is a DeiT; change one")
    model = config.build()
    state = read_tensors(path)
    if held.grid != config.grid:
        load_strictly(held.build(), state, path)
        class_token = (0,)
        layouts = (held.grid, class_token), (config.grid, class_token)
        state["pos_embed"] = fit_positions(state["pos_embed"], *layouts)
    if held.num_classes != config.num_classes:
        own = model.state_dict()
        state |= {name: own[name] for name in ("head.weight", "head.bias")}
    load_strictly(model, state, path)
    return model


def pair_of(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) of a size whose sides may be given as one."""
    return (size, size) if isinstance(size, int) else size
