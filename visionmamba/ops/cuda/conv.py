"""Depthwise convolution with SiLU as Python functions on tensors: structures shared with conv.cu.

Every function expects tensors of one GPU, activations of one dtype out of float32, bfloat16 and
float16, weights and biases in float32 and contiguous. Of two directions the second is reversed.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from visionmamba.ops.cuda.driver import DTYPE_NAMES, kernels

MAX_TAPS = 8
"""Most taps that the kernels know."""
_WARPS = 4
_FORWARD_WARPS, _BACKWARD_WARPS = 20, 12
"""Warps of a multiprocessor that share the tokens."""

_Tensors = Tensor | Sequence[Tensor]
_Addresses = ctypes.c_void_p * 2


class _Convolution(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, _Addresses) for name in ("weight", "bias", "y", "dy")),
        *((name, ctypes.c_void_p) for name in ("dx", "partials")),
        *((name, ctypes.c_int64) for name in ("x_batch", "dx_batch")),
        *((name, ctypes.c_int32) for name in ("x_token", "dx_token", "batch", "length")),
        *((name, ctypes.c_int32) for name in ("channels", "taps", "silu", "reverse")),
        *((name, ctypes.c_int32) for name in ("run", "runs", "columns")),
    )


class _Sum(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("partials", "dweight", "dbias")),
        *((name, ctypes.c_int32) for name in ("rows", "num_weights", "num_biases")),
    )


def conv_takes(channels: int, taps: int) -> bool:
    """Return whether the kernels take this width and number of taps."""
    return channels % 2 == 0 and taps <= MAX_TAPS


def conv_forward(
    x: Tensor,
    weights: _Tensors,
    biases: _Tensors | None,
    reverses: tuple[bool, ...],
    silu: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return the convolution of x in each direction, (n, B, L, E); x is read once.

    Args:
        x: (B, L, E), E even; strided rows are read in place.
        weights: n = 1 or 2 of (E, K), K up to MAX_TAPS; apart or as one tensor.
        biases: n of (E,), or None.
        reverses: (False,), (True,) or (False, True).
        silu: whether SiLU follows.
        out: (n, B, L, E) contiguous, receives the result.
    """
    if out is None:
        out = torch.empty((len(reverses), *x.shape), dtype=x.dtype, device=x.device)
    convolve_into(out, x, weights, biases, reverses, silu)
    return out


def convolve_into(
    outs: _Tensors,
    x: Tensor,
    weights: _Tensors,
    biases: _Tensors | None,
    reverses: tuple[bool, ...],
    silu: bool,
) -> None:
    """Write what conv_forward returns to n contiguous (B, L, E), apart or as one tensor."""
    problem, x, kind = _problem(x, weights, biases, reverses, silu, None)
    problem.y = _addresses(outs)
    blocks = _share(problem, x, kind, _FORWARD_WARPS)
    _launch("forward", problem, x, kind, blocks, len(reverses))


