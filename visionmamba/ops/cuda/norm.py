"""RMSNorm with the residual add as Python functions on tensors: structures shared with norm.cu.

Every function expects tensors of one GPU, activations float32, bfloat16 or float16, a residual in
float32 or in the activations' dtype, and a weight in float32.
"""

import ctypes

import torch
from torch import Tensor

from visionmamba.ops.cuda.driver import DTYPE_NAMES, kernels

_THREADS = 256
_BACKWARD_BLOCKS = {"192": 3, "384": 3, "768": 1, "any": 4}
"""Blocks of a multiprocessor that walk over all rows, by the width that the kernel is made for."""


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "normed", "total")),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("eps", ctypes.c_float),
    )


class _NormBackward(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("dnormed", "dtotal", "total", "weight")),
        *((name, ctypes.c_void_p) for name in ("dx", "dresidual", "partials")),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("eps", ctypes.c_float),
    )


class _Sum(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("partials", "out")),
        *((name, ctypes.c_int32) for name in ("rows", "width")),
    )


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the norm of residual + x in x's dtype, and residual + x in the residual's.

    Args:
        x: (..., D).
        residual: (..., D); None: the norm of x, and None where no total is given.
        weight: (D,).
        eps: added to the mean square.
        total: (..., D) contiguous, in the residual's dtype: receives the sum; may be the residual.
    """
    x, width = x.contiguous(), x.shape[-1]
    normed = torch.empty_like(x)
    problem = _Norm(x=x.data_ptr(), weight=weight.data_ptr(), normed=normed.data_ptr(), eps=eps)
    problem.rows, problem.width = x.numel() // width, width
    places = problem.x | problem.weight
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty_like(residual) if total is None else total
        problem.residual = residual.data_ptr()
        places |= problem.residual
    if total is not None:
        problem.total = total.data_ptr()
        places |= problem.total
    stream_dtype = x.dtype if total is None else total.dtype
    size = _size(width, places)
    rows_of_block = _THREADS // (16 if size == "192" else 32)
    kernels("norm", x.device).launch(
        f"norm_forward_kernel_{DTYPE_NAMES[x.dtype]}_{DTYPE_NAMES[stream_dtype]}_{size}",
        problem,
        -(-problem.rows // rows_of_block),
        _THREADS,
        starts_early=True,
    )
    return normed, total


def add_rms_norm_backward(
    dnormed: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of x, of the residual and of the weight.

    The first two are the same numbers in two dtypes, and one tensor where these are equal. The
    weight's is summed in a fixed order.

    Args:
        dnormed: (..., D) in x's dtype, or None for zeros.
        dtotal: (..., D) in total's dtype, or None for zeros.
        total: (..., D), residual + x as returned by the forward; without a residual x itself.
        weight: (D,).
        eps: as in the forward.
        x_dtype: of x and its gradient.
        residual_dtype: of the residual and its gradient; None without one.
    """
    total, width = total.contiguous(), total.shape[-1]
    dx = torch.empty_like(total, dtype=x_dtype)
    problem = _NormBackward(
        total=total.data_ptr(), weight=weight.data_ptr(), dx=dx.data_ptr(), eps=eps
    )
    places = problem.total | problem.weight
    if dnormed is not None:
        dnormed = dnormed.contiguous()
        problem.dnormed = dnormed.data_ptr()
        places |= problem.dnormed
    if dtotal is not None:
        dtotal = dtotal.contiguous()
        problem.dtotal = dtotal.data_ptr()
        places |= problem.dtotal
    dresidual = None if residual_dtype is None else dx
    if residual_dtype not in (None, x_dtype):
        dresidual = torch.empty_like(total)
        problem.dresidual = dresidual.data_ptr()
    rows = total.numel() // width
    problem.rows, problem.width = rows, width
    compiled = kernels("norm", total.device)
    size = _size(width, places)
    rows_of_block = _THREADS // (16 if size == "192" else 32)
    blocks = min(-(-rows // rows_of_block), _BACKWARD_BLOCKS[size] * compiled.num_multiprocessors)
    num_partials = blocks * (rows_of_block if size == "any" else 1)
    partials = torch.empty((num_partials, width), dtype=torch.float32, device=total.device)
    dweight = torch.empty_like(weight)
    problem.partials = partials.data_ptr()
    compiled.launch(
        f"norm_backward_kernel_{DTYPE_NAMES[x_dtype]}_{DTYPE_NAMES[total.dtype]}_{size}",
        problem,
        blocks,
        _THREADS,
        starts_early=True,
    )
    summed = _Sum(problem.partials, dweight.data_ptr(), num_partials, width)
    compiled.launch("norm_sum_kernel", summed, -(-width // 32), 1024, starts_early=True)
    return dx, dresidual, dweight


def _size(width: int, places: int) -> str:
    """Return which kernel takes rows of a width whose addresses have these bits."""
    if width % 4 or places % 16:
        return "any"
    return "192" if width <= 192 else "384" if width <= 384 else "768" if width <= 768 else "any"
