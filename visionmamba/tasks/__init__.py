"""What models are for: model, loss, metrics and predictor of each task."""

from visionmamba.tasks.classification import ClassificationTask
from visionmamba.tasks.classifier import Classification, Classifier
from visionmamba.tasks.evaluation import ClassResult, Evaluation, evaluate

__all__ = [
    "ClassResult",
    "Classification",
    "ClassificationTask",
    "Classifier",
    "Evaluation",
    "evaluate",
]
