"""The compiled kernels as Python functions on tensors: structures shared with scan.cu, launches.

Every function expects what the faces of the ops have checked: tensors of one GPU, activations of
one dtype out of float32, bfloat16 and float16, parameters and states float32.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops.cuda.driver import Kernels, kernels

STATES = 16
"""States of a tile; more are scanned in slices of as many."""
GROUP = 8
"""Tokens of a turn; the state entering each group is what a backward needs."""
_FORWARD_WARPS, _BACKWARD_WARPS, _PARTS, _MAX_RINGS = 4, 4, 8, 3
_MANY = 8
"""Sequence tiles a multiprocessor from which on one warp scans each alone."""
_SEQUENCES_AT_ONCE, _BACKWARDS_AT_ONCE = 20, 12
"""Such warps of a multiprocessor. A launch that fills the GPU may start before the kernel before it
has ended; a smaller one would crowd on the first multiprocessors that are free."""
_SHORTEST_CHUNKED = 512
"""Tokens from which on a lone sequence is cut in chunks."""
_SCRATCH_BYTES = 1 << 30
_FORWARD_READS, _BACKWARD_READS = (2, 2), (8, 4)
"""Neighbouring channels and states that the kernels read at once."""
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One scan: activations (B, L, E) and (B, L, N), parameters (E, N) and (E,), entering state."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    reverse: bool


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradients of one scan: dx and ddt in the activations' dtype, the others float32."""

    dx: Tensor
    ddt: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor | None
    ddt_bias: Tensor
    dinitial_state: Tensor | None


class _Direction(ctypes.Structure):
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


class _Problem(ctypes.Structure):
    _fields_ = (
        ("direction", _Direction * 2),
        *((name, ctypes.c_void_p) for name in ("states", "carry", "carry_dt")),
        *((name, ctypes.c_int32) for name in ("batch", "length", "channels", "num_directions")),
        *((name, ctypes.c_int32) for name in ("chunk_length", "num_chunks", "rank", "width")),
        ("partial_stride", ctypes.c_int64),
    )


