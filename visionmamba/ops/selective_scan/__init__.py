"""The selective scan: the checked public face, the torch.library op, its fake and its gradients.

Devices attach their kernels to the two ops below (`register_kernel`); without one the PyTorch path
of chunked.py runs.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from visionmamba.ops._checks import (
    as_stored,
    check_dtypes_and_devices,
    check_ndim,
    check_shape,
    needs_grad,
    parameter_dtype,
    same_dtype,
)
from visionmamba.ops.cpu import CHECKPOINT_LENGTH, cpu_backend
from visionmamba.ops.selective_scan.chunked import (
    selective_scan_backward_chunked,
    selective_scan_chunked,
)

__all__ = ["checkpoint_length", "num_checkpoints", "selective_scan"]


@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[False] = False,
) -> Tensor: ...


@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective state-space recurrence along the sequence.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = C_t h_t + D x_t,  then y * silu(z).
    (Mamba's selective SSM: A by zero-order hold, B by Euler's step.)

    Args:
        x: (B, L, d_inner) float32, bfloat16 or float16; the recurrence itself runs in float32.
            A strided view whose last axis is contiguous, such as xz[..., :d_inner], is read in
            place.
        dt: (B, L, d_inner); dt_bias is added, then softplus when dt_softplus.
        A: (d_inner, N) float32, negative.
        B: (B, L, N).
        C: (B, L, N).
        D: (d_inner,) float32, the direct path; None for none.
        z: (B, L, d_inner), the gate; None for none.
        dt_bias: (d_inner,) float32.
        dt_softplus: take softplus(dt + dt_bias) as the step size.
        initial_state: (B, d_inner, N) float32; zeros when None.
        reverse: scan from token L-1 to 0; initial_state then enters behind token L-1.
        return_state: return the last state too.

    Returns:
        y (B, L, d_inner) in x's dtype (float16 stops at 65504 instead of infinity); with
        return_state also the last state (B, d_inner, N) float32. Gradients flow through both and
        to every tensor given. If all tensors are float64, so is the computation (in PyTorch).

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument, what it
            wanted, what it got and the remedy.
    """
    op = "selective_scan"
    check_ndim(op, "x", x, "(B, L, d_inner)", 3)
    check_ndim(op, "A", A, "(d_inner, N)", 2)
    batch, length, d_inner = x.shape
    d_state = A.shape[1]
    for name, tensor, axes, wanted in (
        ("dt", dt, "(B, L, d_inner)", (batch, length, d_inner)),
        ("A", A, "(d_inner, N)", (d_inner, d_state)),
        ("B", B, "(B, L, N)", (batch, length, d_state)),
        ("C", C, "(B, L, N)", (batch, length, d_state)),
        ("D", D, "(d_inner,)", (d_inner,)),
        ("z", z, "(B, L, d_inner)", (batch, length, d_inner)),
        ("dt_bias", dt_bias, "(d_inner,)", (d_inner,)),
        ("initial_state", initial_state, "(B, d_inner, N)", (batch, d_inner, d_state)),
    ):
        if tensor is not None:
            check_shape(op, name, tensor, axes, wanted)
    check_dtypes_and_devices(
        op,
        (
            ("x", x),
            ("dt", dt),
            ("A", A),
            ("B", B),
            ("C", C),
            ("D", D),
            ("z", z),
            ("dt_bias", dt_bias),
            ("initial_state", initial_state),
        ),
    )
    dtype = x.dtype
    if not same_dtype(x, dt, B, C, *(() if z is None else (z,))):
        x, dt, B, C = x.float(), dt.float(), B.float(), C.float()
        z = None if z is None else z.float()
    y, last_state, _ = _selective_scan(
        x,
        dt,
        A.to(parameter_dtype(x)),
        B,
        C,
        _as_parameter(D, x),
        z,
        _as_parameter(dt_bias, x),
        _as_parameter(initial_state, x),
        dt_softplus,
        reverse,
        needs_grad(x, dt, A, B, C, D, z, dt_bias, initial_state),
    )
    y = as_stored(y, dtype)
    return (y, last_state) if return_state else y


def checkpoint_length(device: torch.device) -> int | None:
    """Return after how many tokens a scan on this device stores its state for the backward.

    None where the backward runs the forward again instead of storing anything.
    """
    return CHECKPOINT_LENGTH if device.type == "cpu" else None


def num_checkpoints(length: int, device: torch.device) -> int:
    """Return how many states a forward scan over `length` tokens stores for the backward."""
    every = checkpoint_length(device)
    return 0 if every is None else (length + every - 1) // every


def _as_parameter(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(parameter_dtype(x))


@torch.library.custom_op("visionmamba::selective_scan", mutates_args=())
def _selective_scan(
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
    """Return y, the last state and, when save_states, the checkpoints.

    Checkpoints are the states that enter every checkpoint_length tokens; how their elements lie is
    known only to the backward of the same backend.
    """
    if x.device.type == "cpu" and x.dtype != torch.float64:
        kernels = cpu_backend().kernels
        if kernels is not None:
            return kernels.selective_scan(
                x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, save_states
            )
    every = checkpoint_length(x.device) if save_states else None
    return selective_scan_chunked(
        x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, every
    )


@_selective_scan.register_fake
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
    batch, length, d_inner = x.shape
    checkpoints = num_checkpoints(length, x.device) if save_states else 0
    return (
        x.new_empty(batch, length, d_inner),
        A.new_empty(batch, d_inner, A.shape[1]),
        A.new_empty(batch, checkpoints, d_inner, A.shape[1]),
    )


@torch.library.custom_op("visionmamba::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
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
    if x.device.type == "cpu" and x.dtype != torch.float64:
        kernels = cpu_backend().kernels
        if kernels is not None:
            inputs = x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse
            if checkpoints.shape[1] == 0:
                checkpoints = kernels.selective_scan(*inputs, True)[2]
            return kernels.selective_scan_backward(dy, dlast_state, checkpoints, *inputs)
    return selective_scan_backward_chunked(
        dy, dlast_state, x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse
    )


@_selective_scan_backward.register_fake
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
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        A.new_empty(0 if D is None else D.shape[0]),
        x.new_empty(0) if z is None else z.new_empty(z.shape),
        A.new_empty(0 if dt_bias is None else dt_bias.shape[0]),
        A.new_empty(0) if initial_state is None else A.new_empty(initial_state.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.dt_softplus, ctx.reverse, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *tensors)


def _backward(
    ctx: Any, dy: Tensor | None, dlast_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    checkpoints, *tensors = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    grads = _selective_scan_backward(
        dy, dlast_state, checkpoints, *tensors, ctx.dt_softplus, ctx.reverse
    )
    given = zip(grads, tensors, strict=True)
    return (*(None if tensor is None else grad for grad, tensor in given), None, None, None)


_selective_scan.register_autograd(_backward, setup_context=_setup_context)
