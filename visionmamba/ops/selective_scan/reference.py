"""The selective scan one token at a time, its backward by hand: the oracle of every other backend.

Slow and plain on purpose; works in the dtype of its inputs, so float64 in gives float64 out. Not
for use in models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ReferenceGradients:
    """Gradients of every input of the scan; None where the input was None."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor


def selective_scan_reference(
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
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, d_inner) and the last state (B, d_inner, N) of the same arguments."""
    step_size = _step_size(dt, dt_bias, dt_softplus)
    states = _states(x, step_size, A, B, initial_state, reverse)
    y = _ungated(x, C, D, states)
    return (y if z is None else y * F.silu(z)), states[_order(x, reverse)[-1]]


def selective_scan_reference_backward(
    dy: Tensor,
    dlast_state: Tensor | None,
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
) -> ReferenceGradients:
    """Return the gradients given those of y and of the last state (None for zero).

    With lam_t the gradient of h_t:  lam_t = C_t dy_t + exp(dt_{t+1} A) lam_{t+1}; every other
    gradient is local in t.
    """
    step_size = _step_size(dt, dt_bias, dt_softplus)
    states = _states(x, step_size, A, B, initial_state, reverse)
    first = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    dz = None
    if z is not None:
        sigmoid = torch.sigmoid(z)
        dz = dy * _ungated(x, C, D, states) * sigmoid * (1 + z * (1 - sigmoid))
        dy = dy * F.silu(z)

    dx = torch.zeros_like(x) if D is None else dy * D
    dstep, dA = torch.zeros_like(x), torch.zeros_like(A)
    dB, dC = torch.zeros_like(B), torch.zeros_like(C)
    lam = torch.zeros_like(first) if dlast_state is None else dlast_state
    order = _order(x, reverse)
    for position in reversed(range(len(order))):
        t = order[position]
        before = first if position == 0 else states[order[position - 1]]
        step = step_size[:, t, :, None]  # (B, E, 1)
        decay = torch.exp(step * A)
        lam = lam + dy[:, t, :, None] * C[:, t, None, :]
        dC[:, t] = (dy[:, t, :, None] * states[t]).sum(1)
        dB[:, t] = (lam * step * x[:, t, :, None]).sum(1)
        dinput = (lam * B[:, t, None, :]).sum(-1)
        dx[:, t] += dinput * step_size[:, t]
        dstep[:, t] = dinput * x[:, t] + (lam * decay * before * A).sum(-1)
        dA += (lam * decay * before * step).sum(0)
        lam = decay * lam

    slope = _step_slope(dt, dt_bias, dt_softplus)
    return ReferenceGradients(
        x=dx,
        dt=dstep * slope,
        A=dA,
        B=dB,
        C=dC,
        D=None if D is None else (dy * x).sum((0, 1)),
        z=dz,
        dt_bias=None if dt_bias is None else (dstep * slope).sum((0, 1)),
        initial_state=lam,
    )


def _order(x: Tensor, reverse: bool) -> list[int]:
    tokens = range(x.shape[1])
    return list(reversed(tokens)) if reverse else list(tokens)


def _step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    dt = dt if dt_bias is None else dt + dt_bias
    return F.softplus(dt) if dt_softplus else dt


def _step_slope(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    dt = dt if dt_bias is None else dt + dt_bias
    return torch.sigmoid(dt) if dt_softplus else torch.ones_like(dt)


def _states(
    x: Tensor, step_size: Tensor, A: Tensor, B: Tensor, initial_state: Tensor | None, reverse: bool
) -> dict[int, Tensor]:
    """Return the state (B, E, N) after every token."""
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    states = {}
    for t in _order(x, reverse):
        step = step_size[:, t, :, None]
        h = torch.exp(step * A) * h + step * x[:, t, :, None] * B[:, t, None, :]
        states[t] = h
    return states


def _ungated(x: Tensor, C: Tensor, D: Tensor | None, states: dict[int, Tensor]) -> Tensor:
    y = torch.stack([(states[t] * C[:, t, None, :]).sum(-1) for t in range(x.shape[1])], dim=1)
    return y if D is None else y + D * x
