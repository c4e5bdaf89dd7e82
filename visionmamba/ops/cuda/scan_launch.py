"""Which of the scans' kernels run: the structures of scan.cu, the choice by shape, launches.

What the structures point into, scan.py and fused_scan.py prepare.
"""

import ctypes
from typing import Literal, NamedTuple

import torch

from visionmamba.ops.cuda.driver import Kernels, kernels

STATES = 16
"""States of a tile."""
GROUP = 8
"""Tokens of a turn; the state entering each group is what a backward needs."""
BACKWARD_WARPS = 4
"""Warps of a ring in the backward, which give parts of the parameters' gradients."""
SCRATCH_BYTES = 1 << 30
"""Most memory for the states of a backward; larger batches go in parts."""
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Activations' dtypes in the names of kernels."""
_FORWARD_WARPS, _PARTS, _MAX_RINGS = 4, 8, 3
_MANY = 8
"""Sequence tiles a multiprocessor from which on one warp scans each alone."""
_SEQUENCES_AT_ONCE, _BACKWARDS_AT_ONCE = 20, 12
"""Such warps of a multiprocessor. A launch that fills the GPU may start before the kernel before it
has ended; a smaller one would crowd on the first multiprocessors that are free."""
_SHORTEST_CHUNKED, _SHORTEST_CHUNK = 512, 64
"""Tokens from which on a lone sequence is cut in chunks, and of the shortest chunk."""