def conv_backward(
    dus: _Tensors,
    x: Tensor,
    weights: _Tensors,
    biases: _Tensors | None,
    reverses: tuple[bool, ...],
    silu: bool,
    *,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (B, L, E), the weights (n, E, K) and the biases (n, E).

    The last two are float32 and summed in a fixed order.

    Args:
        dus: n of (B, L, E), the gradients of the results; apart or as one tensor.
        x, weights, biases, reverses, silu: as given to conv_forward.
        dx: (B, L, E), receives the gradient of x; rows may be strided, in whole pairs of channels.
    """
    directions = len(reverses)
    dus = dus.contiguous() if isinstance(dus, Tensor) else [du.contiguous() for du in dus]
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    problem, x, kind = _problem(x, weights, biases, reverses, silu, dx)
    problem.dy = _addresses(dus)
    problem.dx, size = dx.data_ptr(), dx.element_size()
    batch, token, _ = dx.stride()
    problem.dx_batch, problem.dx_token = batch * size, token * size
    blocks = _share(problem, x, kind, _BACKWARD_WARPS)
    channels, taps = problem.channels, problem.taps
    dweight = torch.empty((directions, channels, taps), dtype=torch.float32, device=x.device)
    dbias = torch.empty((directions, channels), dtype=torch.float32, device=x.device)
    width = directions * channels * (taps + 1)
    rows = blocks // problem.columns
    partials = torch.empty((rows, width), dtype=torch.float32, device=x.device)
    problem.partials = partials.data_ptr()
    _launch("backward", problem, x, kind, blocks, directions)
    summed = _Sum(
        problem.partials,
        dweight.data_ptr(),
        dbias.data_ptr(),
        rows,
        width - dbias.numel(),
        dbias.numel(),
    )
    kernels("conv", x.device).launch(
        "conv_sum_kernel", summed, -(-width // 32), 1024, starts_early=True
    )
    return dx, dweight, dbias


def _problem(
    x: Tensor,
    weights: _Tensors,
    biases: _Tensors | None,
    reverses: tuple[bool, ...],
    silu: bool,
    dx: Tensor | None,
) -> tuple[_Convolution, Tensor, str]:
    """Return the problem without its results, x as it is read, and the kind of kernel."""
    size = x.element_size()
    places = _places(x)
    if places % (2 * size):
        x, places = x.contiguous(), 0
    if dx is not None:
        places |= _places(dx)
    channels = x.shape[2]
    taps = weights.shape[2] if isinstance(weights, Tensor) else weights[0].shape[1]
    problem = _Convolution(x=x.data_ptr(), weight=_addresses(weights))
    whole = places % (4 * size) == 0 and (problem.weight[0] | (problem.weight[1] or 0)) % 16 == 0
    quick = silu and taps <= 4 and channels % 4 == 0 and whole
    problem.batch, problem.length, problem.channels = x.shape
    batch, token, _ = x.stride()
    problem.x_batch, problem.x_token = batch * size, token * size
    problem.taps, problem.silu, problem.reverse = taps, silu, reverses == (True,)
    problem.columns = -(-channels // (128 if quick else 64))
    if biases is not None:
        problem.bias = _addresses(biases)
    return problem, x, "quick" if quick else "general"


def _places(tensor: Tensor) -> int:
    """Return the bits of all addresses of rows; all of them where the channels are strided."""
    batch, token, channel = tensor.stride()
    return tensor.data_ptr() | (batch | token) * tensor.element_size() if channel == 1 else -1


def _addresses(tensors: _Tensors) -> ctypes.Array[ctypes.c_void_p]:
    """Return where one or two tensors begin, given apart or as the rows of one."""
    if isinstance(tensors, Tensor):
        first = tensors.data_ptr()
        return _Addresses(first, first + tensors.stride(0) * tensors.element_size())
    return _Addresses(*[tensor.data_ptr() for tensor in tensors])


def _share(problem: _Convolution, x: Tensor, kind: str, warps: int) -> int:
    """Cut the tokens into runs for so many warps a multiprocessor; return the blocks."""
    batch, length, columns = problem.batch, problem.length, problem.columns
    step = 4 if kind == "quick" else 8
    wanted = warps * kernels("conv", x.device).num_multiprocessors // (batch * columns)
    run = -(-length // (max(wanted, 1) * step)) * step
    runs = -(-length // run)
    problem.run, problem.runs = run, runs
    blocks: int = -(-batch * runs // _WARPS) * columns
    return blocks


def _launch(
    kind: str, problem: _Convolution, x: Tensor, size: str, blocks: int, directions: int
) -> None:
    kernels("conv", x.device).launch(
        f"conv_{kind}_kernel_{size}_{DTYPE_NAMES[x.dtype]}_{directions}",
        problem,
        blocks,
        32 * _WARPS,
        starts_early=True,
    )
