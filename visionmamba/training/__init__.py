"""Training of any task: the loop, the optimizer, the records of a run and how it is resumed."""

from visionmamba.training.experiment import (
    Experiment,
    NonFiniteError,
    Precision,
    Recipe,
    Task,
    Validation,
)
from visionmamba.training.fit import FitResult, fit
from visionmamba.training.metrics import read_metrics
from visionmamba.training.optimizer import OptimizerConfig

__all__ = [
    "Experiment",
    "FitResult",
    "NonFiniteError",
    "OptimizerConfig",
    "Precision",
    "Recipe",
    "Task",
    "Validation",
    "fit",
    "read_metrics",
]
