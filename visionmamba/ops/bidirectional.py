"""The core of the Vim mixer in one op: step sizes, both scans, their sum, the gate, the scale."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops._checks import (
    as_stored,
    check_dtypes_and_devices,
    check_ndim,
    check_shape,
    needs_grad,
    parameter_dtype,
    same_dtype,
)
from visionmamba.ops.cpu import cpu_backend
from visionmamba.ops.selective_scan import checkpoint_length, num_checkpoints
from visionmamba.ops.selective_scan.chunked import (
    compute_dtype,
    scan_backward,
    scan_forward,
    silu_gate_gradient,
)

_Pair = tuple[Tensor, Tensor]


@overload
def bidirectional_scan(
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    *,
    z: Tensor | None,
    scale: float = 1.0,
    initial_state: _Pair | None = None,
    return_state: Literal[False] = False,
) -> Tensor: ...


@overload
def bidirectional_scan(
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    *,
    z: Tensor | None,
    scale: float = 1.0,
    initial_state: _Pair | None = None,
    return_state: Literal[True],
) -> tuple[Tensor, _Pair]: ...


def bidirectional_scan(
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    *,
    z: Tensor | None,
    scale: float = 1.0,
    initial_state: _Pair | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, _Pair]:
    """Return scale * (scan of direction 0 + scan of direction 1) * silu(z).

    Direction 0 scans from the first token to the last, direction 1 from the last to the first;
    nothing is flipped in memory. In each, [dt_r | B | C] = projected and
    dt = softplus(dt_r @ dt_weight.T + dt_bias). The gate is applied to the sum, which equals
    gating each direction as the published code does. A pair may hold one tensor twice.

    Args:
        x: two (B, L, E) float32, bfloat16 or float16.
        projected: two (B, L, R + 2N), columns in the order dt_r (R), B (N), C (N).
        dt_weight: two (E, R) float32.
        dt_bias: two (E,) float32.
        A: two (E, N) float32, negative.
        D: two (E,) float32, the direct path of each direction.
        z: (B, L, E), the gate; a strided view whose last axis is contiguous is read in place;
            None for none.
        scale: factor of the sum.
        initial_state: two (B, E, N) float32, entering before token 0 and behind token L-1; zeros
            when None.
        return_state: return the two last states too.

    Returns:
        y (B, L, E) in x's dtype (float16 stops at 65504 instead of infinity); with return_state
        also the pair of last states (B, E, N) float32, after token L-1 and after token 0.
        Gradients flow through all of them and to every tensor given.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names argument and direction.
    """
    op = "bidirectional_scan"
    for name, pair in (
        ("x", x),
        ("projected", projected),
        ("dt_weight", dt_weight),
        ("dt_bias", dt_bias),
        ("A", A),
        ("D", D),
        ("initial_state", initial_state),
    ):
        if pair is not None and len(pair) != 2:
            raise ValueError(
                f"{op}: {name} must hold one tensor for each of the 2 directions, got {len(pair)}; "
                f"pass {name}=(forward, backward)"
            )
    check_ndim(op, "x[0]", x[0], "(B, L, E)", 3)
    check_ndim(op, "A[0]", A[0], "(E, N)", 2)
    check_ndim(op, "dt_weight[0]", dt_weight[0], "(E, R)", 2)
    batch, length, d_inner = x[0].shape
    d_state, dt_rank = A[0].shape[1], dt_weight[0].shape[1]
    width = dt_rank + 2 * d_state
    named: list[tuple[str, Tensor | None]] = []
    for i in (0, 1):
        for name, tensor, axes, wanted in (
            (f"x[{i}]", x[i], "(B, L, E)", (batch, length, d_inner)),
            (f"projected[{i}]", projected[i], "(B, L, R + 2N)", (batch, length, width)),
            (f"dt_weight[{i}]", dt_weight[i], "(E, R)", (d_inner, dt_rank)),
            (f"dt_bias[{i}]", dt_bias[i], "(E,)", (d_inner,)),
            (f"A[{i}]", A[i], "(E, N)", (d_inner, d_state)),
            (f"D[{i}]", D[i], "(E,)", (d_inner,)),
        ):
            check_shape(op, name, tensor, axes, wanted)
            named.append((name, tensor))
        if initial_state is not None:
            name, wanted = f"initial_state[{i}]", (batch, d_inner, d_state)
            check_shape(op, name, initial_state[i], "(B, E, N)", wanted)
            named.append((name, initial_state[i]))
    if z is not None:
        check_shape(op, "z", z, "(B, L, E)", (batch, length, d_inner))
        named.append(("z", z))
    check_dtypes_and_devices(op, named)

    dtype = x[0].dtype
    if not same_dtype(*x, *projected, *(() if z is None else (z,))):
        x = x[0].float(), x[1].float()
        projected = projected[0].float(), projected[1].float()
        z = None if z is None else z.float()
    parameter = parameter_dtype(x[0])
    tensors: list[Tensor | None] = [*x, *projected]
    tensors += [tensor.to(parameter) for tensor in (*dt_weight, *dt_bias, *A, *D)]
    tensors.append(z)
    if initial_state is None:
        tensors += [None, None]
    else:
        tensors += [tensor.to(parameter) for tensor in initial_state]
    y, last_f, last_b, _, _ = _bidirectional_scan(*tensors, scale, needs_grad(*tensors))
    y = as_stored(y, dtype)
    return (y, (last_f, last_b)) if return_state else y


def bidirectional_scan_torch(
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    z: Tensor | None,
    initial_state: tuple[Tensor | None, Tensor | None],
    scale: float,
    every: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, the two last states and the two sets of checkpoints by plain PyTorch operations."""
    with torch.autocast(x[0].device.type, enabled=False):
        dtype = compute_dtype(x[0])
        total, last, kept = torch.zeros((), dtype=dtype, device=x[0].device), [], []
        for i in (0, 1):
            dt_r, B, C = _split(projected[i].to(dtype), dt_weight[i], A[i])
            y, last_state, checkpoints = scan_forward(
                x[i].to(dtype),
                F.softplus(F.linear(dt_r, dt_weight[i], dt_bias[i])),
                A[i],
                B,
                C,
                D[i],
                initial_state[i],
                reverse=i == 1,
                checkpoint_length=every,
            )
            total = total + y
            last.append(last_state.clone())
            kept.append(checkpoints)
        total = total * scale
        if z is not None:
            total = total * F.silu(z.to(dtype))
        return as_stored(total, x[0].dtype), last[0], last[1], kept[0], kept[1]


