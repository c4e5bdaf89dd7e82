"""Vim and its baseline as modules: pictures (B, C, H, W) in, tensors out."""

from visionmamba.models.config import VimConfig
from visionmamba.models.deit import DeiT, DeiTConfig
from visionmamba.models.mixer import BidirectionalMixer, DirectionalSSM
from visionmamba.models.published import load_published
from visionmamba.models.vim import Vim, VimBlock
from visionmamba.models.weights import WeightsHeader, load, read_header, save

__all__ = [
    "BidirectionalMixer",
    "DeiT",
    "DeiTConfig",
    "DirectionalSSM",
    "Vim",
    "VimBlock",
    "VimConfig",
    "WeightsHeader",
    "load",
    "load_published",
    "read_header",
    "save",
]