def scan_forward(
    directions: Sequence[Direction], *, dt_softplus: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return y (B, L, E) and the last state (B, E, N) of each direction."""
    shape, d_state = directions[0].x.shape, directions[0].A.shape[1]
    totals: list[Tensor] = []
    states: list[list[Tensor]] = [[] for _ in directions]
    for sliced in _slices(directions, multiple=2, reads=_FORWARD_READS):
        for i, (y, last_state) in enumerate(_forward(sliced, dt_softplus, None)):
            if len(totals) < len(directions):
                totals.append(y)
            else:
                totals[i] = totals[i] + y
            states[i].append(last_state)
    return [
        (y[..., : shape[2]], _cat(parts, -1)[:, : shape[2], :d_state])
        for y, parts in zip(totals, states, strict=True)
    ]


def scan_backward(
    directions: Sequence[Direction],
    dy: Sequence[Tensor],
    dlast_state: Sequence[Tensor | None],
    *,
    dt_softplus: bool,
) -> tuple[list[Gradients], list[Tensor]]:
    """Return all gradients of each direction, and y: the forward runs again for its states."""
    batch, length, channels = directions[0].x.shape
    d_state = directions[0].A.shape[1]
    tiles = (channels + STATES - 1) // STATES
    groups = (length + GROUP - 1) // GROUP
    at_once = max(1, _SCRATCH_BYTES // (len(directions) * tiles * groups * STATES * STATES * 2))
    rows: list[list[list[Gradients]]] = [[] for _ in directions]
    ys: list[list[Tensor]] = [[] for _ in directions]
    for start in range(0, batch, at_once):
        part = slice(start, min(start + at_once, batch))
        parts: list[list[Gradients]] = [[] for _ in directions]
        values: list[list[Tensor]] = [[] for _ in directions]
        for index, sliced in enumerate(
            _slices([_rows(d, part) for d in directions], multiple=STATES, reads=_BACKWARD_READS)
        ):
            states = slice(index * STATES, (index + 1) * STATES)
            given = [
                None if d is None else _padded(d[part, :, states].contiguous(), sliced[0].A.shape)
                for d in dlast_state
            ]
            scratch = dy[0].new_empty(
                len(directions) * (part.stop - start) * tiles * groups * STATES * STATES
            )
            for i, (y, _) in enumerate(_forward(sliced, dt_softplus, scratch)):
                values[i].append(y)
            for i, gradients in enumerate(
                _backward(sliced, [d[part] for d in dy], given, scratch, dt_softplus)
            ):
                parts[i].append(gradients)
        for i, of_direction in enumerate(parts):
            rows[i].append(of_direction)
            ys[i].append(_total(values[i]))
    gradients_of_all = [
        _joined(direction, of_direction, channels, d_state)
        for direction, of_direction in zip(directions, rows, strict=True)
    ]
    return gradients_of_all, [_cat(parts_of_y, 0)[..., :channels] for parts_of_y in ys]


def _rows(direction: Direction, part: slice) -> Direction:
    state = direction.initial_state
    return replace(
        direction,
        **{name: getattr(direction, name)[part] for name in ("x", "dt", "B", "C")},
        initial_state=None if state is None else state[part],
    )


def _joined(
    direction: Direction, rows: list[list[Gradients]], channels: int, d_state: int
) -> Gradients:
    """Return the gradients of a direction from those of parts of the batch and of the states."""

    def over_batch(name: str, *, states: bool) -> Tensor:
        values = []
        for of_part in rows:
            found = [getattr(gradients, name) for gradients in of_part]
            values.append(_cat(found, -1)[..., :d_state] if states else _total(found))
        return _cat(values, 0)

    def summed(name: str, *, states: bool) -> Tensor:
        values = []
        for of_part in rows:
            found = [getattr(gradients, name) for gradients in of_part]
            values.append(_cat(found, -1)[..., :d_state] if states else found[0])
        return _total(values)[:channels]

    initial = direction.initial_state
    return Gradients(
        dx=over_batch("dx", states=False)[..., :channels],
        ddt=over_batch("ddt", states=False)[..., :channels],
        dB=over_batch("dB", states=True),
        dC=over_batch("dC", states=True),
        dA=summed("dA", states=True),
        dD=None if direction.D is None else summed("dD", states=False),
        ddt_bias=_total([gradients.ddt_bias for of_part in rows for gradients in of_part])[
            :channels
        ],
        dinitial_state=None
        if initial is None
        else over_batch("dinitial_state", states=True)[:, :channels],
    )


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _total(tensors: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _slices(
    directions: Sequence[Direction], *, multiple: int, reads: tuple[int, int]
) -> list[list[Direction]]:
    """Return the directions with whole pairs or tiles of channels, once a slice of 16 states.

    Only the first slice keeps D, so that the slices add up.
    """
    channels, d_state = directions[0].A.shape
    width = -(-channels // multiple) * multiple
    slices = []
    for start in range(0, d_state, STATES):
        states = slice(start, start + STATES)
        slices.append(
            [
                Direction(
                    x=_as_read(_widened(d.x, width), reads[0]),
                    dt=_as_read(_widened(d.dt, width), reads[0]),
                    A=_padded(d.A[:, states], (width, STATES)).contiguous(),
                    B=_as_read(_widened(d.B[..., states], STATES), reads[1]),
                    C=_as_read(_widened(d.C[..., states], STATES), reads[1]),
                    D=None if d.D is None or start else _widened(d.D, width).contiguous(),
                    dt_bias=None if d.dt_bias is None else _widened(d.dt_bias, width).contiguous(),
                    initial_state=None
                    if d.initial_state is None
                    else _padded(d.initial_state[..., states], (width, STATES)).contiguous(),
                    reverse=d.reverse,
                )
                for d in directions
            ]
        )
    return slices


def _widened(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    rows, columns = shape[0] - tensor.shape[-2], shape[1] - tensor.shape[-1]
    return F.pad(tensor, (0, columns, 0, rows)) if rows or columns else tensor


def _as_read(tensor: Tensor, at_once: int) -> Tensor:
    """Return a (B, L, width) tensor readable so many elements at once, copied only if needed."""
    size = tensor.element_size()
    places = (tensor.data_ptr(), tensor.stride(0) * size, tensor.stride(1) * size)
    if tensor.stride(2) == 1 and not any(place % (at_once * size) for place in places):
        return tensor
    return tensor.contiguous()


class _Launch:
    """One problem for the kernels: its structure, and the tensors that it points into."""

    def __init__(self, directions: Sequence[Direction]) -> None:
        x = directions[0].x
        self.problem = _Problem(
            batch=x.shape[0],
            length=x.shape[1],
            channels=x.shape[2],
            num_directions=len(directions),
            chunk_length=x.shape[1],
            num_chunks=1,
        )
        self.tiles = len(directions) * x.shape[0] * ((x.shape[2] + STATES - 1) // STATES)
        self._alive: list[Tensor] = []
        for i, direction in enumerate(directions):
            self.problem.direction[i].reverse = direction.reverse
            for name in ("x", "dt", "B", "C"):
                self.point(i, name, getattr(direction, name))
            for name in ("A", "D", "dt_bias", "initial_state"):
                self.point(i, name, getattr(direction, name))

    def point(self, i: int, name: str, tensor: Tensor | None) -> None:
        """Set a pointer of direction i, and the strides of what is read as it lies."""
        if tensor is None:
            return
        self._alive.append(tensor)
        direction = self.problem.direction[i]
        setattr(direction, name, tensor.data_ptr())
        if hasattr(direction, f"{name}_token"):
            setattr(direction, f"{name}_batch", tensor.stride(0) * tensor.element_size())
            setattr(direction, f"{name}_token", tensor.stride(1) * tensor.element_size())

    def use(self, name: str, tensor: Tensor) -> None:
        """Set a pointer of the whole problem."""
        self._alive.append(tensor)
        setattr(self.problem, name, tensor.data_ptr())


def _forward(
    directions: Sequence[Direction], dt_softplus: bool, states: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    x = directions[0].x
    batch, length, channels = x.shape
    launch = _Launch(directions)
    results = []
    for i in range(len(directions)):
        y = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
        last_state = torch.empty((batch, channels, STATES), dtype=torch.float32, device=x.device)
        launch.point(i, "y", y)
        launch.point(i, "last_state", last_state)
        results.append((y, last_state))
    suffix = _NAMES[x.dtype] + ("_softplus" if dt_softplus else "")
    if states is not None:
        launch.problem.states = states.data_ptr()
    makes: Literal["y", "both"] = "y" if states is None else "both"
    _run_forward(launch.problem, suffix, x.device, makes=makes)
    return results


def _run_forward(
    problem: _Problem, suffix: str, device: torch.device, *, makes: Literal["y", "states", "both"]
) -> None:
    """Launch the kernels that fit the shape: a warp a sequence, rings, or chunks and rings."""
    on = kernels("scan", device)
    tiles = problem.num_directions * problem.batch * -(-problem.channels // STATES)
    if tiles >= _MANY * on.num_multiprocessors:
        kind = "sequence" if makes == "y" else f"sequence_{makes}"
        early = tiles >= _SEQUENCES_AT_ONCE * on.num_multiprocessors
        on.launch(f"scan_{kind}_kernel_{suffix}", problem, tiles, 32, starts_early=early)
        return
    num_chunks = _MAX_RINGS * on.num_multiprocessors // tiles
    chunk = -(-problem.length // max(num_chunks, 1) // 64) * 64
    if num_chunks >= 4 and problem.length >= _SHORTEST_CHUNKED and chunk < problem.length:
        num_chunks = -(-problem.length // chunk)
        carry = torch.empty(
            tiles * num_chunks * (STATES * STATES + 64), dtype=torch.float32, device=device
        )
        problem.chunk_length, problem.num_chunks = chunk, num_chunks
        problem.carry = carry.data_ptr()
        problem.carry_dt = problem.carry + tiles * num_chunks * STATES * STATES * 4
        rings = tiles * (num_chunks - 1)
        _launch_rings(on, f"scan_chunks_kernel_{suffix}", problem, rings, _PARTS)
    _launch_rings(
        on,
        f"scan_{'forward' if makes == 'y' else makes}_kernel_{suffix}",
        problem,
        tiles * problem.num_chunks,
        _FORWARD_WARPS,
    )


def _run_backward(problem: _Problem, suffix: str, k_steps: int, device: torch.device) -> None:
    on = kernels("scan", device)
    tiles = problem.num_directions * problem.batch * (problem.channels // STATES)
    per_warp = _backward_shared_bytes(k_steps)
    if _warps_share_backward(problem, on):
        shared = (_BACKWARD_WARPS * STATES * STATES * 4, _BACKWARD_WARPS * per_warp)
        _launch_rings(
            on, f"scan_backward_kernel_{suffix}", problem, tiles, _BACKWARD_WARPS, shared=shared
        )
    else:
        name = f"scan_sequence_backward_kernel_{suffix}"
        early = tiles >= _BACKWARDS_AT_ONCE * on.num_multiprocessors
        on.launch(name, problem, tiles, 32, shared_bytes=per_warp, starts_early=early)


def _warps_share_backward(problem: _Problem, on: Kernels) -> bool:
    """Return whether rings of warps run the backward, or one warp each sequence tile."""
    tiles = problem.num_directions * problem.batch * (problem.channels // STATES)
    return bool(tiles < _MANY * on.num_multiprocessors)


def _backward_shared_bytes(k_steps: int) -> int:
    """Return the shared memory of a warp in the backward: BackwardWarp in scan.cu."""
    token = (64 if k_steps else 96) + 32 * k_steps + 64 + (16 if k_steps == 2 else 0)
    return 2 * (512 + 8 * token) + 512 + 7 * 1024 + max(k_steps, 1) * 1024


def _backward(
    directions: Sequence[Direction],
    dy: Sequence[Tensor],
    dlast_state: Sequence[Tensor | None],
    states: Tensor,
    dt_softplus: bool,
) -> list[Gradients]:
    x = directions[0].x
    batch, length, channels = x.shape
    launch = _Launch(directions)
    problem = launch.problem
    problem.states, problem.width = states.data_ptr(), 2 * STATES
    adds = not torch.are_deterministic_algorithms_enabled()
    tiles = channels // STATES
    parts = 1
    if not adds:
        problem.partial_stride = batch * length * 2 * STATES
        parts = batch * (
            _BACKWARD_WARPS if _warps_share_backward(problem, kernels("scan", x.device)) else 1
        )
    outputs: list[dict[str, Tensor]] = []
    for i, direction in enumerate(directions):
        of_direction = {
            "dx": torch.empty((batch, length, channels), dtype=x.dtype, device=x.device),
            "ddt": torch.empty((batch, length, channels), dtype=x.dtype, device=x.device),
            "dA": torch.zeros((parts, channels, STATES), device=x.device),
            "dD": torch.zeros((parts, channels), device=x.device),
            "ddt_bias": torch.zeros((parts, channels), device=x.device),
            "drows": torch.zeros((1 if adds else tiles, batch, length, 32), device=x.device),
        }
        if direction.initial_state is not None:
            of_direction["dinitial_state"] = torch.empty((batch, channels, STATES), device=x.device)
        rows = torch.cat([direction.B, direction.C], -1)
        launch.point(i, "B", rows)
        launch.point(i, "dy", _as_read(_widened(dy[i], channels), _BACKWARD_READS[0]))
        launch.point(i, "dlast_state", dlast_state[i])
        for name, tensor in of_direction.items():
            launch.point(i, name, tensor)
        outputs.append(of_direction)
    _run_backward(problem, _NAMES[x.dtype] + ("_softplus" if dt_softplus else ""), 0, x.device)
    gradients = []
    for found in outputs:
        total = {
            name: found[name][0] if adds else found[name].sum(0)
            for name in ("dA", "dD", "ddt_bias", "drows")
        }
        dB, dC = torch.split(total.pop("drows"), STATES, -1)
        gradients.append(
            Gradients(
                dx=found["dx"],
                ddt=found["ddt"],
                dinitial_state=found.get("dinitial_state"),
                dB=dB,
                dC=dC,
                **total,
            )
        )
    return gradients


def _launch_rings(
    on: Kernels,
    name: str,
    problem: _Problem,
    num_rings: int,
    num_warps: int,
    *,
    shared: tuple[int, int] = (0, 0),
) -> None:
    """Run a kernel of rings of warps, as many a block as make the multiprocessors even.

    shared: bytes of dynamic shared memory that a ring needs for its slots and its warps; fewer
        rings share a block where they do not fit.
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
        starts_early=rings == _MAX_RINGS,
    )