def bidirectional_scan_backward_torch(
    dy: Tensor,
    dlast_state: tuple[Tensor | None, Tensor | None],
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    z: Tensor | None,
    initial_state: tuple[Tensor | None, Tensor | None],
    scale: float,
) -> list[Tensor]:
    """Return the gradients in the op's order of inputs by plain PyTorch operations."""
    with torch.autocast(x[0].device.type, enabled=False):
        dtype = compute_dtype(x[0])
        dscaled = dy.to(dtype) * scale
        dscan = dscaled if z is None else dscaled * F.silu(z.to(dtype))
        total = torch.zeros((), dtype=dtype, device=dy.device)
        rows = []
        for i in (0, 1):
            dt_r, B, C = _split(projected[i].to(dtype), dt_weight[i], A[i])
            raw = F.linear(dt_r, dt_weight[i], dt_bias[i])
            grads = scan_backward(
                dscan,
                dlast_state[i],
                x[i].to(dtype),
                F.softplus(raw),
                A[i],
                B,
                C,
                D[i],
                initial_state[i],
                reverse=i == 1,
            )
            total = total + grads.y
            draw = grads.ddt * torch.sigmoid(raw)
            dprojected = torch.cat([draw @ dt_weight[i], grads.dB, grads.dC], dim=-1)
            rows.append(
                (
                    grads.dx.to(x[i].dtype),
                    dprojected.to(projected[i].dtype),
                    draw.flatten(0, 1).T @ dt_r.flatten(0, 1),
                    draw.sum((0, 1)),
                    grads.dA,
                    grads.dD,
                    A[i].new_empty(0) if initial_state[i] is None else grads.dinitial_state,
                )
            )
        columns = [tensor for pair in zip(*rows, strict=True) for tensor in pair]
        dz = dy.new_empty(0) if z is None else silu_gate_gradient(dscaled, total, z)
        return [*columns[:-2], dz, *columns[-2:]]


