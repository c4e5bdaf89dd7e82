"""Depthwise convolutions over the tokens before or behind, with SiLU fused: faces and ops."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops._checks import (
    as_stored,
    check_dtypes_and_devices,
    check_ndim,
    check_shape,
    parameter_dtype,
)
from visionmamba.ops.cpu import cpu_backend


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    reverse: bool = False,
    activation: Literal["silu"] | None = None,
) -> Tensor:
    """Convolve every channel along the tokens, each token seeing itself and the K - 1 before it.

    y_t = act(bias + sum_k weight[:, k] x_{t-K+1+k}), zeros outside; with reverse the K - 1 tokens
    behind are seen, y_t = act(bias + sum_k weight[:, k] x_{t+K-1-k}): flip(conv(flip(x))).

    Args:
        x: (B, L, E) float32, bfloat16 or float16; a strided view whose last axis is contiguous is
            read in place.
        weight: (E, K) float32.
        bias: (E,) float32, or None.
        reverse: look at the tokens behind instead of the ones before.
        activation: "silu" or None.

    Returns:
        y (B, L, E) in x's dtype, computed in float32 (float16 stops at 65504 instead of infinity).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the activation is unknown.
    """
    _check("causal_conv1d", x, (("weight", weight),), (("bias", bias),), activation)
    dtype = parameter_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    y: Tensor = _causal_conv1d(x, weight.to(dtype), bias, reverse, activation == "silu")
    return y


def bidirectional_conv1d(
    x: Tensor,
    weight: tuple[Tensor, Tensor],
    bias: tuple[Tensor, Tensor] | None,
    *,
    activation: Literal["silu"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `causal_conv1d` of x by the first weights and, reversed, by the second.

    x is read once, and its gradient written once.

    Args:
        x: (B, L, E) float32, bfloat16 or float16; a strided view whose last axis is contiguous is
            read in place.
        weight: two (E, K) float32, forward and reversed.
        bias: two (E,) float32, or None.
        activation: "silu" or None.

    Returns:
        Two (B, L, E) in x's dtype, computed in float32 (float16 stops at 65504 instead of
        infinity).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the activation is unknown.
    """
    op = "bidirectional_conv1d"
    for name, pair in (("weight", weight), ("bias", bias)):
        if pair is not None and len(pair) != 2:
            raise ValueError(
                f"{op}: {name} must hold one tensor for each of the 2 directions, got {len(pair)}; "
                f"pass {name}=(forward, backward)"
            )
    biases: tuple[Tensor | None, Tensor | None] = (None, None) if bias is None else bias
    named_weights = (("weight[0]", weight[0]), ("weight[1]", weight[1]))
    _check(op, x, named_weights, (("bias[0]", biases[0]), ("bias[1]", biases[1])), activation)
    dtype = parameter_dtype(x)
    bias_f, bias_b = (None if one is None else one.to(dtype) for one in biases)
    u_f, u_b = _bidirectional_conv1d(
        x, weight[0].to(dtype), weight[1].to(dtype), bias_f, bias_b, activation == "silu"
    )
    return u_f, u_b


def _check(
    op: str,
    x: Tensor,
    weights: tuple[tuple[str, Tensor], ...],
    biases: tuple[tuple[str, Tensor | None], ...],
    activation: str | None,
) -> None:
    check_ndim(op, "x", x, "(B, L, E)", 3)
    d_inner = x.shape[2]
    for name, weight in weights:
        check_ndim(op, name, weight, "(E, K)", 2)
        check_shape(op, name, weight, "(E, K)", (d_inner, weight.shape[1]))
    for name, bias in biases:
        if bias is not None:
            check_shape(op, name, bias, "(E,)", (d_inner,))
    check_dtypes_and_devices(op, (("x", x), *weights, *biases))
    if activation not in (None, "silu"):
        raise ValueError(
            f"{op}: activation must be 'silu' or None, got {activation!r}; "
            "apply other activations to the result"
        )


def causal_conv1d_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool
) -> Tensor:
    """Return the op's result by plain PyTorch operations."""
    with torch.autocast(x.device.type, enabled=False):
        y = _convolve(x.to(weight.dtype), weight, bias, reverse)
        return as_stored(F.silu(y) if silu else y, x.dtype)


