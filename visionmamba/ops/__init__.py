"""The models' mathematics as PyTorch ops, several backends behind each; knows tensors only."""

from visionmamba.ops._checks import activation_dtype
from visionmamba.ops.backends import BackendStatus, backends
from visionmamba.ops.bidirectional import bidirectional_scan
from visionmamba.ops.causal_conv1d import bidirectional_conv1d, causal_conv1d
from visionmamba.ops.cuda import ops as _cuda_ops  # noqa: F401  (attaches kernels)
from visionmamba.ops.cuda import pointwise_ops as _pointwise_ops  # noqa: F401  (attaches kernels)
from visionmamba.ops.mixer import can_fuse_mixer, fused_block, fused_mixer, pack_mixer
from visionmamba.ops.patches import cut_patches
from visionmamba.ops.rms_norm import rms_norm
from visionmamba.ops.selective_scan import selective_scan
from visionmamba.ops.triton import ops as _triton_ops  # noqa: F401  (attaches kernels)

__all__ = [
    "BackendStatus",
    "activation_dtype",
    "backends",
    "bidirectional_conv1d",
    "bidirectional_scan",
    "can_fuse_mixer",
    "causal_conv1d",
    "cut_patches",
    "fused_block",
    "fused_mixer",
    "pack_mixer",
    "rms_norm",
    "selective_scan",
]
