"""The scans' CUDA kernels behind the ops of torch.library, and what is left to plain PyTorch.

Importing this module attaches them, straight to the dispatcher, which is 0.1 ms a call quicker than
CustomOpDef.register_kernel. Forward: float32, bfloat16 and float16. Backward: bfloat16; the
gradients of other dtypes come from the PyTorch path. A backward runs the forward again for its
states, so nothing is kept in between.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops._checks import as_stored
from visionmamba.ops.bidirectional import (
    bidirectional_scan_backward_torch,
    bidirectional_scan_torch,
)
from visionmamba.ops.cuda import cuda_backend
from visionmamba.ops.cuda.gate import gate, gate_gradients
from visionmamba.ops.cuda.scan import (
    Direction,
    scan_backward,
    scan_forward,
)
from visionmamba.ops.selective_scan import checkpoint_length, num_checkpoints
from visionmamba.ops.selective_scan.chunked import (
    selective_scan_backward_chunked,
    selective_scan_chunked,
)

_FORWARD = (torch.float32, torch.bfloat16, torch.float16)
_BACKWARD = (torch.bfloat16,)

_Pair = tuple[Tensor, Tensor]


def _direction(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> Direction:
    return Direction(
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        dt_bias=dt_bias,
        initial_state=initial_state,
        reverse=reverse,
    )


def _takes(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    if x.numel() == 0 or not cuda_backend(x.device).has_kernels:
        return False
    if x.dtype in _FORWARD and x.dtype not in dtypes:
        _warn_of_slow_gradients(x.dtype)
    return x.dtype in dtypes


@functools.cache
def _warn_of_slow_gradients(dtype: torch.dtype) -> None:
    warnings.warn(
        f"visionmamba computes the gradients of {str(dtype).removeprefix('torch.')} scans on the "
        "GPU in plain PyTorch, many times slower; train under torch.autocast to bfloat16",
        stacklevel=2,
    )


@torch.library.impl("visionmamba::selective_scan", "cuda")
def _(
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
    checkpoints = num_checkpoints(x.shape[1], x.device) if save_states else 0
    if not _takes(x, _FORWARD):
        return selective_scan_chunked(
            *(x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse),
            checkpoint_length(x.device) if save_states else None,
        )
    direction = _direction(x, dt, A, B, C, D, dt_bias, initial_state, reverse)
    ((y, last_state),) = scan_forward([direction], dt_softplus=dt_softplus)
    if z is not None:
        y = gate(y, None, z, 1.0)
    return y.contiguous(), last_state.contiguous(), A.new_empty((x.shape[0], checkpoints, *A.shape))


@torch.library.impl("visionmamba::selective_scan_backward", "cuda")
def _(
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
    if not _takes(x, _BACKWARD):
        return selective_scan_backward_chunked(
            *(dy, dlast_state, x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse)
        )
    direction = _direction(x, dt, A, B, C, D, dt_bias, initial_state, reverse)
    dscan, dz = dy, dy.new_empty(0)
    if z is not None:
        dscan = gate_gradients(dy, dy, None, z, 1.0)[0]
    (grads,), (y,) = scan_backward([direction], [dscan], [dlast_state], dt_softplus=dt_softplus)
    if z is not None:
        dz = gate_gradients(dy, y, None, z, 1.0)[1].contiguous()
    nothing = A.new_empty(0)
    return (
        grads.dx.contiguous(),
        grads.ddt.contiguous(),
        grads.dA.contiguous(),
        grads.dB.to(B.dtype),
        grads.dC.to(C.dtype),
        nothing if grads.dD is None else grads.dD.contiguous(),
        dz,
        nothing if dt_bias is None else grads.ddt_bias.contiguous(),
        nothing if grads.dinitial_state is None else grads.dinitial_state.contiguous(),
    )


def _directions(
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    initial_state: tuple[Tensor | None, Tensor | None],
) -> list[Direction]:
    """Return both scans; only the step sizes are computed, B and C are read where they lie."""
    directions = []
    for i in (0, 1):
        rank, d_state = dt_weight[i].shape[1], A[i].shape[1]
        dt_r, B, C = torch.split(projected[i], [rank, d_state, d_state], dim=-1)
        dt = F.linear(dt_r, dt_weight[i].to(dt_r.dtype))
        directions.append(
            _direction(x[i], dt, A[i], B, C, D[i], dt_bias[i], initial_state[i], i == 1)
        )
    return directions


@torch.library.impl("visionmamba::bidirectional_scan", "cuda")
def _(
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
    pairs = (
        (x_f, x_b),
        (projected_f, projected_b),
        (dt_weight_f, dt_weight_b),
        (dt_bias_f, dt_bias_b),
        (A_f, A_b),
        (D_f, D_b),
    )
    states = initial_state_f, initial_state_b
    if not _takes(x_f, _FORWARD):
        every = checkpoint_length(x_f.device) if save_states else None
        return bidirectional_scan_torch(*pairs, z, states, scale, every)
    with torch.autocast("cuda", enabled=False):
        (y_f, last_f), (y_b, last_b) = scan_forward(_directions(*pairs, states), dt_softplus=True)
        if z is None:
            y = as_stored((y_f.float() + y_b) * scale, x_f.dtype)
        else:
            y = gate(y_f, y_b, z, scale).contiguous()
    checkpoints = num_checkpoints(x_f.shape[1], x_f.device) if save_states else 0
    kept_f, kept_b = (A.new_empty((x_f.shape[0], checkpoints, *A.shape)) for A in (A_f, A_b))
    return y, last_f.contiguous(), last_b.contiguous(), kept_f, kept_b


@torch.library.impl("visionmamba::bidirectional_scan_backward", "cuda")
def _(
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
    projected, dt_weight = (projected_f, projected_b), (dt_weight_f, dt_weight_b)
    pairs = (
        (x_f, x_b),
        projected,
        dt_weight,
        (dt_bias_f, dt_bias_b),
        (A_f, A_b),
        (D_f, D_b),
    )
    states = initial_state_f, initial_state_b
    dlast_state = dlast_state_f, dlast_state_b
    if not _takes(x_f, _BACKWARD):
        return bidirectional_scan_backward_torch(dy, dlast_state, *pairs, z, states, scale)
    with torch.autocast("cuda", enabled=False):
        directions = _directions(*pairs, states)
        dz = dy.new_empty(0)
        if z is None:
            dscan = (dy.float() * scale).to(x_f.dtype)
        else:
            dscan = gate_gradients(dy, dy, None, z, scale)[0]
        grads, (y_f, y_b) = scan_backward(directions, [dscan, dscan], dlast_state, dt_softplus=True)
        if z is not None:
            dz = gate_gradients(dy, y_f, y_b, z, scale)[1].contiguous()
        rows = []
        for i, of_direction in enumerate(grads):
            dtype, draw = projected[i].dtype, of_direction.ddt
            weight = dt_weight[i].to(dtype)
            dt_r = projected[i][..., : weight.shape[1]]
            assert of_direction.dD is not None
            initial = of_direction.dinitial_state
            rows.append(
                (
                    of_direction.dx.contiguous(),
                    torch.cat(
                        [draw @ weight, of_direction.dB.to(dtype), of_direction.dC.to(dtype)], -1
                    ),
                    (draw.flatten(0, 1).T @ dt_r.flatten(0, 1)).float(),
                    of_direction.ddt_bias.contiguous(),
                    of_direction.dA.contiguous(),
                    of_direction.dD.contiguous(),
                    A_f.new_empty(0) if initial is None else initial.contiguous(),
                )
            )
    columns = [tensor for pair in zip(*rows, strict=True) for tensor in pair]
    return [*columns[:-2], dz, *columns[-2:]]