def by_direction(t: Sequence[Tensor]) -> tuple[_Pair, _Pair, _Pair, _Pair, _Pair, _Pair]:
    """Return x, projected, dt_weight, dt_bias, A and D by pairs, given one after the other."""
    return (t[0], t[1]), (t[2], t[3]), (t[4], t[5]), (t[6], t[7]), (t[8], t[9]), (t[10], t[11])


def _split(projected: Tensor, dt_weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dt_r, B, C = torch.split(projected, [dt_weight.shape[1], A.shape[1], A.shape[1]], dim=-1)
    return dt_r, B, C


@torch.library.custom_op("visionmamba::bidirectional_scan", mutates_args=())
def _bidirectional_scan(
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
    """Return y, the last states and, when save_states, both directions' checkpoints."""
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
    if x_f.device.type == "cpu" and x_f.dtype != torch.float64:
        kernels = cpu_backend().kernels
        if kernels is not None:
            return kernels.bidirectional_scan(*inputs, save_states)
    every = checkpoint_length(x_f.device) if save_states else None
    return bidirectional_scan_torch(*inputs, every)


@_bidirectional_scan.register_fake
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
    batch, length, d_inner = x_f.shape
    checkpoints = num_checkpoints(length, x_f.device) if save_states else 0
    state, kept = (batch, *A_f.shape), (batch, checkpoints, *A_f.shape)
    y = x_f.new_empty(batch, length, d_inner)
    return y, A_f.new_empty(state), A_f.new_empty(state), A_f.new_empty(kept), A_f.new_empty(kept)


@torch.library.custom_op("visionmamba::bidirectional_scan_backward", mutates_args=())
def _bidirectional_scan_backward(
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
    if x_f.device.type == "cpu" and x_f.dtype != torch.float64:
        kernels = cpu_backend().kernels
        if kernels is not None:
            checkpoints = checkpoints_f, checkpoints_b
            if checkpoints_f.shape[1] == 0:
                _, _, _, *kept = kernels.bidirectional_scan(*inputs, True)
                checkpoints = kept[0], kept[1]
            return kernels.bidirectional_scan_backward(dy, dlast_state, checkpoints, *inputs)
    return bidirectional_scan_backward_torch(dy, dlast_state, *inputs)


@_bidirectional_scan_backward.register_fake
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
    given = [x_f, x_b, projected_f, projected_b, dt_weight_f, dt_weight_b, dt_bias_f, dt_bias_b]
    given += [A_f, A_b, D_f, D_b]
    optional = (
        dy.new_empty(0 if z is None else z.shape),
        A_f.new_empty(0 if initial_state_f is None else initial_state_f.shape),
        A_f.new_empty(0 if initial_state_b is None else initial_state_b.shape),
    )
    return [*(tensor.new_empty(tensor.shape) for tensor in given), *optional]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:], *tensors)


def _backward(
    ctx: Any,
    dy: Tensor | None,
    dlast_f: Tensor | None,
    dlast_b: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    kept_f, kept_b, *tensors = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    grads = _bidirectional_scan_backward(dy, dlast_f, dlast_b, kept_f, kept_b, *tensors, ctx.scale)
    given = zip(grads, tensors, strict=True)
    return (*(None if tensor is None else grad for grad, tensor in given), None, None)


_bidirectional_scan.register_autograd(_backward, setup_context=_setup_context)
