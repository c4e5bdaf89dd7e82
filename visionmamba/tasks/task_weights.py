"""Weights of a task, and what their header must say before a predictor of that task can work."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from visionmamba.models.deit import DeiT
from visionmamba.models.detection import DetectionModel
from visionmamba.models.hub import find_weights
from visionmamba.models.segmentation import SegmentationModel
from visionmamba.models.vim import Vim
from visionmamba.models.weights import (
    METADATA_KEY,
    WeightsHeader,
    load,
    read_header,
    read_metadata,
    task_of,
)
from visionmamba.tasks.classification import TASK_NAME as CLASSIFICATION
from visionmamba.tasks.overlay import Palette, palette_of
from visionmamba.tasks.sliding import Windows

_Prepared = TypeVar("_Prepared")
_Inference = TypeVar("_Inference", bound=Windows)


@dataclass(frozen=True, kw_only=True)
class TaskWeights:
    """A weights file that was trained for the task wanted; what it says is checked when read."""

    where: str
    """As the user called it."""
    path: Path
    header: WeightsHeader

    @classmethod
    def find(cls, weights: str | os.PathLike[str], *, task: str, trained: str) -> "TaskWeights":
        """Returns the weights of a file, a folder or a repository of the Hub.

        Args:
            weights: where they are.
            task: what they must have been trained for.
            trained: what a model of that task is called, such as "segmenter".

        Raises:
            FileNotFoundError: there is no such file, and the Hub is out of reach.
            ValueError: it is damaged, too new, of another task, or says nothing about preparation
                or classes.
        """
        where, path = os.fspath(weights), find_weights(weights)
        if path.suffix != ".safetensors" or METADATA_KEY not in read_metadata(path):
            raise ValueError(
                f"{where} holds the authors' weights for {CLASSIFICATION}, wanted {task}; train a "
                f"{trained} that starts from them: visionmamba train RECIPE --weights FILE"
            )
        header = read_header(path)
        if header.task != task:
            raise ValueError(
                f"{where} was trained for {header.task}, wanted {task}; use the predictor of that "
                "task"
            )
        if task_of(header.architecture) != task:
            raise ValueError(
                f"{where} says that its {header.architecture} was trained for {task}, which none "
                "can be; get it again"
            )
        if not header.preprocessing or not header.class_names:
            raise ValueError(
                f"{where} does not say how pictures are prepared and what the classes are called; "
                "save it with visionmamba.save(..., class_names=..., preprocessing=...)"
            )
        return cls(where=where, path=path, header=header)

    @property
    def palette(self) -> Palette:
        """Colours of the classes; made where the header has none."""
        try:
            return palette_of(self.header.details.get("palette"), len(self.header.class_names))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.where} has damaged colours ({error}); get it again") from None

    def preprocessing(self, read: Callable[[Mapping[str, Any]], _Prepared]) -> _Prepared:
        """Returns how pictures are prepared, by the `from_dict` of what the task has for that."""
        try:
            return read(self.header.preprocessing)
        except ValueError as error:
            raise ValueError(f"{self.where} has a damaged header ({error}); get it again") from None

    def inference(self, kind: type[_Inference]) -> _Inference:
        """Returns how the model goes over pictures; the defaults where the header does not say."""
        try:
            return kind.from_dict(self.header.details.get("inference", {}))
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{self.where} has damaged inference settings ({error})") from None

    def model(self, device: str) -> Vim | DeiT | SegmentationModel | DetectionModel:
        """Returns the model, in evaluation mode, on a device."""
        model = load(self.path, device=device)
        if len(self.header.class_names) != model.config.num_classes:
            raise ValueError(
                f"{self.where} names {len(self.header.class_names)} classes, and its model has "
                f"{model.config.num_classes}; get it again"
            )
        return model
