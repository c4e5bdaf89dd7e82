"""The CUDA kernels of the norm, convolutions and patches behind their ops of torch.library.

Importing this module attaches them, straight to the dispatcher. Plain PyTorch runs what they do not
take: float64, odd widths and more than MAX_TAPS taps of a convolution, a residual in the other half
precision, patches whose side is no multiple of 8.
"""

import torch
from torch import Tensor

from visionmamba.ops.causal_conv1d import (
    bidirectional_conv1d_backward_torch,
    bidirectional_conv1d_torch,
    causal_conv1d_backward_torch,
    causal_conv1d_torch,
)
from visionmamba.ops.cuda import cuda_backend
from visionmamba.ops.cuda.conv import conv_backward, conv_takes, convolve_into
from visionmamba.ops.cuda.norm import add_rms_norm, add_rms_norm_backward
from visionmamba.ops.cuda.patches import patch_rows, takes_patches
from visionmamba.ops.patches import cut_patches_torch
from visionmamba.ops.rms_norm import rms_norm_backward_torch, rms_norm_torch


def _convolves(x: Tensor, taps: int) -> bool:
    if x.dtype == torch.float64 or not conv_takes(x.shape[2], taps):
        return False
    return cuda_backend(x.device).has_kernels


def _norms(x_dtype: torch.dtype, residual: Tensor) -> bool:
    """Return whether the kernels norm x beside a residual (x itself without one)."""
    if x_dtype == torch.float64 or residual.dtype not in (torch.float32, x_dtype):
        return False
    return cuda_backend(residual.device).has_kernels


@torch.library.impl("visionmamba::rms_norm", "cuda")
def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    if not _norms(x.dtype, x if residual is None else residual):
        return rms_norm_torch(x, weight, residual, eps)
    normed, total = add_rms_norm(x, residual, weight.contiguous(), eps)
    return normed, x.new_empty(0) if total is None else total


@torch.library.impl("visionmamba::rms_norm_backward", "cuda")
def _(
    dnormed: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _norms(x_dtype, total):
        return rms_norm_backward_torch(dnormed, dtotal, total, weight, eps, x_dtype, residual_dtype)
    dx, dresidual, dweight = add_rms_norm_backward(
        dnormed, dtotal, total, weight.contiguous(), eps, x_dtype, residual_dtype
    )
    if dresidual is None or dresidual is dx:
        dresidual = dx.new_empty(0)
    return dx, dresidual, dweight


@torch.library.impl("visionmamba::cut_patches", "cuda")
def _(
    images: Tensor, patch_size: int, stride: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    takes = images.numel() > 0 and takes_patches(images, patch_size, dtype)
    if not takes or not cuda_backend(images.device).has_kernels:
        return cut_patches_torch(images, patch_size, stride, rows, columns, dtype)
    return patch_rows(images, patch_size, stride, rows, columns, dtype)


@torch.library.impl("visionmamba::causal_conv1d", "cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool) -> Tensor:
    if not _convolves(x, weight.shape[1]):
        return causal_conv1d_torch(x, weight, bias, reverse, silu)
    y = x.new_empty(x.shape)
    convolve_into((y,), x, *_stored((weight,), (bias,)), (reverse,), silu)
    return y


@torch.library.impl("visionmamba::causal_conv1d_backward", "cuda")
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _convolves(x, weight.shape[1]):
        return causal_conv1d_backward_torch(dy, x, weight, bias, reverse, silu)
    dx, dweight, dbias = conv_backward((dy,), x, *_stored((weight,), (bias,)), (reverse,), silu)
    return dx, dweight[0], weight.new_empty(0) if bias is None else dbias[0]


@torch.library.impl("visionmamba::bidirectional_conv1d", "cuda")
def _(
    x: Tensor,
    weight_f: Tensor,
    weight_b: Tensor,
    bias_f: Tensor | None,
    bias_b: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    if not _convolves(x, weight_f.shape[1]):
        return bidirectional_conv1d_torch(x, weight_f, weight_b, bias_f, bias_b, silu)
    u_f, u_b = x.new_empty(x.shape), x.new_empty(x.shape)
    parameters = _stored((weight_f, weight_b), (bias_f, bias_b))
    convolve_into((u_f, u_b), x, *parameters, (False, True), silu)
    return u_f, u_b


@torch.library.impl("visionmamba::bidirectional_conv1d_backward", "cuda")
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
    if not _convolves(x, weight_f.shape[1]):
        return bidirectional_conv1d_backward_torch(
            du_f, du_b, x, weight_f, weight_b, bias_f, bias_b, silu
        )
    parameters = _stored((weight_f, weight_b), (bias_f, bias_b))
    dx, dweight, dbias = conv_backward((du_f, du_b), x, *parameters, (False, True), silu)
    if bias_f is None:
        return dx, dweight[0], dweight[1].clone(), weight_f.new_empty(0), weight_b.new_empty(0)
    return dx, dweight[0], dweight[1].clone(), dbias[0], dbias[1].clone()


def _stored(
    weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return parameters as the kernels read them; the biases are all there or none."""
    given = [bias.contiguous() for bias in biases if bias is not None]
    return [weight.contiguous() for weight in weights], given or None
