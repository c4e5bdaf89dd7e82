"""The bidirectional mixer: one DirectionalSSM used twice around a shared gate and output.

Knows sequences only, no pictures. Built on visionmamba.ops.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionmamba.models.config import Initialization, MixerKind
from visionmamba.ops import (
    bidirectional_conv1d,
    bidirectional_scan,
    can_fuse_mixer,
    causal_conv1d,
    fused_mixer,
    selective_scan,
)

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4


class DirectionalSSM(nn.Module):
    """What one reading direction owns: convolution, input-dependent projections, A and D.

    Args:
        d_inner: channels E.
        d_state: states N of a channel.
        d_conv: taps K of the convolution.
        dt_rank: rank R of the step-size projection.
        zero_dt_bias: start with dt bias 0 instead of log-uniform steps in [0.001, 0.1].
    """

    def __init__(
        self, d_inner: int, *, d_state: int, d_conv: int, dt_rank: int, zero_dt_bias: bool = False
    ) -> None:
        super().__init__()
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.zero_dt_bias = zero_dt_bias
        self.conv_weight = nn.Parameter(torch.empty(d_inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_inner))
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)  # rows: dt, B, C
        self.dt_weight = nn.Parameter(torch.empty(d_inner, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(d_inner))
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.x_proj.reset_parameters()
        bound = 1 / math.sqrt(self.conv_weight.shape[1])
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        bound = 1 / math.sqrt(self.dt_rank)
        nn.init.uniform_(self.dt_weight, -bound, bound)
        with torch.no_grad():
            if self.zero_dt_bias:
                self.dt_bias.zero_()
            else:
                log_dt = torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX))
                dt = log_dt.exp().clamp(min=DT_FLOOR)
                self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            reset_A_log(self.A_log)
            self.D.fill_(1.0)

    @property
    def A(self) -> Tensor:
        """(E, N) float32, negative."""
        return decay_rates(self.A_log)

    def convolve(self, x: Tensor) -> Tensor:
        """Return SiLU of the causal depthwise convolution of (B, L, E), from the first token on."""
        return causal_conv1d(x, self.conv_weight, self.conv_bias, activation="silu")


def reset_A_log(A_log: Tensor) -> None:
    """Fill (E, N) with log(1..N) in every row (S4D-real), in place."""
    states = torch.arange(1, A_log.shape[1] + 1, dtype=torch.float32, device=A_log.device)
    A_log.copy_(states.log().expand_as(A_log))


def decay_rates(A_log: Tensor) -> Tensor:
    """Return A = -exp(A_log), in float32 at least."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


