"""Validations: what a model does on batch after batch, over several processes, made into metrics.

That of tasks whose metrics follow from sums; detection, whose metrics do not, has its own.
"""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from torch import Tensor

ValueType = TypeVar("ValueType")
BatchType = TypeVar("BatchType")
ClassMetrics = dict[str, dict[str, float | None]]
"""Metrics of each class by its name, the same for all; None where one cannot be judged."""


class Processes(Protocol):
    """The processes that train together, or this one alone."""

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum over all processes, each of which must call this."""

    def gather_to_main(self, value: ValueType) -> list[ValueType]:
        """Returns to the main process what each has, its own first, and to the others nothing."""


class SummedValidation(Generic[BatchType]):
    """A validation whose metrics follow from one tensor, summed over batches and processes."""

    def __init__(
        self,
        sums_of: Callable[[BatchType], Tensor],
        *,
        metrics_of: Callable[[Tensor], dict[str, float]],
        class_metrics_of: Callable[[Tensor], ClassMetrics] | None = None,
    ) -> None:
        """Takes what the task makes of a batch, and of sums.

        Args:
            sums_of: runs the model on a batch and returns what that adds, 1-D; sums are float64.
            metrics_of: returns the metrics of sums.
            class_metrics_of: returns the metrics of each class; None where there are none.
        """
        self._sums_of = sums_of
        self._metrics_of = metrics_of
        self._class_metrics_of = class_metrics_of
        self._sums: Tensor | None = None

    @property
    def sums(self) -> Tensor:
        """What the batches so far add up to, float64; ValueError before the first."""
        if self._sums is None:
            raise ValueError("nothing is validated yet; update with a batch first")
        return self._sums

    def update(self, batch: BatchType) -> None:
        """Runs the model on a batch, whose rows of padding do not count."""
        sums = self._sums_of(batch).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def merge(self, processes: Processes) -> None:
        """Adds what all processes have; each calls this once, at the end."""
        self._sums = processes.sum(self.sums)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of all batches by the task's names for them."""
        return self._metrics_of(self.sums)

    def class_metrics(self) -> ClassMetrics | None:
        """Returns the metrics of each class by its name; None where the task has none."""
        return None if self._class_metrics_of is None else self._class_metrics_of(self.sums)
