"""The selective scan on any GPU that Triton compiles for, forward and backward, on tensors.

Every function expects what the faces of the ops have checked: tensors of one GPU, activations of
one dtype out of float32, bfloat16 and float16 whose last axis is contiguous or cheap to make so,
parameters and states float32. Importing this module imports triton.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visionmamba.ops.triton.kernels import (
    chunk_ends_kernel,
    fold_chunks_kernel,
    machine,
    scan_backward_kernel,
    scan_forward_kernel,
)

_SCRATCH_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a kernel cuts its work; channels and lanes are for a warp of 32 threads."""

    tokens: int
    """Tokens of a tile."""
    channels: int
    """Channels of a program."""
    lanes: int
    """Neighbouring channels that lie in different lanes of a warp; the rest of it holds states."""
    warps: int
    """Warps of a program."""
    stages: int
    """Tiles whose loads are under way at once."""
    programs: int
    """Programs wanted for each multiprocessor; long sequences are cut until there are as many."""


FORWARD = Tiling(tokens=8, channels=32, lanes=32, warps=1, stages=3, programs=8)
BACKWARD = Tiling(tokens=4, channels=16, lanes=8, warps=1, stages=3, programs=16)
_SHORTEST_CHUNK = 64
_FOLD = {"BLOCK": 128, "AT_ONCE": 8}


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """The programs of a scan: blocks of channels and chunks of the sequence."""

    constants: dict[str, int]
    blocks: int
    chunk_length: int
    num_chunks: int


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    *,
    other: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return scale * (scan + other) * silu(z), (B, L, E) in x's dtype, and the last state.

    `other` is a contiguous tensor like x, such as the scan of the other direction.
    """
    x, dt, B, C = _rows(x), _rows(dt), _rows(B), _rows(C)
    A = A.contiguous()
    D = None if D is None else D.contiguous()
    dt_bias = None if dt_bias is None else dt_bias.contiguous()
    z = None if z is None else _rows(z)
    batch, length, channels = x.shape
    d_state = A.shape[1]
    cut = _cut(FORWARD, x, B, C)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last_state = A.new_empty(batch, channels, d_state)
    entering = None if initial_state is None else initial_state.contiguous()
    with torch.accelerator.device_index(x.device.index):
        if cut.num_chunks > 1:
            ends, sums, _ = _chunk_ends(
                cut, None, x, dt, A, B, C, None, dt_bias, dt_softplus, reverse, 1.0
            )
            entering = _folded(ends, sums, A, entering, from_last=False)
        scan_forward_kernel[(batch * cut.num_chunks * cut.blocks,)](
            *(x, dt, A, B, C, D, z, dt_bias, entering, other, y, last_state),
            *(scale, length, channels, d_state, cut.chunk_length, cut.num_chunks),
            *(*_strides(x, dt, B, C, z), dt_softplus, reverse),
            **cut.constants,
        )
    return y, last_state


def selective_scan_backward_triton(
    dy: Tensor,
    dlast_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the nine tensors from x to initial_state, empty for those None.

    They are those of scale * scan * silu(z). Nothing is kept from the forward: states are computed
    again. Sums are added in a fixed order, so equal inputs give equal bits.
    """
    dy, x, dt, B, C = _rows(dy), _rows(x), _rows(dt), _rows(B), _rows(C)
    A = A.contiguous()
    D = None if D is None else D.contiguous()
    dt_bias = None if dt_bias is None else dt_bias.contiguous()
    z = None if z is None else _rows(z)
    batch, length, channels = x.shape
    d_state = A.shape[1]
    rows_at_once = max(1, _SCRATCH_BYTES // _scratch_bytes(length, channels, d_state))
    dx, ddt, dB, dC = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C)
    )
    dz = x.new_empty(0) if z is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    dinitial_state = A.new_empty(0) if initial_state is None else A.new_empty(initial_state.shape)
    sums = []
    for start in range(0, batch, rows_at_once):
        part = slice(start, start + rows_at_once)
        sums.append(
            _backward(
                dy[part],
                None if dlast_state is None else dlast_state[part].contiguous(),
                x[part],
                dt[part],
                A,
                B[part],
                C[part],
                D,
                None if z is None else z[part],
                dt_bias,
                None if initial_state is None else initial_state[part].contiguous(),
                dt_softplus,
                reverse,
                scale,
                dx[part],
                ddt[part],
                dz if z is None else dz[part],
                dB[part],
                dC[part],
                dinitial_state if initial_state is None else dinitial_state[part],
            )
        )
    dA, dD, ddt_bias = (
        functools.reduce(torch.add, of_parts) for of_parts in zip(*sums, strict=True)
    )
    nothing = A.new_empty(0)
    return (
        dx,
        ddt,
        dA,
        dB,
        dC,
        nothing if D is None else dD,
        dz,
        nothing if dt_bias is None else ddt_bias,
        dinitial_state,
    )