_Pair = tuple[Tensor, Tensor]
_Pointers = tuple[int, int] | tuple[int | None, int | None]


def _halves(stacked: Tensor) -> _Pointers:
    """Return where both halves of a contiguous (2, ...) tensor begin."""
    first = stacked.data_ptr()
    return first, first + stacked.stride(0) * stacked.element_size()


def _both(pair: tuple[Tensor | None, Tensor | None]) -> _Pointers:
    first, second = pair
    return (
        None if first is None else first.data_ptr(),
        None if second is None else second.data_ptr(),
    )


def _fused_problem(like: Tensor, width: int, rank: int, **pointers: _Pointers) -> _Problem:
    """Return both scans of contiguous activations `like` (..., B, L, E), and rows of a width."""
    batch, length, channels = like.shape[-3:]
    size = like.element_size()
    problem = _Problem(
        batch=batch,
        length=length,
        channels=channels,
        num_directions=2,
        chunk_length=length,
        num_chunks=1,
        rank=rank,
        width=width,
    )
    for i in (0, 1):
        direction = problem.direction[i]
        direction.reverse = i
        for name, pair in pointers.items():
            setattr(direction, name, pair[i])
        direction.B = direction.dt + rank * size
        direction.C = direction.B + STATES * size
        direction.x_token = direction.dy_token = channels * size
        direction.x_batch = direction.dy_batch = length * channels * size
        direction.dt_token = direction.B_token = direction.C_token = width * size
        direction.dt_batch = direction.B_batch = direction.C_batch = length * width * size
    return problem


