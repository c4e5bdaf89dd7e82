"""Root-mean-square norm with the residual add fused in: the checked face and the op."""

from typing import Any, overload

import torch
from torch import Tensor

from visionmamba.ops._checks import (
    as_stored,
    check_dtypes_and_devices,
    check_shape,
    parameter_dtype,
)
from visionmamba.ops.cpu import cpu_backend


@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: None = None) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return x * rsqrt(mean(x^2) + eps) * weight over the last axis.

    With a residual, x is added to it first and the norm is taken of the sum.

    Args:
        x: (..., D) float32, bfloat16 or float16; the norm is computed in float32.
        weight: (D,) float32.
        eps: added to the mean square.
        residual: (..., D) like x, usually float32; the norm is taken of residual + x.

    Returns:
        normed (..., D) in x's dtype; with a residual the pair (normed, residual + x), the latter
        in the residual's dtype. float16 stops at 65504 instead of infinity.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
    """
    op = "rms_norm"
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(
            f"{op}: x must have shape (..., D) without empty axes, got {tuple(x.shape)}; "
            "pass at least one row"
        )
    check_shape(op, "weight", weight, "(D,)", (x.shape[-1],))
    if residual is not None:
        check_shape(op, "residual", residual, "(..., D) like x", tuple(x.shape))
    check_dtypes_and_devices(op, (("x", x), ("weight", weight), ("residual", residual)))
    normed, total = _rms_norm(x, weight.to(parameter_dtype(x)), residual, eps)
    return normed if residual is None else (normed, total)


def rms_norm_torch(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the op's two results by plain PyTorch operations."""
    with torch.autocast(x.device.type, enabled=False):
        total = x.to(weight.dtype)
        if residual is not None:
            total = total + residual.to(weight.dtype)
        scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
        normed = as_stored(total * scale * weight, x.dtype)
        if residual is None:
            return normed, x.new_empty(0)
        return normed, as_stored(total, residual.dtype)


def rms_norm_backward_torch(
    dnormed: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the backward op's three results by plain PyTorch operations."""
    with torch.autocast(total.device.type, enabled=False):
        values = total.to(weight.dtype)
        if dnormed is None:
            dvalues, dweight = torch.zeros_like(values), torch.zeros_like(weight)
        else:
            scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
            unit = values * scale
            dnormed = dnormed.to(weight.dtype)
            dunit = dnormed * weight
            dvalues = scale * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
            dweight = (dnormed * unit).flatten(0, -2).sum(0) if values.ndim > 1 else dnormed * unit
        if dtotal is not None:
            dvalues = dvalues + dtotal
        return *_in_both_dtypes(dvalues, x_dtype, residual_dtype), dweight


def _in_both_dtypes(
    dvalues: Tensor, x_dtype: torch.dtype, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the gradient in x's dtype and, where another is wanted, in the residual's."""
    dx = dvalues.to(x_dtype)
    if residual_dtype is None or residual_dtype == x_dtype:
        return dx, dx.new_empty(0)
    if residual_dtype == dvalues.dtype:
        return dx, dvalues
    return dx, dvalues.to(residual_dtype)


@torch.library.custom_op("visionmamba::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the normed rows and, with a residual, residual + x (else an empty tensor)."""
    if x.device.type == "cpu" and x.dtype != torch.float64:
        kernels = cpu_backend().kernels
        if kernels is not None:
            return kernels.rms_norm(x, weight, residual, eps)
    return rms_norm_torch(x, weight, residual, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape), total


@torch.library.custom_op("visionmamba::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dnormed: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the residual and of the weight.

    The residual's is empty without a residual, and where its dtype is x's: dx then serves both.
    """
    if total.device.type == "cpu" and total.dtype != torch.float64:
        kernels = cpu_backend().kernels
        if kernels is not None:
            dvalues, dweight = kernels.rms_norm_backward(dnormed, dtotal, total, weight, eps)
            return *_in_both_dtypes(dvalues, x_dtype, residual_dtype), dweight
    return rms_norm_backward_torch(dnormed, dtotal, total, weight, eps, x_dtype, residual_dtype)


@_rms_norm_backward.register_fake
def _(
    dnormed: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = total.new_empty(total.shape, dtype=x_dtype)
    if residual_dtype is None or residual_dtype == x_dtype:
        dresidual = dx.new_empty(0)
    else:
        dresidual = total.new_empty(total.shape, dtype=residual_dtype)
    return dx, dresidual, weight.new_empty(weight.shape)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None, float],
    output: tuple[Tensor, Tensor],
) -> None:
    x, weight, residual, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else output[1], weight)


def _backward(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    if ctx.residual_dtype is None:
        dtotal = None
    dx, dresidual, dweight = _rms_norm_backward(
        dnormed, dtotal, total, weight, ctx.eps, ctx.x_dtype, ctx.residual_dtype
    )
    if ctx.residual_dtype is None:
        return dx, dweight, None, None
    return dx, dweight, dx if ctx.residual_dtype == ctx.x_dtype else dresidual, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)
