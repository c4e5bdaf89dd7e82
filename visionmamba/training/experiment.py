"""What the training loop asks of a task and its data; it knows nothing else about them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image
from torch import Tensor, nn

from visionmamba.training.metrics import ClassValues
from visionmamba.training.optimizer import OptimizerConfig
from visionmamba.training.world import World

Precision = Literal["float32", "bfloat16"]


class NonFiniteError(RuntimeError):
    """Loss or gradient became infinite or not a number; the message says where."""


class Validation(Protocol):
    """What a model does on the validation batches, gathered one by one and made into metrics."""

    def update(self, batch: Any) -> None:
        """Runs the model, which is in evaluation mode, on a batch; padding does not count."""

    def merge(self, processes: World) -> None:
        """Gives the main process what all have gathered; each calls this once, at the end."""

    def metrics(self) -> dict[str, float]:
        """Returns the metrics by the task's names, to the main process when all is merged.

        One that cannot be judged is left out; the monitored one never is.
        """

    def class_metrics(self) -> ClassValues | None:
        """Returns those of each class, as `metrics` does; None: the task judges no single classes.

        All classes have the same metrics.
        """


class Task(Protocol):
    """A model with its loss and metrics; also an nn.Module, so that it moves to a device as one."""

    model: nn.Module

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the validation metrics, each beginning with "val_"."""

    @property
    def monitor(self) -> str:
        """The metric by which the best weights are chosen; higher is better."""

    @property
    def validates_evenly(self) -> bool:
        """Whether validation runs the model equally often on each process, as sharding needs."""

    def training_loss(self, batch: Any) -> Tensor:
        """Returns the scalar loss of a batch."""

    def begin_validation(self) -> Validation:
        """Returns a validation of the model that has seen no batch."""

    def draw(self, batch: Any) -> Image.Image | None:
        """Returns a picture of what the model makes of a validation batch, or None.

        Runs the model equally often for any batch where `validates_evenly`.
        """

    def save_weights(self, path: Path) -> None:
        """Writes the model's weights with all that its predictor needs."""


class EpochBatches(Protocol):
    """Training batches, epoch after epoch, resumable after any batch."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Why files of this process's share were left out or replaced, one sentence each."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of an epoch, unless that epoch is already under way."""

    def state_dict(self) -> dict[str, int]:
        """Returns the place in the data."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a place that `state_dict` returned."""

    def workers_kept(self) -> AbstractContextManager[None]:
        """Keeps the processes that prepare batches, if any, from one pass to the next."""


class Batches(Protocol):
    """Validation batches, the same ones at every pass, equally many on each process."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Why files of this process's share were left out, one sentence each."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def workers_kept(self) -> AbstractContextManager[None]:
        """Keeps the processes that prepare batches, if any, from one pass to the next."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that is needed to train: what `Recipe.build` returns."""

    task: Task
    """Model, loss and metrics."""
    train_batches: EpochBatches
    """What to learn from."""
    val_batches: Batches
    """What to judge on after each epoch."""
    optimizer: OptimizerConfig
    """How to learn."""
    epochs: int
    """Passes over the training data."""
    batch_size: int
    """Examples of an optimizer step, over all processes and passes."""
    passes_per_step: int
    """Batches of each process whose gradients are averaged into one step."""
    ema_decay: float | None
    """Decay a step of the moving average of the weights; None keeps none."""
    compile_blocks: bool
    """Whether the model's blocks go through torch.compile."""
    precision: Precision
    """Arithmetic of the forward and backward pass."""
    log_every_steps: int
    """Distance of the training rows in metrics.csv."""
    data_summary: dict[str, Any]
    """Plain facts of the data (counts, class names), which must be the same at a resume."""


class Recipe(Protocol):
    """A frozen dataclass that describes a run."""

    @property
    def name(self) -> str:
        """Name of the recipe."""

    @property
    def seed(self) -> int:
        """Seed of the initial weights and of everything random afterwards."""

    def build(self, *, num_workers: int = 0, rank: int = 0, num_ranks: int = 1) -> Experiment:
        """Reads the data and makes the model; its weights come from torch's global generator.

        Args:
            num_workers: processes that prepare images beside this one.
            rank: number of this process.
            num_ranks: processes that share each step.
        """