def _backward(
    dy: Tensor,
    dlast_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    scale: float,
    dx: Tensor,
    ddt: Tensor,
    dz: Tensor,
    dB: Tensor,
    dC: Tensor,
    dinitial_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill the gradients from dx on for some rows of the batch; return dA, dD and ddt_bias."""
    batch, length, channels = x.shape
    d_state = A.shape[1]
    cut = _cut(BACKWARD, x, B, C)
    chunks = batch, cut.num_chunks
    tiles = cut.chunk_length // cut.constants["TILE"]
    tile_states = A.new_empty(*chunks, tiles, channels, d_state)
    dA = A.new_empty(*chunks, channels, d_state)
    dD, ddt_bias = A.new_empty(*chunks, channels), A.new_empty(*chunks, channels)
    dB_blocks = A.new_empty(cut.blocks, batch, length, d_state)
    dC_blocks = torch.empty_like(dB_blocks)
    entering, arriving = initial_state, dlast_state
    with torch.accelerator.device_index(x.device.index):
        if cut.num_chunks > 1:
            ends, sums, adjoints = _chunk_ends(
                cut, dy, x, dt, A, B, C, z, dt_bias, dt_softplus, reverse, scale
            )
            entering = _folded(ends, sums, A, entering, from_last=False)
            arriving = _folded(adjoints, sums, A, arriving, from_last=True)
        scan_backward_kernel[(batch * cut.num_chunks * cut.blocks,)](
            *(dy, x, dt, A, B, C, D, z, dt_bias, entering, arriving, tile_states),
            *(dx, ddt, None if z is None else dz, dA, dB_blocks, dC_blocks, dD, ddt_bias),
            None if initial_state is None else dinitial_state,
            *(scale, length, channels, d_state, cut.chunk_length, cut.num_chunks),
            dB_blocks.stride(0),
            *(dy.stride(0), dy.stride(1), *_strides(x, dt, B, C, z), dt_softplus, reverse),
            **cut.constants,
        )
    dB.copy_(dB_blocks.sum(0))
    dC.copy_(dC_blocks.sum(0))
    return dA.sum((0, 1)), dD.sum((0, 1)), ddt_bias.sum((0, 1))


def _chunk_ends(
    cut: _Cut,
    dy: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what leaves each chunk if zero enters: state, sum of steps and, for dy, gradient."""
    batch, length, channels = x.shape
    d_state = A.shape[1]
    ends = A.new_empty(batch, cut.num_chunks, channels, d_state)
    sums = A.new_empty(batch, cut.num_chunks, channels)
    adjoints = None if dy is None else torch.empty_like(ends)
    chunk_ends_kernel[(batch * cut.num_chunks * cut.blocks,)](
        *(x, dt, A, B, C, z, dy, dt_bias, ends, adjoints, sums),
        *(scale, length, channels, d_state, cut.chunk_length, cut.num_chunks),
        *_strides(x, dt, B, C, z),
        *((0, 0) if dy is None else (dy.stride(0), dy.stride(1))),
        *(dt_softplus, reverse),
        **cut.constants,
    )
    return ends, sums, ends if adjoints is None else adjoints


def _folded(
    ends: Tensor, sums: Tensor, A: Tensor, first: Tensor | None, *, from_last: bool
) -> Tensor:
    """Turn what leaves each chunk into what enters it, in place; `first` enters the first one."""
    batch, num_chunks, channels, d_state = ends.shape
    fold_chunks_kernel[(batch * -(-channels * d_state // _FOLD["BLOCK"]),)](
        *(ends, sums, A, first, channels, d_state, num_chunks, from_last),
        **_FOLD,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return ends


def _cut(tiling: Tiling, x: Tensor, B: Tensor, C: Tensor) -> _Cut:
    """Return the programs of a scan over x: long sequences are cut until they fill the GPU."""
    batch, length, channels = x.shape
    multiprocessors, threads = machine(x.device)
    lanes = tiling.lanes * threads // 32
    groups = tiling.channels // tiling.lanes
    blocks = -(-channels // (groups * lanes))
    wanted = max(
        1, min(tiling.programs * multiprocessors // (batch * blocks), length // _SHORTEST_CHUNK)
    )
    chunk_length = -(-length // (wanted * tiling.tokens)) * tiling.tokens
    constants = {
        "TILE": tiling.tokens,
        "GROUPS": groups,
        "STATES": 1 << (B.shape[2] - 1).bit_length(),
        "LANES": lanes,
        "STAGES": tiling.stages,
        "ALIGNED": math.gcd(16, *(_alignment(tensor) for tensor in (B, C))),
        "num_warps": tiling.warps,
        "enable_fp_fusion": True,
    }
    return _Cut(
        constants=constants,
        blocks=blocks,
        chunk_length=chunk_length,
        num_chunks=-(-length // chunk_length),
    )


def _scratch_bytes(length: int, channels: int, d_state: int) -> int:
    """Return about how much scratch the backward of one sample takes."""
    tile_states = length // BACKWARD.tokens * channels * d_state
    partial_sums = 2 * -(-channels // BACKWARD.channels) * length * d_state
    return 4 * (tile_states + partial_sums) + 1


def _alignment(tensor: Tensor) -> int:
    """Return the greatest number of bytes that divides the addresses of all rows."""
    strides = tensor.stride(0), tensor.stride(1)
    return math.gcd(tensor.data_ptr(), *(stride * tensor.element_size() for stride in strides))


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return the strides of batch and tokens of each tensor."""
    return tuple(0 if t is None else t.stride(axis) for t in tensors for axis in (0, 1))
