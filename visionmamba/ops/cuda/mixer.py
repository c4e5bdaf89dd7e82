"""The whole bidirectional mixer on the GPU: which kernels and matrix products run, in which order.

Forward: one product for x and z, both convolutions and their projections, both scans with the step
sizes inside, the gate, one product. The backward makes the convolutions' results and the states
again, because both are cheaper to make than to keep.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visionmamba.ops.cuda.conv import conv_backward, conv_forward
from visionmamba.ops.cuda.conv_project import conv_project, supports_conv_project
from visionmamba.ops.cuda.driver import make_context_current
from visionmamba.ops.cuda.fused_scan import (
    mixer_scan_backward,
    mixer_scan_forward,
    num_state_values,
)
from visionmamba.ops.cuda.gate import gate_backward, gate_forward
from visionmamba.ops.cuda.norm import add_rms_norm
from visionmamba.ops.cuda.pack import PackedMixer
from visionmamba.ops.cuda.projections import (
    gate_project,
    norm_project,
    supports_gate_project,
    supports_norm_project,
)
from visionmamba.ops.cuda.scan_launch import STATES

_TOKENS_WITH_STATES = 1 << 15


def mixer_forward(
    hidden: Tensor, packed: PackedMixer, *, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the mixer's output (B, L, D), and xz, projected, y and states for its backward.

    Args:
        hidden: (B, L, D) contiguous, in the dtype of the packed weights.
        packed: the parameters.
        scale: factor of the sum of both directions.
        keep: whether a backward follows; y then holds the sum of both scans and the gated sum,
            and states has num_kept_states values.
    """
    d_inner = packed.sizes.d_inner
    xz = F.linear(hidden, packed.in_weight)  # (B, L, 2E)
    x, z = xz[..., :d_inner], xz[..., d_inner:]
    u, projected = _convolve_and_project(x, packed)
    num_kept = num_kept_states(hidden, d_inner) if keep else 0
    states = hidden.new_empty(num_kept, dtype=torch.bfloat16)
    y = mixer_scan_forward(
        u,
        projected,
        packed.dt_weight,
        packed.dt_bias,
        packed.A,
        packed.D,
        rank=packed.sizes.dt_rank,
        out=u,
        states=states if len(states) else None,
    )
    gated = gate_forward(y, z, scale, keep_sum=keep)
    return F.linear(gated, packed.out_weight), xz, projected, y, states


def num_kept_states(hidden: Tensor, d_inner: int) -> int:
    """Return how many values of the scans' states a forward of hidden keeps for its backward.

    3 KiB a token of Vim-Ti save a fifth of the backward's time, more where few sequences leave
    the GPU half empty: kept for few tokens and for few sequences.
    """
    batch, length, _ = hidden.shape
    tiles = 2 * batch * (d_inner // STATES)
    multiprocessors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    is_small = batch * length <= _TOKENS_WITH_STATES or tiles < 2 * multiprocessors
    return num_state_values(batch, length, d_inner) if is_small else 0


def _project(u: Tensor, weight: Tensor) -> Tensor:
    """Return u (2, B, L, E) times weight (2, P, E) of each direction, (2, B, L, P)."""
    product = torch.bmm(u.flatten(1, 2), weight.transpose(1, 2))
    return product.view(*u.shape[:3], weight.shape[1])


def mixer_backward(
    dout: Tensor,
    hidden: Tensor,
    packed: PackedMixer,
    xz: Tensor,
    projected: Tensor,
    y: Tensor,
    states: Tensor,
    *,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of hidden, in its dtype, and of the parameters, float32.

    They come in the order of PARAMETERS, those of a pair as one: (2, ...).

    Args:
        dout: (B, L, D), the gradient of the output.
        hidden, packed, xz, projected, y, states: what the forward was given and returned.
    """
    sizes = packed.sizes
    d_inner, d_state, rank = sizes.d_inner, sizes.d_state, sizes.dt_rank
    x, z = xz[..., :d_inner], xz[..., d_inner:]
    make_context_current(dout.get_device())
    dout = dout.contiguous()
    dgated = dout @ packed.out_weight
    dout_weight = weight_gradient(dout, y[1])
    dxz = torch.empty_like(xz)
    dscan = gate_backward(dgated, y[0], z, scale, dz=dxz[..., d_inner:])
    del dgated
    u = conv_forward(x, packed.conv_weight, packed.conv_bias, (False, True), True)
    du, dprojected, ddt_weight, ddt_bias, dA, dD = mixer_scan_backward(
        dscan,
        u,
        projected,
        packed.dt_weight,
        packed.dt_bias,
        packed.A,
        packed.D,
        rank=rank,
        states=states if len(states) else None,
    )
    dprojected = dprojected.to(u.dtype).flatten(1, 2)  # (2, B L, P)
    width = rank + 2 * d_state
    dx_weight = u.new_empty(2, width, d_inner, dtype=torch.float32)
    for i in (0, 1):  # one by one: cuBLAS splits the sum over tokens of a single product alone
        weight_gradient(dprojected[i, :, :width], u[i], out=dx_weight[i])
    du.flatten(1, 2).baddbmm_(dprojected, packed.x_weight)
    _, dconv_weight, dconv_bias = conv_backward(
        (du[0], du[1]),
        x,
        packed.conv_weight,
        packed.conv_bias,
        (False, True),
        True,
        dx=dxz[..., :d_inner],
    )
    return [
        dxz @ packed.in_weight,
        weight_gradient(dxz, hidden),
        dconv_weight,
        dconv_bias,
        dx_weight,
        ddt_weight,
        ddt_bias,
        dA * packed.A,
        dD,
        dout_weight,
    ]


def weight_gradient(dy: Tensor, x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return the float32 gradient (rows, columns) of a weight W in y = x W^T.

    Args:
        dy: (..., rows), of all tokens.
        x: (..., columns), of the same tokens and dtype.
        out: takes the result.
    """
    factors = dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1])
    if out is None:
        return torch.mm(*factors, out_dtype=torch.float32)
    return torch.mm(*factors, out_dtype=torch.float32, out=out)


