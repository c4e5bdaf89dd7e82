"""What models are for: model, loss, metrics and predictor of each task."""

from visionmamba.tasks.classification import ClassificationTask
from visionmamba.tasks.classifier import Classification, Classifier
from visionmamba.tasks.detection import DetectionTask
from visionmamba.tasks.detection_evaluation import (
    DetectionClassResult,
    DetectionEvaluation,
    evaluate_detection,
)
from visionmamba.tasks.detector import Detections, Detector
from visionmamba.tasks.evaluation import ClassResult, Evaluation, evaluate
from visionmamba.tasks.segmentation import PixelScores, SegmentationTask
from visionmamba.tasks.segmentation_evaluation import (
    SegmentationClassResult,
    SegmentationEvaluation,
    evaluate_segmentation,
)
from visionmamba.tasks.segmenter import Segmentation, Segmenter
from visionmamba.tasks.sliding import Inference
from visionmamba.tasks.tiles import DetectionInference

__all__ = [
    "ClassResult",
    "Classification",
    "ClassificationTask",
    "Classifier",
    "DetectionClassResult",
    "DetectionEvaluation",
    "DetectionInference",
    "DetectionTask",
    "Detections",
    "Detector",
    "Evaluation",
    "Inference",
    "PixelScores",
    "Segmentation",
    "SegmentationClassResult",
    "SegmentationEvaluation",
    "SegmentationTask",
    "Segmenter",
    "evaluate",
    "evaluate_detection",
    "evaluate_segmentation",
]
