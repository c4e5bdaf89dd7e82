"""The core of the Vim mixer from two Triton scans: step sizes, both scans, sum, gate, scale."""

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops.triton.scan import selective_scan_backward_triton, selective_scan_triton

_Pair = tuple[Tensor, Tensor]


def bidirectional_scan_triton(
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    z: Tensor | None,
    initial_state: tuple[Tensor | None, Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the two last states; the second scan adds the first, scales and gates."""
    with torch.autocast(x[0].device.type, enabled=False):
        dt, B, C = _step_sizes(projected[0], dt_weight[0], A[0])
        first, last_f = selective_scan_triton(
            *(x[0], dt, A[0], B, C, D[0], None, dt_bias[0], initial_state[0], True, False)
        )
        dt, B, C = _step_sizes(projected[1], dt_weight[1], A[1])
        y, last_b = selective_scan_triton(
            *(x[1], dt, A[1], B, C, D[1], z, dt_bias[1], initial_state[1], True, True),
            other=first,
            scale=scale,
        )
    return y, last_f, last_b


def bidirectional_scan_backward_triton(
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
    """Return the gradients in the op's order of inputs, empty for those None."""
    rows = []
    dz = []
    with torch.autocast(x[0].device.type, enabled=False):
        for i in (0, 1):
            dt, B, C = _step_sizes(projected[i], dt_weight[i], A[i])
            dx, ddt, dA, dB, dC, dD, gate_gradient, ddt_bias, dinitial = (
                selective_scan_backward_triton(
                    *(dy, dlast_state[i], x[i], dt, A[i], B, C, D[i], z, dt_bias[i]),
                    *(initial_state[i], True, i == 1),
                    scale=scale,
                )
            )
            dz.append(gate_gradient)
            weight = dt_weight[i].to(ddt.dtype)
            dt_r = projected[i][..., : weight.shape[1]]
            dweight = (ddt.flatten(0, 1).T @ dt_r.flatten(0, 1)).float()
            dprojected = torch.cat([ddt @ weight, dB, dC], dim=-1)
            rows.append((dx, dprojected, dweight, ddt_bias, dA, dD, dinitial))
    columns = [tensor for pair in zip(*rows, strict=True) for tensor in pair]
    return [*columns[:-2], dz[0] + dz[1], *columns[-2:]]


def _step_sizes(projected: Tensor, dt_weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the step sizes before bias and softplus, B and C."""
    sizes = [dt_weight.shape[1], A.shape[1], A.shape[1]]
    dt_r, B, C = torch.split(projected, sizes, dim=-1)
    return F.linear(dt_r, dt_weight.to(dt_r.dtype)), B, C
