"""The scans' Triton kernels with the arguments of the ops of torch.library, attached on Intel GPUs.

On devices that torch calls "cuda" (NVIDIA, AMD) the choice among kernels is that of ops/cuda, which
calls these functions where it chooses Triton. triton is imported at the first scan.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from visionmamba.ops.bidirectional import (
    bidirectional_scan_backward_torch,
    bidirectional_scan_torch,
    by_direction,
)
from visionmamba.ops.kernel_cache import UnavailableError
from visionmamba.ops.selective_scan.chunked import (
    selective_scan_backward_chunked,
    selective_scan_chunked,
)
from visionmamba.ops.triton import check_available

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor) -> bool:
    """Return whether the Triton kernels run a scan over x; warn once where they cannot be had."""
    return x.dtype in DTYPES and _is_available(x.device)


@functools.cache
def _is_available(device: torch.device) -> bool:
    try:
        check_available(device)
    except UnavailableError as error:
        warnings.warn(f"visionmamba scans on {device} in plain PyTorch: {error}", stacklevel=2)
        return False
    return True


def selective_scan(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state and no checkpoints: the backward computes states again."""
    x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, _ = inputs
    given = x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse
    if not takes(x):
        return selective_scan_chunked(*given, None)
    from visionmamba.ops.triton.scan import selective_scan_triton

    return *selective_scan_triton(*given), A.new_empty(x.shape[0], 0, *A.shape)


def selective_scan_backward(
    dy: Tensor, dlast_state: Tensor | None, checkpoints: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the nine tensors from x to initial_state, empty for those None."""
    if not takes(inputs[0]):
        return selective_scan_backward_chunked(dy, dlast_state, *inputs)
    from visionmamba.ops.triton.scan import selective_scan_backward_triton

    return selective_scan_backward_triton(dy, dlast_state, *inputs)


def bidirectional_scan(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, both last states and no checkpoints."""
    *given, z, state_f, state_b, scale, _ = inputs
    pairs, states = by_direction(given), (state_f, state_b)
    x, A = pairs[0], pairs[4]
    if not takes(x[0]):
        return bidirectional_scan_torch(*pairs, z, states, scale, None)
    from visionmamba.ops.triton.bidirectional import bidirectional_scan_triton

    none_f, none_b = (one.new_empty(x[0].shape[0], 0, *one.shape) for one in A)
    return *bidirectional_scan_triton(*pairs, z, states, scale), none_f, none_b


def bidirectional_scan_backward(
    dy: Tensor,
    dlast_f: Tensor | None,
    dlast_b: Tensor | None,
    checkpoints_f: Tensor,
    checkpoints_b: Tensor,
    *inputs: Any,
) -> list[Tensor]:
    """Return the gradients of the forward's tensors in their order, empty for those None."""
    *given, z, state_f, state_b, scale = inputs
    pairs, states, dlast = by_direction(given), (state_f, state_b), (dlast_f, dlast_b)
    if not takes(pairs[0][0]):
        return bidirectional_scan_backward_torch(dy, dlast, *pairs, z, states, scale)
    from visionmamba.ops.triton.bidirectional import bidirectional_scan_backward_triton

    return bidirectional_scan_backward_triton(dy, dlast, *pairs, z, states, scale)


for _function in (
    selective_scan,
    selective_scan_backward,
    bidirectional_scan,
    bidirectional_scan_backward,
):
    torch.library.impl(f"visionmamba::{_function.__name__}", "xpu", _function)
