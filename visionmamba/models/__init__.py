"""Vim and its baseline as modules: pictures (B, C, H, W) in, tensors out.

Names are imported at their first use: configurations and the list of published weights need no
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visionmamba.models.config import VimConfig
    from visionmamba.models.deit import DeiT, DeiTConfig
    from visionmamba.models.detection import DetectionModel, DetectorConfig
    from visionmamba.models.mixer import BidirectionalMixer, DirectionalSSM
    from visionmamba.models.published import load_published
    from visionmamba.models.segmentation import SegmentationModel, SegmenterConfig
    from visionmamba.models.start import load_backbone, load_detector, load_segmenter
    from visionmamba.models.vim import Vim, VimBlock
    from visionmamba.models.weights import WeightsHeader, load, read_header, save

__all__ = [
    "BidirectionalMixer",
    "DeiT",
    "DeiTConfig",
    "DetectionModel",
    "DetectorConfig",
    "DirectionalSSM",
    "SegmentationModel",
    "SegmenterConfig",
    "Vim",
    "VimBlock",
    "VimConfig",
    "WeightsHeader",
    "load",
    "load_backbone",
    "load_detector",
    "load_published",
    "load_segmenter",
    "read_header",
    "save",
]

_HOMES = {
    "BidirectionalMixer": "mixer",
    "DeiT": "deit",
    "DeiTConfig": "deit",
    "DetectionModel": "detection",
    "DetectorConfig": "detection",
    "DirectionalSSM": "mixer",
    "SegmentationModel": "segmentation",
    "SegmenterConfig": "segmentation",
    "Vim": "vim",
    "VimBlock": "vim",
    "VimConfig": "config",
    "WeightsHeader": "weights",
    "load": "weights",
    "load_backbone": "start",
    "load_detector": "start",
    "load_published": "published",
    "load_segmenter": "start",
    "read_header": "weights",
    "save": "weights",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
