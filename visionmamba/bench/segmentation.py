"""Segmenters on Vim and on DeiT over the resolution: inference and training, in one run.

A picture gets a score for every class at every pixel, which both models pay for alike: with many
classes those scores, not the backbone, fill the memory.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from visionmamba.bench.cases import SegmenterHead
from visionmamba.bench.dense import DenseSpeed


@dataclass(frozen=True, kw_only=True)
class SegmentationSpeed(DenseSpeed):
    """Measure segmenters in inference and in training: time, images/s, peak memory, error."""

    name: ClassVar[str] = "segmentation"

    head: SegmenterHead = "upernet"
    """upernet, or segmenter: a mask transformer."""
    num_classes: int = 150
    """Scores of every pixel; ADE20K has 150."""
    train_batch: int = 4
    """Pictures in a step of training; UperNet needs two."""
    cuda_graphs: bool = True
    """On a GPU replay every pass of every model from a CUDA graph, where it can be captured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "upernet" and self.train_batch < 2:
            raise ValueError(
                f"train_batch must be at least 2 for UperNet's batch norms; got {self.train_batch}"
            )

    def _head_options(self) -> dict[str, Any]:
        return {"segmenter": self.head}
