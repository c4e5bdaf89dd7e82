"""The mathematics of the models as PyTorch ops, each with several backends behind one face; knows tensors only."""

from visionmamba.ops.backends import BackendStatus, backends
from visionmamba.ops.bidirectional import bidirectional_scan
from visionmamba.ops.causal_conv1d import causal_conv1d
from visionmamba.ops.rms_norm import rms_norm
from visionmamba.ops.selective_scan import selective_scan

__all__ = [
    "BackendStatus",
    "backends",
    "bidirectional_scan",
    "causal_conv1d",
    "rms_norm",
    "selective_scan",
]
