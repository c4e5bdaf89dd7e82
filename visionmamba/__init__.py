"""Vision Mamba: bidirectional selective state-space vision backbones.

The public names; each is imported at its first use, so that `import visionmamba` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from visionmamba._timm_hook import register_with_timm

if TYPE_CHECKING:
    from visionmamba.models.config import VimConfig
    from visionmamba.models.deit import DeiTConfig
    from visionmamba.models.detection import DetectorConfig
    from visionmamba.models.mixer import BidirectionalMixer
    from visionmamba.models.optimize import optimize
    from visionmamba.models.published import load_published
    from visionmamba.models.segmentation import SegmenterConfig
    from visionmamba.models.vim import Vim, VimBlock
    from visionmamba.models.weights import load, save
    from visionmamba.ops import selective_scan
    from visionmamba.tasks.classifier import Classification, Classifier
    from visionmamba.tasks.detector import Detections, Detector
    from visionmamba.tasks.segmenter import Segmentation, Segmenter

__version__ = "0.1.0"

__all__ = [
    "BidirectionalMixer",
    "Classification",
    "Classifier",
    "DeiTConfig",
    "Detections",
    "Detector",
    "DetectorConfig",
    "Segmentation",
    "Segmenter",
    "SegmenterConfig",
    "Vim",
    "VimBlock",
    "VimConfig",
    "__version__",
    "load",
    "load_published",
    "optimize",
    "save",
    "selective_scan",
]

_HOMES = {
    "BidirectionalMixer": "visionmamba.models.mixer",
    "Classification": "visionmamba.tasks.classifier",
    "Classifier": "visionmamba.tasks.classifier",
    "DeiTConfig": "visionmamba.models.deit",
    "Detections": "visionmamba.tasks.detector",
    "Detector": "visionmamba.tasks.detector",
    "DetectorConfig": "visionmamba.models.detection",
    "Segmentation": "visionmamba.tasks.segmenter",
    "Segmenter": "visionmamba.tasks.segmenter",
    "SegmenterConfig": "visionmamba.models.segmentation",
    "Vim": "visionmamba.models.vim",
    "VimBlock": "visionmamba.models.vim",
    "VimConfig": "visionmamba.models.config",
    "load": "visionmamba.models.weights",
    "load_published": "visionmamba.models.published",
    "optimize": "visionmamba.models.optimize",
    "save": "visionmamba.models.weights",
    "selective_scan": "visionmamba.ops",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'visionmamba' has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_timm()