class DirectionStructure(ctypes.Structure):
    """Direction of scan.cu; strides in bytes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "dt", "B", "C", "dy", "dt_weight")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "initial_state")),
        *((name, ctypes.c_void_p) for name in ("dlast_state", "y", "dx", "ddt", "last_state")),
        *((name, ctypes.c_void_p) for name in ("drows", "dA", "dD", "ddt_bias", "ddt_weight")),
        ("dinitial_state", ctypes.c_void_p),
        *((f"{name}_batch", ctypes.c_int64) for name in ("x", "dt", "B", "C", "dy")),
        *((f"{name}_token", ctypes.c_int32) for name in ("x", "dt", "B", "C", "dy")),
        ("reverse", ctypes.c_int32),
    )


class ProblemStructure(ctypes.Structure):
    """Problem of scan.cu."""

    _fields_ = (
        ("direction", DirectionStructure * 2),
        *((name, ctypes.c_void_p) for name in ("states", "carry", "carry_dt")),
        *((name, ctypes.c_int32) for name in ("batch", "length", "channels", "num_directions")),
        *((name, ctypes.c_int32) for name in ("chunk_length", "num_chunks", "first_length")),
        *((name, ctypes.c_int32) for name in ("first_chunk", "chunks_here", "rank", "width")),
        ("partial_stride", ctypes.c_int64),
    )


def run_forward(
    problem: ProblemStructure,
    suffix: str,
    device: torch.device,
    *,
    makes: Literal["y", "states", "both"],
) -> None:
    """Launch the kernels that fit the shape: a warp a sequence, rings, or chunks and rings."""
    on = kernels("scan", device)
    tiles = problem.num_directions * problem.batch * -(-problem.channels // STATES)
    if tiles >= _MANY * on.num_multiprocessors:
        kind = "sequence" if makes == "y" else f"sequence_{makes}"
        early = tiles >= _SEQUENCES_AT_ONCE * on.num_multiprocessors
        on.launch(f"scan_{kind}_kernel_{suffix}", problem, tiles, 32, starts_early=early)
        return
    name = f"scan_{'forward' if makes == 'y' else makes}_kernel_{suffix}"
    problem.first_length = problem.length
    problem.first_chunk, problem.chunks_here = 0, 1
    chunks = chunks_of(problem.length, _MAX_RINGS * on.num_multiprocessors // tiles)
    if chunks is None:
        _launch_rings(on, name, problem, tiles, _FORWARD_WARPS)
        return
    problem.first_length, problem.chunk_length, following = chunks
    problem.num_chunks = following + 1
    num_carried = tiles * problem.num_chunks
    carry = torch.empty(num_carried * (STATES * STATES + 64), dtype=torch.float32, device=device)
    problem.carry = carry.data_ptr()
    problem.carry_dt = problem.carry + num_carried * STATES * STATES * 4
    # the first chunk beside the ends of those after it but the last, then those after it
    on.launch(
        name, problem, -(-tiles // _MAX_RINGS), 32 * _FORWARD_WARPS * _MAX_RINGS, starts_early=True
    )
    if following > 1:
        ends = f"scan_chunks_kernel_{suffix}"
        _launch_rings(on, ends, problem, tiles * (following - 1), _PARTS, starts_early=True)
    problem.first_chunk, problem.chunks_here = 1, following
    _launch_rings(on, name, problem, tiles * following, _FORWARD_WARPS)


class Chunks(NamedTuple):
    """How a lone sequence is cut; the last chunk may be shorter."""

    first_length: int
    """Tokens of the first chunk, a multiple of GROUP."""
    length: int
    """Tokens of the others, likewise."""
    following: int
    """Chunks after the first."""


def chunks_of(num_tokens: int, at_once: int) -> Chunks | None:
    """Return the chunks of a sequence, or None where it is better left whole.

    The first chunk takes about as long as the ends of the others, beside which it runs, when it is
    two thirds of their length.

    Args:
        num_tokens: of the sequence.
        at_once: rings that the GPU runs at once for each tile of the sequence's channels.
    """
    length = max(_SHORTEST_CHUNK, -(-3 * num_tokens // (3 * at_once + 2) // GROUP) * GROUP)
    if at_once < 4 or num_tokens < _SHORTEST_CHUNKED or num_tokens <= length:
        return None
    following = -(-num_tokens // length) - 1
    first_length = -(-(num_tokens - following * length) // GROUP) * GROUP
    return Chunks(first_length, length, following)


def run_backward(
    problem: ProblemStructure, suffix: str, k_steps: int, device: torch.device
) -> None:
    """Launch rings, or a warp a sequence; k_steps: of 16 columns of dt_r, 0 where dt is given."""
    on = kernels("scan", device)
    tiles = problem.num_directions * problem.batch * (problem.channels // STATES)
    per_warp = backward_shared_bytes(k_steps)
    if warps_share_backward(problem, on):
        shared = (BACKWARD_WARPS * STATES * STATES * 4, BACKWARD_WARPS * per_warp)
        _launch_rings(
            on, f"scan_backward_kernel_{suffix}", problem, tiles, BACKWARD_WARPS, shared=shared
        )
    else:
        name = f"scan_sequence_backward_kernel_{suffix}"
        early = tiles >= _BACKWARDS_AT_ONCE * on.num_multiprocessors
        on.launch(name, problem, tiles, 32, shared_bytes=per_warp, starts_early=early)


def warps_share_backward(problem: ProblemStructure, on: Kernels) -> bool:
    """Return whether rings of warps run the backward, or one warp each sequence tile."""
    tiles = problem.num_directions * problem.batch * (problem.channels // STATES)
    return bool(tiles < _MANY * on.num_multiprocessors)


def backward_shared_bytes(k_steps: int) -> int:
    """Return the shared memory of a warp in the backward: BackwardWarp in scan.cu."""
    token = (64 if k_steps else 96) + 32 * k_steps + 64 + (16 if k_steps == 2 else 0)
    return 2 * (512 + 8 * token) + 512 + 7 * 1024 + max(k_steps, 1) * 1024


def _launch_rings(
    on: Kernels,
    name: str,
    problem: ProblemStructure,
    num_rings: int,
    num_warps: int,
    *,
    shared: tuple[int, int] = (0, 0),
    starts_early: bool = False,
) -> None:
    """Run a kernel of rings of warps, as many a block as make the multiprocessors even.

    shared: bytes of dynamic shared memory that a ring needs for its slots and its warps; fewer
        rings share a block where they do not fit.
    starts_early: start early even where the kernel does not fill the GPU.
    """
    per_ring = sum(shared)
    most = min(_MAX_RINGS, on.shared_bytes // per_ring) if per_ring else _MAX_RINGS
    rings = min(most, -(-num_rings // on.num_multiprocessors))
    on.launch(
        name,
        problem,
        -(-num_rings // rings),
        32 * num_warps * rings,
        shared_bytes=per_ring * rings,
        starts_early=starts_early or rings == _MAX_RINGS,
    )
