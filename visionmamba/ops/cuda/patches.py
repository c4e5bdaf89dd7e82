"""Pictures cut into patches as a Python function on tensors: a structure shared with patches.cu."""

import ctypes

import torch
from torch import Tensor

from visionmamba.ops.cuda.driver import DTYPE_NAMES, kernels

_THREADS, _PIECE = 256, 8


class _Patches(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("images", "rows")),
        *((name, ctypes.c_int64) for name in ("image", "channel")),
        *((name, ctypes.c_int32) for name in ("line", "batch", "channels", "height", "width")),
        *((name, ctypes.c_int32) for name in ("side", "stride", "columns", "length", "aligned")),
    )


def takes_patches(images: Tensor, patch_size: int, dtype: torch.dtype) -> bool:
    """Return whether the kernel cuts these: sides in whole eights, no float64."""
    return (
        dtype in DTYPE_NAMES and images.dtype in (dtype, torch.float32) and patch_size % _PIECE == 0
    )


def patch_rows(
    images: Tensor, patch_size: int, stride: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return patches (B, rows * columns, C p p) in row-major order; zeros beyond the picture.

    Args:
        images: (B, C, H, W) on one GPU, float32 or in `dtype`.
        patch_size: side p of a patch, a multiple of 8.
        stride: distance of neighbouring patches.
        rows, columns: of patches.
        dtype: float32, bfloat16 or float16.
    """
    if images.stride(3) != 1:
        images = images.contiguous()
    batch, channels, height, width = images.shape
    numbers = channels * patch_size * patch_size
    out = torch.empty((batch, rows * columns, numbers), dtype=dtype, device=images.device)
    size = images.element_size()
    image, channel, line = (step * size for step in images.stride()[:3])
    places = images.data_ptr() | image | channel | line | stride * size
    problem = _Patches(
        images=images.data_ptr(),
        rows=out.data_ptr(),
        image=image,
        channel=channel,
        line=line,
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        side=patch_size,
        stride=stride,
        columns=columns,
        length=rows * columns,
        aligned=places % (_PIECE * size) == 0,
    )
    threads = batch * rows * columns * (numbers // _PIECE)
    kernels("patches", images.device).launch(
        f"patches_kernel_{DTYPE_NAMES[images.dtype]}_{DTYPE_NAMES[dtype]}",
        problem,
        -(-threads // _THREADS),
        _THREADS,
        starts_early=True,
    )
    return out
