"""The scans' Triton kernels with the arguments of the ops of torch.library, attached on Intel GPUs.

On devices that torch calls "cuda" (NVIDIA, AMD) the choice among kernels is that of ops/cuda, which
calls these functions where it chooses Triton. triton is imported at the first scan.
"""

import functools
import warnings

import torch
from torch import Tensor

from visionmamba.ops.bidirectional import (
    bidirectional_scan_backward_torch,
    bidirectional_scan_torch,
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


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state and no checkpoints: the backward computes states again."""
    inputs = x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse
    if not takes(x):
        return selective_scan_chunked(*inputs, None)
    from visionmamba.ops.triton.scan import selective_scan_triton

    return *selective_scan_triton(*inputs), A.new_empty(x.shape[0], 0, *A.shape)


def selective_scan_backward(
    dy: Tensor,
    dlast_state: Tensor | None,
    checkpoints: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the nine tensors from x to initial_state, empty for those None."""
    inputs = x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse
    if not takes(x):
        return selective_scan_backward_chunked(dy, dlast_state, *inputs)
    from visionmamba.ops.triton.scan import selective_scan_backward_triton

    return selective_scan_backward_triton(dy, dlast_state, *inputs)


def bidirectional_scan(
    x_f: Tensor,
    x_b: Tensor,
    projected_f: Tensor,
    projected_b: Tensor,
    dt_weight_f: Tensor,
    dt_weight_b: Tensor,
    dt_bias_f: Tensor,
    dt_bias_b: Tensor,
    A_f: Tensor,
    A_b: Tensor,
    D_f: Tensor,
    D_b: Tensor,
    z: Tensor | None,
    initial_state_f: Tensor | None,
    initial_state_b: Tensor | None,
    scale: float,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, both last states and no checkpoints."""
    inputs = (
        (x_f, x_b),
        (projected_f, projected_b),
        (dt_weight_f, dt_weight_b),
        (dt_bias_f, dt_bias_b),
        (A_f, A_b),
        (D_f, D_b),
        z,
        (initial_state_f, initial_state_b),
        scale,
    )
    if not takes(x_f):
        return bidirectional_scan_torch(*inputs, None)
    from visionmamba.ops.triton.bidirectional import bidirectional_scan_triton

    none_f, none_b = (A.new_empty(x_f.shape[0], 0, *A.shape) for A in (A_f, A_b))
    return *bidirectional_scan_triton(*inputs), none_f, none_b


def bidirectional_scan_backward(
    dy: Tensor,
    dlast_state_f: Tensor | None,
    dlast_state_b: Tensor | None,
    checkpoints_f: Tensor,
    checkpoints_b: Tensor,
    x_f: Tensor,
    x_b: Tensor,
    projected_f: Tensor,
    projected_b: Tensor,
    dt_weight_f: Tensor,
    dt_weight_b: Tensor,
    dt_bias_f: Tensor,
    dt_bias_b: Tensor,
    A_f: Tensor,
    A_b: Tensor,
    D_f: Tensor,
    D_b: Tensor,
    z: Tensor | None,
    initial_state_f: Tensor | None,
    initial_state_b: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of the forward's tensors in their order, empty for those None."""
    inputs = (
        (x_f, x_b),
        (projected_f, projected_b),
        (dt_weight_f, dt_weight_b),
        (dt_bias_f, dt_bias_b),
        (A_f, A_b),
        (D_f, D_b),
        z,
        (initial_state_f, initial_state_b),
        scale,
    )
    dlast_state = dlast_state_f, dlast_state_b
    if not takes(x_f):
        return bidirectional_scan_backward_torch(dy, dlast_state, *inputs)
    from visionmamba.ops.triton.bidirectional import bidirectional_scan_backward_triton

    return bidirectional_scan_backward_triton(dy, dlast_state, *inputs)


for _function in (
    selective_scan,
    selective_scan_backward,
    bidirectional_scan,
    bidirectional_scan_backward,
):
    torch.library.impl(f"visionmamba::{_function.__name__}", "xpu", _function)
