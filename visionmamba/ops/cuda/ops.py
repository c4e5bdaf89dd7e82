"""The scans' kernels behind the ops of torch.library on GPUs that torch calls "cuda".

Importing this module attaches them, straight to the dispatcher, which is 0.1 ms a call quicker than
CustomOpDef.register_kernel. CUDA C++ forward: float32, bfloat16 and float16; backward: bfloat16;
the other gradients come from Triton. A backward runs the forward again for its states, so no
checkpoints are kept in between.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from visionmamba.ops._checks import as_stored
from visionmamba.ops.bidirectional import (
    bidirectional_scan_backward_torch,
    bidirectional_scan_torch,
    by_direction,
)
from visionmamba.ops.cuda import cuda_backend
from visionmamba.ops.cuda.fused_scan import bidirectional_backward, bidirectional_forward
from visionmamba.ops.cuda.gate import gate, gate_gradients
from visionmamba.ops.cuda.scan import Direction, scan_backward, scan_forward
from visionmamba.ops.selective_scan.chunked import (
    selective_scan_backward_chunked,
    selective_scan_chunked,
)
from visionmamba.ops.triton import ops as triton_ops

_FORWARD = (torch.float32, torch.bfloat16, torch.float16)
_BACKWARD = (torch.bfloat16,)


def _backend(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> Literal["cuda", "triton", "torch"]:
    """Return what runs a scan over x, of whose dtypes CUDA C++ takes these."""
    if x.numel() == 0 or x.dtype not in _FORWARD:
        return "torch"
    name = cuda_backend(x.device).name
    return "triton" if name == "cuda" and x.dtype not in dtypes else name


@torch.library.impl("visionmamba::selective_scan", "cuda")
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, _ = inputs
    backend = _backend(x, _FORWARD)
    if backend == "triton":
        return triton_ops.selective_scan(*inputs)
    if backend == "torch":
        scalars = dt_softplus, reverse, None
        return selective_scan_chunked(x, dt, A, B, C, D, z, dt_bias, initial_state, *scalars)
    direction = Direction(
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
    ((y, last_state),) = scan_forward([direction], dt_softplus=dt_softplus)
    if z is not None:
        y = gate(y, None, z, 1.0)
    return y.contiguous(), last_state.contiguous(), A.new_empty((x.shape[0], 0, *A.shape))


@torch.library.impl("visionmamba::selective_scan_backward", "cuda")
def _(dy: Tensor, dlast_state: Tensor | None, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse = given
    backend = _backend(x, _BACKWARD)
    if backend == "triton":
        return triton_ops.selective_scan_backward(dy, dlast_state, kept, *given)
    if backend == "torch":
        return selective_scan_backward_chunked(dy, dlast_state, *given)
    direction = Direction(
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


@torch.library.impl("visionmamba::bidirectional_scan", "cuda")
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *given, z, state_f, state_b, scale, _ = inputs
    pairs, states = by_direction(given), (state_f, state_b)
    x, A = pairs[0], pairs[4]
    backend = _backend(x[0], _FORWARD)
    if backend == "triton":
        return triton_ops.bidirectional_scan(*inputs)
    if backend == "torch":
        return bidirectional_scan_torch(*pairs, z, states, scale, None)
    with torch.autocast("cuda", enabled=False):
        (y_f, last_f), (y_b, last_b) = bidirectional_forward(*pairs, states)
        if z is None:
            y = as_stored((y_f.float() + y_b) * scale, x[0].dtype)
        else:
            y = gate(y_f, y_b, z, scale).contiguous()
    none_f, none_b = (one.new_empty((x[0].shape[0], 0, *one.shape)) for one in A)
    return y, last_f.contiguous(), last_b.contiguous(), none_f, none_b


@torch.library.impl("visionmamba::bidirectional_scan_backward", "cuda")
def _(
    dy: Tensor,
    dlast_f: Tensor | None,
    dlast_b: Tensor | None,
    kept_f: Tensor,
    kept_b: Tensor,
    *inputs: Any,
) -> list[Tensor]:
    *given, z, state_f, state_b, scale = inputs
    pairs, states = by_direction(given), (state_f, state_b)
    x, dlast = pairs[0], (dlast_f, dlast_b)
    backend = _backend(x[0], _BACKWARD)
    if backend == "triton":
        return triton_ops.bidirectional_scan_backward(dy, *dlast, kept_f, kept_b, *inputs)
    if backend == "torch":
        return bidirectional_scan_backward_torch(dy, dlast, *pairs, z, states, scale)
    with torch.autocast("cuda", enabled=False):
        dz = dy.new_empty(0)
        if z is None:
            dscan = (dy.float() * scale).to(x[0].dtype)
        else:
            (y_f, _), (y_b, _) = bidirectional_forward(*pairs, states)
            dscan, dz = gate_gradients(dy, y_f, y_b, z, scale)
        rows = bidirectional_backward(dscan, dlast, *pairs, states)
    nothing = pairs[4][0].new_empty(0)
    columns = [
        nothing if one is None else one.contiguous()
        for pair in zip(*rows, strict=True)
        for one in pair
    ]
    return [*columns[:-2], dz.contiguous(), *columns[-2:]]