def causal_conv1d_backward_torch(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias (empty without) by plain PyTorch operations."""
    with torch.autocast(x.device.type, enabled=False):
        dy = dy.to(weight.dtype)
        inputs = x.to(weight.dtype)
        if silu:
            y = _convolve(inputs, weight, bias, reverse)
            sigmoid = torch.sigmoid(y)
            dy = dy * sigmoid * (1 + y * (1 - sigmoid))
        dx = _convolve(dy, weight, None, not reverse)
        taps = _shifted(inputs, weight.shape[1], reverse)
        dweight = torch.stack([(dy * tap).sum((0, 1)) for tap in taps], dim=1)
        dbias = weight.new_empty(0) if bias is None else dy.sum((0, 1))
        return dx.to(x.dtype), dweight, dbias


def bidirectional_conv1d_torch(
    x: Tensor,
    weight_f: Tensor,
    weight_b: Tensor,
    bias_f: Tensor | None,
    bias_b: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Return the results of both directions by plain PyTorch operations."""
    u_f = causal_conv1d_torch(x, weight_f, bias_f, False, silu)
    return u_f, causal_conv1d_torch(x, weight_b, bias_b, True, silu)


def bidirectional_conv1d_backward_torch(
    du_f: Tensor,
    du_b: Tensor,
    x: Tensor,
    weight_f: Tensor,
    weight_b: Tensor,
    bias_f: Tensor | None,
    bias_b: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, both weights and both biases by plain PyTorch operations."""
    dx_f, dw_f, db_f = causal_conv1d_backward_torch(du_f, x, weight_f, bias_f, False, silu)
    dx_b, dw_b, db_b = causal_conv1d_backward_torch(du_b, x, weight_b, bias_b, True, silu)
    return dx_f + dx_b, dw_f, dw_b, db_f, db_b


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    taps = _shifted(x, weight.shape[1], reverse)
    y = taps[0] * weight[:, 0]
    for k in range(1, weight.shape[1]):
        y = y + taps[k] * weight[:, k]
    return y if bias is None else y + bias


def _shifted(x: Tensor, num_taps: int, reverse: bool) -> list[Tensor]:
    """Return for every tap k the tokens that weight[:, k] meets, (B, L, E) each, zeros outside."""
    reach, length = num_taps - 1, x.shape[1]
    padded = F.pad(x, (0, 0, 0, reach) if reverse else (0, 0, reach, 0))
    starts = [reach - k if reverse else k for k in range(num_taps)]
    return [padded[:, start : start + length] for start in starts]


@torch.library.custom_op("visionmamba::causal_conv1d", mutates_args=())
def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool
) -> Tensor:
    if x.device.type == "cpu" and x.dtype != torch.float64:
        kernels = cpu_backend().kernels
        if kernels is not None:
            return kernels.causal_conv1d(x, (weight,), (bias,), (reverse,), silu)[0]
    return causal_conv1d_torch(x, weight, bias, reverse, silu)


@_causal_conv1d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("visionmamba::causal_conv1d_backward", mutates_args=())
def _causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.device.type == "cpu" and x.dtype != torch.float64:
        kernels = cpu_backend().kernels
        if kernels is not None:
            dx, dweights, dbiases = kernels.causal_conv1d_backward(
                (dy,), x, (weight,), (bias,), (reverse,), silu
            )
            return dx, dweights[0], dbiases[0]
    return causal_conv1d_backward_torch(dy, x, weight, bias, reverse, silu)


@_causal_conv1d_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0 if bias is None else bias.shape[0])
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.reverse, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _causal_conv1d_backward(dy, x, weight, bias, ctx.reverse, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, None


_causal_conv1d.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("visionmamba::bidirectional_conv1d", mutates_args=())
def _bidirectional_conv1d(
    x: Tensor,
    weight_f: Tensor,
    weight_b: Tensor,
    bias_f: Tensor | None,
    bias_b: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    if x.device.type == "cpu" and x.dtype != torch.float64:
        kernels = cpu_backend().kernels
        if kernels is not None:
            u_f, u_b = kernels.causal_conv1d(
                x, (weight_f, weight_b), (bias_f, bias_b), (False, True), silu
            )
            return u_f, u_b
    return bidirectional_conv1d_torch(x, weight_f, weight_b, bias_f, bias_b, silu)


@_bidirectional_conv1d.register_fake
def _(
    x: Tensor,
    weight_f: Tensor,
    weight_b: Tensor,
    bias_f: Tensor | None,
    bias_b: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("visionmamba::bidirectional_conv1d_backward", mutates_args=())
def _bidirectional_conv1d_backward(
    du_f: Tensor,
    du_b: Tensor,
    x: Tensor,
    weight_f: Tensor,
    weight_b: Tensor,
    bias_f: Tensor | None,
    bias_b: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, both weights and both biases (empty without bias)."""
    if x.device.type == "cpu" and x.dtype != torch.float64:
        kernels = cpu_backend().kernels
        if kernels is not None:
            dx, dweights, dbiases = kernels.causal_conv1d_backward(
                (du_f, du_b), x, (weight_f, weight_b), (bias_f, bias_b), (False, True), silu
            )
            return dx, dweights[0], dweights[1], dbiases[0], dbiases[1]
    return bidirectional_conv1d_backward_torch(
        du_f, du_b, x, weight_f, weight_b, bias_f, bias_b, silu
    )


@_bidirectional_conv1d_backward.register_fake
def _(
    du_f: Tensor,
    du_b: Tensor,
    x: Tensor,
    weight_f: Tensor,
    weight_b: Tensor,
    bias_f: Tensor | None,
    bias_b: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight_f.new_empty(weight_f.shape),
        weight_b.new_empty(weight_b.shape),
        weight_f.new_empty(0 if bias_f is None else bias_f.shape[0]),
        weight_b.new_empty(0 if bias_b is None else bias_b.shape[0]),
    )


def _setup_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward_bidirectional(ctx: Any, du_f: Tensor, du_b: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = _bidirectional_conv1d_backward(du_f, du_b, *tensors, ctx.silu)
    given = zip(grads, tensors, strict=True)
    return (*(None if tensor is None else grad for grad, tensor in given), None)


_bidirectional_conv1d.register_autograd(_backward_bidirectional, setup_context=_setup_bidirectional)
