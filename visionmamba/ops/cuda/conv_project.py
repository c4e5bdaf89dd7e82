"""Both directions' convolution, SiLU and projection in one kernel: structure shared, launch."""

import ctypes
import functools

import torch
from torch import Tensor

from visionmamba.ops.cuda.driver import DTYPE_NAMES, kernels

_CHANNELS, _MAX_OUTPUTS, _MAX_TAPS = 384, 48, 4
_GROUPS, _THREADS = 4, 28 * 32
"""Runs of tokens in a block at a time, and its threads."""
_STEP, _RUN_COST = 16, 12
"""A run has whole steps of tokens; what its start and end cost, in tokens."""
_MIN_TOKENS = 4096
"""Fewer are as quick apart."""
_SHARED_BYTES = (2 * 48 + 2 * 2 * 4 * 8) * (2 * _CHANNELS + 16) + 16 * 4 * 2 * _CHANNELS
"""Of a block: Shared in conv_project.cu."""
_DTYPES = (torch.bfloat16, torch.float16)


class _ConvProject(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "conv_weight", "conv_bias", "weight")),
        *((name, ctypes.c_void_p) for name in ("u", "projected")),
        ("x_batch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("x_token", "batch", "length", "width", "taps")),
        *((name, ctypes.c_int32) for name in ("runs", "run")),
    )


def supports_conv_project(x: Tensor, conv_weight: Tensor, weight: Tensor) -> bool:
    """Return whether conv_project takes these, and wins; else convolve and multiply apart.

    It takes 384 channels in bfloat16 or float16, 2 to 4 taps, at most 48 outputs in whole eights,
    channels in pairs of 4 aligned bytes, and wants 220 KB of shared memory a block (H100, H200,
    B200). Few tokens are as quick apart.
    """
    width = weight.shape[1]
    return (
        x.dtype in _DTYPES
        and x.shape[0] * x.shape[1] >= _MIN_TOKENS
        and x.shape[2] == _CHANNELS
        and x.stride(2) == 1
        and not (x.data_ptr() % 4 or x.stride(0) % 2 or x.stride(1) % 2)
        and 2 <= conv_weight.shape[2] <= _MAX_TAPS
        and width % 8 == 0
        and width <= _MAX_OUTPUTS
        and kernels("conv_project", x.device).shared_bytes >= _SHARED_BYTES
    )


def conv_project(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    weight: Tensor,
    *,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return SiLU of both convolutions of x, and each times its weight.

    u[0] sees the K - 1 tokens before each, u[1] those behind, as in bidirectional_conv1d, in
    float32 and rounded to x's dtype; projected[d] is u[d] @ weight[d].T with float32 sums.

    Args:
        x: (B, L, 384); strided rows are read in place.
        conv_weight: (2, 384, K) float32, contiguous; conv_bias: (2, 384) float32, contiguous.
        weight: (2, P, 384) in x's dtype, contiguous, on addresses of whole 16 bytes.
        projected: (2, B, L, P) in x's dtype, contiguous: receives the projections.

    Returns:
        u (2, B, L, 384) and projected (2, B, L, P), contiguous, in x's dtype.
    """
    batch, length, _ = x.shape
    width, size = weight.shape[1], x.element_size()
    u = torch.empty((2, batch, length, _CHANNELS), dtype=x.dtype, device=x.device)
    if projected is None:
        projected = torch.empty((2, batch, length, width), dtype=x.dtype, device=x.device)
    on = kernels("conv_project", x.device)
    runs, run, blocks = _plan(batch, length, on.num_multiprocessors)
    problem = _ConvProject(
        x=x.data_ptr(),
        conv_weight=conv_weight.data_ptr(),
        conv_bias=conv_bias.data_ptr(),
        weight=weight.data_ptr(),
        u=u.data_ptr(),
        projected=projected.data_ptr(),
        x_batch=x.stride(0) * size,
        x_token=x.stride(1) * size,
        batch=batch,
        length=length,
        width=width,
        taps=conv_weight.shape[2],
        runs=runs,
        run=run,
    )
    on.launch(
        f"conv_project_kernel_{DTYPE_NAMES[x.dtype]}",
        problem,
        blocks,
        _THREADS,
        shared_bytes=_SHARED_BYTES,
        starts_early=True,
    )
    return u, projected


@functools.lru_cache(maxsize=1024)
def _plan(batch: int, length: int, num_multiprocessors: int) -> tuple[int, int, int]:
    """Return runs of an image, tokens of a run and blocks, so that all blocks end together."""
    groups = num_multiprocessors * _GROUPS
    if batch * -(-length // 8) <= groups:
        run = 8
    else:

        def planned(rounds: int) -> tuple[int, int]:
            tokens = -(-length // max(1, rounds * groups // batch))
            run = -(-tokens // _STEP) * _STEP
            return -(-batch * -(-length // run) // groups) * (run + _RUN_COST), run

        _, run = min(planned(rounds) for rounds in range(1, 9))
    runs = -(-length // run)
    return runs, run, min(num_multiprocessors, batch * runs)
