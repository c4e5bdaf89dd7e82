"""Detectors on Vim and on DeiT over the resolution: inference and training, in one run.

The models are untrained. So that each does all that a trained one does, they tell one class and
report every picture's best 100 boxes with masks, however unsure; in training each picture has eight
objects, from a sixteenth to a half of its side. How many boxes there are decides what the heads do,
so that passes cannot be recorded as CUDA graphs, and none of the models is.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from visionmamba.bench.cases import DetectorHead, ModelName
from visionmamba.bench.dense import DenseSpeed


@dataclass(frozen=True, kw_only=True)
class DetectionSpeed(DenseSpeed):
    """Measure detectors in inference and in training: time, images/s, peak memory."""

    name: ClassVar[str] = "detection"

    models: tuple[ModelName, ...] = ("vim", "deit", "deit-window")
    """What is measured; the others are compared with the first. vim and deit see the whole picture
    in every block; deit-window has ViTDet's windows of 14 patches and four global blocks. Those
    that differ in training alone (vim-lean, deit-checkpoint) are left out of inference."""
    head: DetectorHead = "cascade"
    """cascade: three box stages and masks; mask: Mask R-CNN, one of them and masks."""
    resolutions: tuple[int, ...] = (1024, 1536, 2048)
    """Sides of the square pictures in pixels, multiples of 32."""
    infer_batch: int = 1
    """Pictures in a pass of inference."""
    train_batch: int = 2
    """Pictures in a step of training."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: autocast, in inference too; auto takes it on a GPU."""

    def _head_options(self) -> dict[str, Any]:
        return {"detector": self.head, "cuda_graphs": False}
