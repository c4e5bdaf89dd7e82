"""The whole bidirectional mixer as one op on GPUs: fewer launches, less kept for the backward.

It equals the separate ops that models/mixer.py spells out; `can_fuse_mixer` says where it runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionmamba.ops._checks import activation_dtype, needs_grad
from visionmamba.ops.cuda import cuda_backend
from visionmamba.ops.cuda.mixer import (
    fused_block,
    mixer_backward,
    mixer_forward,
    num_kept_states,
)
from visionmamba.ops.cuda.pack import PARAMETERS, PackedMixer, pack_mixer, sizes_of_mixer

__all__ = ["PackedMixer", "can_fuse_mixer", "fused_block", "fused_mixer", "pack_mixer"]

_D_STATE, _MAX_RANK, _MAX_TAPS = 16, 48, 8
"""What the fused kernels are made for."""


def can_fuse_mixer(hidden: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Return whether `fused_mixer` takes these: on a GPU with this package's kernels, in bfloat16,
    or in float16 where no gradient is wanted, and of sizes that the kernels are made for.

    Args:
        hidden: (B, L, D); under autocast its dtype counts.
        parameters: as in fused_mixer.
    """
    if hidden.device.type != "cuda" or hidden.numel() == 0:
        return False
    dtype = activation_dtype(hidden)
    wanted = (
        (torch.bfloat16,) if needs_grad(hidden, *parameters) else (torch.bfloat16, torch.float16)
    )
    if dtype not in wanted:
        return False
    in_weight = parameters[0]
    if not all(p.dtype == in_weight.dtype and p.is_contiguous() for p in parameters):
        return False
    sizes = sizes_of_mixer(parameters)
    return (
        sizes.d_state == _D_STATE
        and sizes.dt_rank <= _MAX_RANK
        and 2 <= sizes.d_conv <= _MAX_TAPS
        and sizes.d_inner % 16 == 0
        and sizes.d_model % 8 == 0
        and _has_kernels(hidden.device.index)
    )


def fused_mixer(hidden: Tensor, parameters: Sequence[Tensor], *, scale: float) -> Tensor:
    """Mix a sequence along its tokens in both directions (Vim, algorithm 1).

    [x | z] = hidden @ in_weight.T; in each direction u = silu(conv(x)),
    [dt_r | B | C] = u @ x_weight.T, dt = softplus(dt_r @ dt_weight.T + dt_bias), A = -exp(A_log),
    and the selective scan; then out = (scale * (sum of both) * silu(z)) @ out_weight.T.

    Args:
        hidden: (B, L, D) bfloat16 or float16; under autocast its dtype counts.
        parameters: in the order of PARAMETERS: in_weight (2E, D); forward and backward each of
            conv_weight (E, K), conv_bias (E,), x_weight (R + 2N, E), dt_weight (E, R), dt_bias
            (E,), A_log (E, N), D (E,); out_weight (D, E).
        scale: factor of the sum of both directions.

    Returns:
        (B, L, D) in hidden's dtype (autocast's inside autocast). Gradients flow to every tensor.
    """
    wants_gradients = needs_grad(hidden, *parameters)
    hidden = hidden.to(activation_dtype(hidden))
    out: Tensor
    if wants_gradients:
        out = _FusedMixer.apply(scale, hidden, *parameters)
    else:
        out = _fused_mixer(hidden, *parameters, scale, False)[0]
    return out


def _has_kernels(device: int) -> bool:
    return cuda_backend(torch.device("cuda", device)).has_kernels


# what torch.compiler.assume_constant_result does, without importing the compiler
vars(_has_kernels)["_dynamo_marked_constant"] = True


_GIVEN = ", ".join(f"Tensor {name}" for name in ("hidden", *PARAMETERS))
_KEPT = ("xz", "projected", "y", "states", "half", "single")
"""What the kernels keep for the backward, besides the arguments."""


torch.library.define(
    "visionmamba::fused_mixer",
    f"({_GIVEN}, float scale, bool save) -> ({', '.join(['Tensor'] * (1 + len(_KEPT)))})",
)
torch.library.define(
    "visionmamba::fused_mixer_backward",
    f"(Tensor dout, {', '.join(f'Tensor {name}' for name in _KEPT)}, {_GIVEN}, float scale)"
    " -> Tensor[]",
)


@torch.library.impl("visionmamba::fused_mixer", "cuda")
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Return the result and, when save, what the backward needs."""
    *parameters, scale, save = rest
    packed = pack_mixer(parameters, dtype=hidden.dtype)
    out, *kept = mixer_forward(hidden.contiguous(), packed, scale=scale, keep=save)
    if not save:
        return out, *(hidden.new_empty(0) for _ in _KEPT)
    return out, *kept, packed.half, packed.single


@torch.library.register_fake("visionmamba::fused_mixer")  # type: ignore[untyped-decorator]
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *parameters, _, save = rest
    out = hidden.new_empty(hidden.shape)
    if not save:
        return out, *(hidden.new_empty(0) for _ in _KEPT)
    sizes = sizes_of_mixer(parameters)
    batch, length, _ = hidden.shape
    half, single = sizes.packed_sizes
    return (
        out,
        hidden.new_empty(batch, length, 2 * sizes.d_inner),
        hidden.new_empty(2, batch, length, sizes.projected_width),
        hidden.new_empty(2, batch, length, sizes.d_inner),
        hidden.new_empty(num_kept_states(hidden, sizes.d_inner), dtype=torch.bfloat16),
        hidden.new_empty(half),
        hidden.new_empty(single, dtype=torch.float32),
    )


@torch.library.impl("visionmamba::fused_mixer_backward", "cuda")
def _(dout: Tensor, *rest: Any) -> list[Tensor]:
    """Return the gradients of hidden and of the parameters, in the order and dtypes given."""
    xz, projected, y, states, half, single, hidden, *parameters, scale = rest
    packed = PackedMixer(sizes_of_mixer(parameters), half, single)
    gradients = mixer_backward(
        dout, hidden.contiguous(), packed, xz, projected, y, states, scale=scale
    )
    dtype = parameters[0].dtype
    return [gradients[0], *(gradient.to(dtype).contiguous() for gradient in gradients[1:])]


@torch.library.register_fake("visionmamba::fused_mixer_backward")  # type: ignore[untyped-decorator]
def _(dout: Tensor, *rest: Any) -> list[Tensor]:
    hidden, in_weight, *pairs, out_weight = rest[len(_KEPT) : -1]
    stacked = (torch.empty_like(torch.stack(pairs[i : i + 2])) for i in range(0, len(pairs), 2))
    dhidden = hidden.new_empty(hidden.shape)
    return [dhidden, *(torch.empty_like(tensor) for tensor in (in_weight, *stacked, out_weight))]


_fused_mixer = torch.ops.visionmamba.fused_mixer.default
_fused_mixer_backward = torch.ops.visionmamba.fused_mixer_backward.default


class _FusedMixer(torch.autograd.Function):
    """The gradients of the op; 0.2 ms a call quicker than torch.library.register_autograd."""

    @staticmethod
    def forward(ctx: Any, scale: float, *tensors: Tensor) -> Tensor:
        out: Tensor
        out, *kept = _fused_mixer(*tensors, scale, True)
        ctx.scale = scale
        ctx.save_for_backward(*kept, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, din_weight, *pairs, dout_weight = _fused_mixer_backward(
            dout, *ctx.saved_tensors, ctx.scale
        )
        directions = (one for pair in pairs for one in pair.unbind(0))
        return None, dhidden, din_weight, *directions, dout_weight