def fused_block(
    branch: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    packed: PackedMixer,
    *,
    scale: float,
    layer_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mixer's output (B, L, D) and the new residual stream (B, L, D) float32.

    For inference: norm, mixer and their projections in as few launches as there are kernels for.
    Both inputs are given up: the results may lie in their memory.

    Args:
        branch: (B, L, D) contiguous, in the dtype of the packed weights.
        residual: (B, L, D) float32 contiguous, or None before the first block.
        norm_weight: (D,) float32.
        eps: added to the mean square.
        packed: the mixer's parameters.
        scale: factor of the sum of both directions.
        layer_scale: (D,) float32, factors of the output, or None.
    """
    d_inner = packed.sizes.d_inner
    if supports_norm_project(branch, packed.in_weight):
        xz, total = norm_project(branch, residual, norm_weight, eps, packed.in_weight)
    else:
        total = torch.empty_like(branch, dtype=torch.float32) if residual is None else residual
        hidden, _ = add_rms_norm(branch, residual, norm_weight, eps, total=total)
        xz = F.linear(hidden, packed.in_weight)
        del hidden
    x, z = xz[..., :d_inner], xz[..., d_inner:]
    u, projected = _convolve_and_project(x, packed, scratch=branch)
    y = mixer_scan_forward(
        u,
        projected,
        packed.dt_weight,
        packed.dt_bias,
        packed.A,
        packed.D,
        rank=packed.sizes.dt_rank,
        out=u,
    )
    del projected
    if supports_gate_project(y, z, packed.out_weight):
        return gate_project(y, z, scale, packed.out_weight, layer_scale, out=branch), total
    out = F.linear(gate_forward(y, z, scale, keep_sum=False), packed.out_weight)
    return out if layer_scale is None else out * layer_scale.to(out.dtype), total


def _convolve_and_project(
    x: Tensor, packed: PackedMixer, *, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return u (2, B, L, E) and projected (2, B, L, P) of x (B, L, E).

    Projected may lie in the memory of scratch, a contiguous tensor in x's dtype.
    """
    if supports_conv_project(x, packed.conv_weight, packed.x_weight):
        weights = packed.conv_weight, packed.conv_bias, packed.x_weight
        shape = (2, *x.shape[:2], packed.x_weight.shape[1])
        size = math.prod(shape)
        if scratch is None or scratch.numel() < size:
            return conv_project(x, *weights)
        return conv_project(x, *weights, projected=scratch.view(-1)[:size].view(shape))
    u = conv_forward(x, packed.conv_weight, packed.conv_bias, (False, True), True)
    return u, _project(u, packed.x_weight)