class BidirectionalMixer(nn.Module):
    """Mix a sequence (B, L, D) along L in both directions in linear time (paper, algorithm 1).

    x and a gate z come from one projection; each direction convolves x, derives dt, B and C from
    the result and scans; the sum of both is gated by SiLU(z), halved and projected back.

    Args:
        d_model: width D of the tokens.
        d_state, d_conv, expand, dt_rank: as in VimConfig; dt_rank None means ceil(D / 16).
        kind: "ssm+conv" (published v2), "ssm" (v1: both directions share all but A), "none".
        halve_directions: halve the sum of both directions ("ssm+conv" only, as published).
        layer_scale: initial value of a learned factor per output channel, or None.
        initialization: "published" starts the backward dt bias at 0, "symmetric" like the forward.
        num_layers: blocks in the net; the output projection starts smaller by its square root.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        kind: MixerKind = "ssm+conv",
        halve_directions: bool = True,
        layer_scale: float | None = None,
        initialization: Initialization = "published",
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        d_inner = expand * d_model
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.kind = kind
        self.scale = 0.5 if halve_directions and kind == "ssm+conv" else 1.0
        self.initial_layer_scale = layer_scale
        self.num_layers = num_layers
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)  # rows: x, z
        self.directions = nn.ModuleList(
            DirectionalSSM(
                d_inner,
                d_state=d_state,
                d_conv=d_conv,
                dt_rank=rank,
                zero_dt_bias=backward and initialization == "published",
            )
            for backward in ((False, True) if kind == "ssm+conv" else (False,))
        )
        self.backward_A_log = nn.Parameter(torch.empty(d_inner, d_state)) if kind == "ssm" else None
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.layer_scale = nn.Parameter(torch.empty(d_model)) if layer_scale is not None else None
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(self.num_layers)
            if self.backward_A_log is not None:
                reset_A_log(self.backward_A_log)
            if self.layer_scale is not None and self.initial_layer_scale is not None:
                self.layer_scale.fill_(self.initial_layer_scale)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, L, D) for (B, L, D), in the same dtype (autocast's inside autocast)."""
        out = self._mix(hidden)
        if out.dtype == torch.float16:
            out = out.clamp(-65504, 65504)  # a sum past float16's range must not become infinite
        return out if self.layer_scale is None else (out * self.layer_scale).to(out.dtype)

    def _mix(self, hidden: Tensor) -> Tensor:
        parameters = self.parameters_to_fuse()
        if parameters is not None and can_fuse_mixer(hidden, parameters):
            return fused_mixer(hidden, parameters, scale=self.scale)
        x, z = self.in_proj(hidden).chunk(2, dim=-1)  # (B, L, E) each, views
        y = self._scan_forward_only(x, z) if self.kind == "none" else self._scan_both(x, z)
        out: Tensor = self.out_proj(y)
        return out

    def parameters_to_fuse(self) -> list[Tensor] | None:
        """Return what ops.fused_mixer takes, or None where this mixer is another one.

        So it is for other kinds, and when a projection was replaced, by an adapter for example.
        """
        directions = [one for one in self.directions if isinstance(one, DirectionalSSM)]
        linears = (self.in_proj, self.out_proj, *(one.x_proj for one in directions))
        if self.kind != "ssm+conv" or any(type(linear) is not nn.Linear for linear in linears):
            return None
        pairs = [
            (
                one.conv_weight,
                one.conv_bias,
                one.x_proj.weight,
                one.dt_weight,
                one.dt_bias,
                one.A_log,
                one.D,
            )
            for one in directions
        ]
        forward_then_backward = [tensor for pair in zip(*pairs, strict=True) for tensor in pair]
        return [self.in_proj.weight, *forward_then_backward, self.out_proj.weight]

    def _scan_both(self, x: Tensor, z: Tensor) -> Tensor:
        forward, backward = self.directions[0], self.directions[-1]
        assert isinstance(forward, DirectionalSSM) and isinstance(backward, DirectionalSSM)
        if self.backward_A_log is not None:  # published v1 shares all but A
            u = forward.convolve(x)
            us, projected = (u, u), (forward.x_proj(u),) * 2
            backward_A = decay_rates(self.backward_A_log)
        else:
            us = bidirectional_conv1d(
                x,
                (forward.conv_weight, backward.conv_weight),
                (forward.conv_bias, backward.conv_bias),
                activation="silu",
            )
            projected = forward.x_proj(us[0]), backward.x_proj(us[1])
            backward_A = backward.A
        return bidirectional_scan(
            us,
            projected,
            (forward.dt_weight, backward.dt_weight),
            (forward.dt_bias, backward.dt_bias),
            (forward.A, backward_A),
            (forward.D, backward.D),
            z=z,
            scale=self.scale,
        )

    def _scan_forward_only(self, x: Tensor, z: Tensor) -> Tensor:
        ssm = self.directions[0]
        assert isinstance(ssm, DirectionalSSM)
        u = ssm.convolve(x)
        sizes = [ssm.dt_rank, ssm.d_state, ssm.d_state]
        low_rank_dt, B, C = torch.split(ssm.x_proj(u), sizes, dim=-1)
        dt = F.linear(low_rank_dt, ssm.dt_weight.to(low_rank_dt.dtype))
        return selective_scan(u, dt, ssm.A, B, C, ssm.D, z=z, dt_bias=ssm.dt_bias, dt_softplus=True)
