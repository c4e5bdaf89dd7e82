"""The gate behind the scans as Python functions on tensors: structures shared with gate.cu.

Every function expects tensors of one GPU and one dtype out of float32, bfloat16 and float16.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops.cuda.driver import DTYPE_NAMES, kernels

_THREADS = 256


class _Gate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "z", "dg", "out", "sum", "dz")),
        *((name, ctypes.c_int64) for name in ("z_batch", "dz_batch", "rows")),
        *((name, ctypes.c_int32) for name in ("z_token", "dz_token", "length", "channels")),
        ("scale", ctypes.c_float),
    )


def gate_forward(y: Tensor, z: Tensor, scale: float, *, keep_sum: bool) -> Tensor:
    """Return scale * (y[0] + y[1]) * silu(z), (B, L, E), written over y.

    Args:
        y: (2, B, L, E), or (1, B, L, E) of one direction; contiguous, E even.
        z: (B, L, E); strided rows are read in place.
        scale: factor of the sum.
        keep_sum: for a backward; y[0] becomes the sum and the result lies in y[1], of one direction
            in a tensor of its own. Otherwise the result lies in y[0].
    """
    both = y.shape[0] == 2
    a = y.data_ptr()
    b = a + y.stride(0) * y.element_size() if both else None
    if not keep_sum:
        _launch("forward", _Gate(a=a, b=b, out=a), z, scale)
        return y[0]
    if both:
        _launch("forward", _Gate(a=a, b=b, out=b, sum=a), z, scale)
        return y[1]
    gated = torch.empty_like(y[0])
    _launch("forward", _Gate(a=a, out=gated.data_ptr()), z, scale)
    return gated


def gate_backward(dg: Tensor, total: Tensor, z: Tensor, scale: float, *, dz: Tensor) -> Tensor:
    """Return the gradient of the sum, which is that of every direction, (B, L, E); write dz.

    Args:
        dg: (B, L, E), the gradient of the gated sum.
        total: (B, L, E) contiguous, the sum that gate_forward kept.
        z, scale: as given to it.
        dz: (B, L, E), receives the gradient of z; rows may be strided, in whole pairs of channels.
    """
    dg = dg.contiguous()
    dscan = torch.empty_like(total)
    problem = _Gate(a=total.data_ptr(), dg=dg.data_ptr(), out=dscan.data_ptr())
    _launch("backward", problem, z, scale, dz)
    return dscan


def gate(a: Tensor, b: Tensor | None, z: Tensor, scale: float) -> Tensor:
    """Return scale * (a + b) * silu(z) in a new tensor; all (B, L, E), any E, b may be None."""
    channels = a.shape[2]
    a, z = _even(a).contiguous(), _even(z)
    b = a.new_empty(0) if b is None else _even(b).contiguous()
    out = torch.empty_like(a)
    problem = _Gate(a=a.data_ptr(), b=b.data_ptr(), out=out.data_ptr())
    _launch("forward", problem, z, scale)
    return out[..., :channels]


def gate_gradients(
    dg: Tensor, a: Tensor, b: Tensor | None, z: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a, which is that of b too, and that of z, in new tensors."""
    channels = a.shape[2]
    a, dg, z = _even(a).contiguous(), _even(dg).contiguous(), _even(z)
    b = a.new_empty(0) if b is None else _even(b).contiguous()
    out, dz = torch.empty_like(a), torch.empty_like(a)
    problem = _Gate(a=a.data_ptr(), b=b.data_ptr(), dg=dg.data_ptr(), out=out.data_ptr())
    _launch("backward", problem, z, scale, dz)
    return out[..., :channels], dz[..., :channels]


def _even(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, 1)) if tensor.shape[2] % 2 else tensor


def _places(tensor: Tensor) -> int:
    """Return the bits of all addresses of rows; all of them where the channels are strided."""
    batch, token, channel = tensor.stride()
    return tensor.data_ptr() | (batch | token) * tensor.element_size() if channel == 1 else -1


def _launch(kind: str, problem: _Gate, z: Tensor, scale: float, dz: Tensor | None = None) -> None:
    """Launch for the pointers that the problem holds; z and dz are added."""
    batch, length, channels = z.shape
    size = z.element_size()
    at_once = 16 // size
    places = _places(z)
    if places % (2 * size):
        z, places = z.contiguous(), 0
    places |= channels * size | (problem.a or 0) | (problem.b or 0) | (problem.dg or 0)
    problem.z, problem.scale = z.data_ptr(), scale
    problem.z_batch, problem.z_token = z.stride(0) * size, z.stride(1) * size
    problem.rows, problem.length, problem.channels = batch * length, length, channels
    if dz is not None:
        places |= _places(dz)
        problem.dz = dz.data_ptr()
        problem.dz_batch, problem.dz_token = dz.stride(0) * size, dz.stride(1) * size
    wide = places % 16 == 0
    threads = batch * length * (channels // (at_once if wide else 2))
    kernels("gate", z.device).launch(
        f"gate_{kind}_kernel_{DTYPE_NAMES[z.dtype]}{'_wide' if wide else ''}",
        problem,
        -(-threads // _THREADS),
        _THREADS,
        starts_early=True,
    )
