"""What models are for: model, loss, metrics and predictor of each task."""

from visionmamba.tasks.classification import (
    Classification,
    ClassificationTask,
    Classifier,
    Evaluation,
    evaluate,
)

__all__ = ["Classification", "ClassificationTask", "Classifier", "Evaluation", "evaluate"]