def _takes_fused(x: Tensor, rank: int, d_state: int, *, backward: bool = False) -> bool:
    """Return whether the scans can make the step sizes themselves, forward or backward."""
    if backward and (x.dtype != torch.bfloat16 or x.shape[-1] % STATES):
        return False
    return (
        x.dtype != torch.float32
        and x.shape[-1] % 2 == 0
        and d_state == STATES
        and rank % 4 == 0
        and rank <= 48
    )


def mixer_scan_forward(
    u: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    rank: int,
    out: Tensor | None = None,
    states: Tensor | None = None,
) -> Tensor:
    """Return y (2, B, L, E) of both directions, the step sizes made inside the scans.

    Every tensor is contiguous.

    Args:
        u: (2, B, L, E) bfloat16 or float16; index 0 is scanned from the first token to the last,
            index 1 from the last to the first.
        projected: (2, B, L, P) in u's dtype, columns [dt_r | B | C | padding].
        dt_weight: (2, E, Rp) in u's dtype, rank padded with zeros to a multiple of 16.
        dt_bias, D: (2, E) float32.
        A: (2, E, N) float32.
        rank: columns of dt_r.
        out: takes y, may be u itself.
        states: (num_state_values,) bfloat16, takes the states that mixer_scan_backward needs; with
            bfloat16 u only.
    """
    y = torch.empty_like(u) if out is None else out
    if not _takes_fused(u, rank, A.shape[2]):
        directions = _with_steps(
            *[(t[0], t[1]) for t in (u, projected, dt_weight, dt_bias, A, D)], rank=rank
        )
        for i, (values, _) in enumerate(scan_forward(directions, dt_softplus=True)):
            y[i] = values
        return y
    problem = _fused_problem(
        u,
        projected.shape[3],
        rank,
        x=_halves(u),
        dt=_halves(projected),
        dt_weight=_halves(dt_weight),
        dt_bias=_halves(dt_bias),
        A=_halves(A),
        D=_halves(D),
        y=_halves(y),
    )
    suffix = f"{_NAMES[u.dtype]}_rank{dt_weight.shape[2]}"
    if states is None:
        _run_forward(problem, suffix, u.device, makes="y")
    else:
        problem.states = states.data_ptr()
        _run_forward(problem, suffix, u.device, makes="both")
    return y


def num_state_values(batch: int, length: int, d_inner: int) -> int:
    """Return the numbers of a buffer for the states of both directions: 2 an element of u."""
    return 2 * batch * -(-d_inner // STATES) * -(-length // GROUP) * STATES * STATES


def mixer_scan_backward(
    dscan: Tensor,
    u: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    rank: int,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, projected, dt_weight, dt_bias, A and D of mixer_scan_forward.

    Activations are bfloat16. dscan (B, L, E) is the gradient of y in both directions. du
    (2, B, L, E) is bfloat16, the others are float32: dprojected (2, B, L, P), ddt_weight
    (2, E, rank), ddt_bias (2, E), dA (2, E, N), dD (2, E). Without the states that the forward
    left they are computed again, for as many sequences at a time as memory allows.
    """
    if not _takes_fused(u, rank, A.shape[2], backward=True):
        directions = _with_steps(
            *[(t[0], t[1]) for t in (u, projected, dt_weight, dt_bias, A, D)], rank=rank
        )
        gradients, _ = scan_backward(directions, [dscan, dscan], [None, None], dt_softplus=True)
        return _stacked(gradients, projected, dt_weight, rank)
    du = torch.empty_like(u)
    problem = _fused_problem(
        u,
        projected.shape[3],
        rank,
        x=_halves(u),
        dy=_both((dscan, dscan)),
        dt=_halves(projected),
        dt_weight=_halves(dt_weight),
        dt_bias=_halves(dt_bias),
        A=_halves(A),
        D=_halves(D),
        dx=_halves(du),
    )
    return (du, *_fused_backward(problem, dt_weight.shape[2], u.device, states))


def bidirectional_forward(
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    initial_state: tuple[Tensor | None, Tensor | None],
) -> list[tuple[Tensor, Tensor]]:
    """Return y (B, L, E) and the last state (B, E, N) of each direction.

    x (B, L, E) and projected (B, L, R + 2N) of one dtype; dt_weight (E, R), dt_bias (E,), A (E, N),
    D (E,) and initial_state (B, E, N) float32. The second direction runs from the last token.
    """
    rank, d_state = dt_weight[0].shape[1], A[0].shape[1]
    if not _takes_fused(x[0], rank, d_state):
        directions = _with_steps(x, projected, dt_weight, dt_bias, A, D, initial_state, rank=rank)
        return scan_forward(directions, dt_softplus=True)
    batch, _, channels = x[0].shape
    x, projected = _packed(x), _packed(projected)
    weights = _padded_weights(dt_weight, x[0].dtype)
    y = torch.empty_like(x[0]), torch.empty_like(x[1])
    last = torch.empty((2, batch, channels, STATES), device=y[0].device)
    kept = tuple(_packed(pair) for pair in (dt_bias, A, D))
    states = tuple(None if state is None else state.contiguous() for state in initial_state)
    problem = _fused_problem(
        x[0],
        projected[0].shape[2],
        rank,
        x=_both(x),
        dt=_both(projected),
        dt_weight=_halves(weights),
        dt_bias=_both(kept[0]),
        A=_both(kept[1]),
        D=_both(kept[2]),
        initial_state=_both((states[0], states[1])),
        y=_both(y),
        last_state=_halves(last),
    )
    suffix = f"{_NAMES[y[0].dtype]}_rank{weights.shape[2]}"
    _run_forward(problem, suffix, y[0].device, makes="y")
    return [(y[0], last[0]), (y[1], last[1])]


def _packed(pair: _Pair) -> _Pair:
    """Return both tensors contiguous and where the kernels can read 16 bytes at once."""
    first, second = (
        tensor.clone() if tensor.data_ptr() % 16 else tensor
        for tensor in (pair[0].contiguous(), pair[1].contiguous())
    )
    return first, second


def _padded_weights(dt_weight: _Pair, dtype: torch.dtype) -> Tensor:
    """Return the weights of the step sizes (2, E, Rp) as the fused scans read them."""
    channels, rank = dt_weight[0].shape
    weights = torch.zeros(
        (2, channels, -(-rank // 16) * 16), dtype=dtype, device=dt_weight[0].device
    )
    for i in (0, 1):
        weights[i, :, :rank] = dt_weight[i]
    return weights


def _fused_backward(
    problem: _Problem, columns: int, device: torch.device, states: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return drows (2, B, L, P), ddt_weight, ddt_bias, dA and dD (2, E, ...) of a problem.

    columns: of the weights of the step sizes, padding included.
    """
    batch, length, channels = problem.batch, problem.length, problem.channels
    tiles = channels // STATES
    adds = not torch.are_deterministic_algorithms_enabled()
    row_copies, parts = (1, 1) if adds else (tiles, batch * _BACKWARD_WARPS)
    shapes: dict[str, tuple[int, ...]] = {
        "drows": (row_copies, 2, batch, length, problem.width),
        "ddt_weight": (2, parts, channels, columns),
        "ddt_bias": (2, parts, channels, 1),
        "dA": (2, parts, channels, STATES),
        "dD": (2, parts, channels, 1),
    }
    sums = torch.zeros(sum(math.prod(shape) for shape in shapes.values()), device=device)
    views, place = [], 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        view = sums[place : place + count].view(shape)
        half = 4 * view.stride(1 if name == "drows" else 0)
        for i in (0, 1):
            setattr(problem.direction[i], name, view.data_ptr() + i * half)
        views.append(view)
        place += count
    problem.partial_stride = 0 if adds else 2 * batch * length * problem.width
    at_once = batch
    kept = states is not None
    if states is None:
        at_once = min(batch, max(1, _SCRATCH_BYTES // (2 * num_state_values(1, length, channels))))
        states = torch.empty(
            num_state_values(at_once, length, channels), dtype=torch.bfloat16, device=device
        )
    problem.states = states.data_ptr()
    part_numbers = {name: math.prod(shapes[name][2:]) for name in list(shapes)[1:]}
    for start in range(0, batch, at_once):
        if start:
            for i in (0, 1):
                _advance(problem.direction[i], problem, at_once, {} if adds else part_numbers)
        problem.batch = min(at_once, batch - start)
        problem.chunk_length, problem.num_chunks = length, 1
        if not kept:
            _run_forward(problem, f"bfloat16_rank{columns}", device, makes="states")
        _run_backward(problem, f"bfloat16_rank{columns}", columns // 16, device)
    drows, ddt_weight, ddt_bias, dA, dD = (
        view.sum(dim) if view.shape[dim] > 1 else view.select(dim, 0)
        for view, dim in zip(views, (0, 1, 1, 1, 1), strict=True)
    )
    return drows, ddt_weight[..., : problem.rank], ddt_bias[..., 0], dA, dD[..., 0]


def _advance(
    direction: Any, problem: _Problem, sequences: int, part_numbers: dict[str, int]
) -> None:
    """Move a direction's pointers over sequences, and over their parts of the parameters' sums."""
    state_bytes = 4 * STATES * problem.channels
    steps = {
        "x": direction.x_batch,
        "dy": direction.dy_batch,
        "dx": direction.x_batch,
        "dt": direction.dt_batch,
        "B": direction.B_batch,
        "C": direction.C_batch,
        "drows": 4 * problem.length * problem.width,
        **dict.fromkeys(("initial_state", "dlast_state", "dinitial_state"), state_bytes),
        **{name: 4 * _BACKWARD_WARPS * numbers for name, numbers in part_numbers.items()},
    }
    for name, of_one in steps.items():
        pointer = getattr(direction, name)
        if pointer is not None:
            setattr(direction, name, pointer + sequences * of_one)


def bidirectional_backward(
    dscan: Tensor,
    dlast_state: tuple[Tensor | None, Tensor | None],
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    initial_state: tuple[Tensor | None, Tensor | None],
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
    """Return dx, dprojected, ddt_weight, ddt_bias, dA, dD and dinitial_state of each direction.

    Arguments as in bidirectional_forward, activations bfloat16; dscan (B, L, E) is the gradient of
    both y. dx and dprojected are bfloat16, the others float32.
    """
    rank, d_state = dt_weight[0].shape[1], A[0].shape[1]
    dtype = x[0].dtype
    if not _takes_fused(x[0], rank, d_state, backward=True):
        directions = _with_steps(x, projected, dt_weight, dt_bias, A, D, initial_state, rank=rank)
        gradients, _ = scan_backward(directions, [dscan, dscan], dlast_state, dt_softplus=True)
        found = []
        for i, of_direction in enumerate(gradients):
            ddt, initial = of_direction.ddt, of_direction.dinitial_state
            assert of_direction.dD is not None
            found.append(
                (
                    of_direction.dx.contiguous(),
                    torch.cat(
                        [
                            ddt @ dt_weight[i].to(dtype),
                            of_direction.dB.to(dtype),
                            of_direction.dC.to(dtype),
                        ],
                        -1,
                    ),
                    (ddt.flatten(0, 1).T @ projected[i][..., :rank].flatten(0, 1)).float(),
                    of_direction.ddt_bias.contiguous(),
                    of_direction.dA.contiguous(),
                    of_direction.dD.contiguous(),
                    None if initial is None else initial.contiguous(),
                )
            )
        return found
    given_width = projected[0].shape[2]
    width = -(-given_width // 8) * 8
    x, dscan = _packed(x), _packed((dscan, dscan))[0]
    rows = _packed((_widened(projected[0], width), _widened(projected[1], width)))
    weights = _padded_weights(dt_weight, dtype)
    kept = tuple(_packed(pair) for pair in (dt_bias, A, D))
    states, dlast = (
        tuple(None if state is None else state.contiguous() for state in pair)
        for pair in (initial_state, dlast_state)
    )
    dinitial = tuple(None if state is None else torch.empty_like(state) for state in states)
    dx = torch.empty_like(x[0]), torch.empty_like(x[1])
    problem = _fused_problem(
        x[0],
        width,
        rank,
        x=_both(x),
        dy=_both((dscan, dscan)),
        dt=_both(rows),
        dt_weight=_halves(weights),
        dt_bias=_both(kept[0]),
        A=_both(kept[1]),
        D=_both(kept[2]),
        dx=_both(dx),
        initial_state=_both((states[0], states[1])),
        dlast_state=_both((dlast[0], dlast[1])),
        dinitial_state=_both((dinitial[0], dinitial[1])),
    )
    drows, ddt_weight, ddt_bias, dA, dD = _fused_backward(problem, weights.shape[2], dx[0].device)
    dprojected = drows[..., :given_width].to(dtype)
    return [
        (
            dx[i],
            dprojected[i],
            ddt_weight[i].contiguous(),
            ddt_bias[i].contiguous(),
            dA[i].contiguous(),
            dD[i].contiguous(),
            dinitial[i],
        )
        for i in (0, 1)
    ]


def _with_steps(
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    initial_state: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    rank: int,
) -> list[Direction]:
    """Return both scans with their step sizes, for the sizes that the fused scans do not take."""
    directions = []
    for i in (0, 1):
        d_state = A[i].shape[1]
        dt_r, B, C, _ = torch.tensor_split(
            projected[i], (rank, rank + d_state, rank + 2 * d_state), -1
        )
        directions.append(
            Direction(
                x=x[i],
                dt=F.linear(dt_r, dt_weight[i][:, :rank].to(dt_r.dtype)),
                A=A[i],
                B=B,
                C=C,
                D=D[i],
                dt_bias=dt_bias[i],
                initial_state=initial_state[i],
                reverse=i == 1,
            )
        )
    return directions


def _stacked(
    gradients: list[Gradients], projected: Tensor, dt_weight: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of mixer_scan_backward from those of two scans with step sizes."""
    dprojected = torch.zeros(projected.shape, device=projected.device)
    ddt_weight = []
    for i, of_direction in enumerate(gradients):
        ddt, end = of_direction.ddt, rank + 2 * of_direction.dB.shape[2]
        torch.cat(
            [ddt @ dt_weight[i, :, :rank], of_direction.dB, of_direction.dC],
            -1,
            out=dprojected[i, ..., :end],
        )
        ddt_weight.append((ddt.flatten(0, 1).T @ projected[i, ..., :rank].flatten(0, 1)).float())

    def both(name: str) -> Tensor:
        return torch.stack([getattr(of_direction, name) for of_direction in gradients])

    return (
        both("dx"),
        dprojected,
        torch.stack(ddt_weight),
        both("ddt_bias"),
        both("dA"),
        both("dD"),
    )
