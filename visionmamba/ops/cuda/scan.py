"""The compiled kernels as Python functions on tensors: structures shared with scan.cu, launches.

Every function expects what the faces of the ops have checked: tensors of one GPU, activations of
one dtype out of float32, bfloat16 and float16, parameters and states float32.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops.cuda.driver import Kernels, kernels

STATES = 16
"""States of a tile; more are scanned in slices of as many."""
GROUP = 8
"""Tokens of a turn; the state entering each group is what a backward needs."""
_WARPS, _PARTS, _MAX_RINGS = 4, 8, 3
_SCRATCH_BYTES = 1 << 30
_SHARED_SLOTS = _MAX_RINGS * _WARPS * 64 * 16
_SHARED_PER_RING = _WARPS * (2 * (64 * 16 + 5 * 256) + 256 + 8 * 64 * 16)
"""Bytes of shared memory of a backward's block: BackwardShared in scan.cu."""
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
        *((name, ctypes.c_void_p) for name in ("x", "dt", "B", "C", "dy")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "initial_state")),
        *((name, ctypes.c_void_p) for name in ("dlast_state", "y", "dx", "ddt", "last_state")),
        *((name, ctypes.c_void_p) for name in ("dB", "dC", "dA", "dD", "ddt_bias")),
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
        *((name, ctypes.c_int32) for name in ("chunk_length", "num_chunks")),
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
    at_once = max(1, _SCRATCH_BYTES // (len(directions) * tiles * groups * STATES * STATES * 4))
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
                len(directions) * (part.stop - start) * tiles * groups * STATES * STATES,
                dtype=torch.float32,
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


class _Gate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "z", "dy", "out", "dz")),
        *((name, ctypes.c_int64) for name in ("z_batch", "dy_batch", "rows")),
        *((name, ctypes.c_int32) for name in ("z_token", "dy_token", "length", "channels")),
        ("scale", ctypes.c_float),
    )


def gate_forward(a: Tensor, b: Tensor | None, z: Tensor, scale: float) -> Tensor:
    """Return scale * (a + b) * silu(z) in z's dtype; all (B, L, E), b may be None."""
    return _gate(a, b, z, None, scale)[0]


def gate_backward(
    dy: Tensor, a: Tensor, b: Tensor | None, z: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a, which is that of b too, and of z."""
    return _gate(a, b, z, dy, scale)


def _gate(
    a: Tensor, b: Tensor | None, z: Tensor, dy: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, length, channels = a.shape
    width = channels + channels % 2
    at_once = 16 // z.element_size()
    wide = width % at_once == 0
    reads = at_once if wide else 2
    a, z = _widened(a, width).contiguous(), _as_read(_widened(z, width), reads)
    b = None if b is None else _widened(b, width).contiguous()
    out, dz = torch.empty_like(a), torch.empty_like(a) if dy is not None else a
    problem = _Gate(
        a=a.data_ptr(),
        b=None if b is None else b.data_ptr(),
        z=z.data_ptr(),
        out=out.data_ptr(),
        dz=dz.data_ptr(),
        z_batch=z.stride(0) * z.element_size(),
        z_token=z.stride(1) * z.element_size(),
        rows=batch * length,
        length=length,
        channels=width,
        scale=scale,
    )
    if dy is not None:
        dy = _as_read(_widened(dy, width), reads)
        problem.dy = dy.data_ptr()
        problem.dy_batch = dy.stride(0) * dy.element_size()
        problem.dy_token = dy.stride(1) * dy.element_size()
    name = f"gate_{'forward' if dy is None else 'backward'}_kernel_{_NAMES[z.dtype]}"
    threads = batch * length * (width // reads)
    kernels("scan", a.device).launch(
        name + ("_wide" if wide else ""), problem, -(-threads // 256), 256
    )
    return out[..., :channels], dz[..., :channels]


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
    on = kernels("scan", x.device)
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
        launch.use("states", states)
    if launch.tiles >= 8 * on.num_multiprocessors:
        kind = "sequence" if states is None else "sequence_states"
        on.launch(f"scan_{kind}_kernel_{suffix}", launch.problem, launch.tiles, 32)
        return results
    num_chunks = 3 * on.num_multiprocessors // launch.tiles
    chunk = -(-length // max(num_chunks, 1) // 64) * 64
    if num_chunks >= 4 and chunk >= 64:
        num_chunks = -(-length // chunk)
        launch.problem.chunk_length, launch.problem.num_chunks = chunk, num_chunks
        carry = torch.empty(
            launch.tiles * num_chunks * (STATES * STATES + 64),
            dtype=torch.float32,
            device=x.device,
        )
        launch.use("carry", carry)
        launch.use("carry_dt", carry[launch.tiles * num_chunks * STATES * STATES :])
        if num_chunks > 1:
            rings = launch.tiles * (num_chunks - 1)
            _launch_rings(on, f"scan_chunks_kernel_{suffix}", launch, rings, _PARTS)
    num_chunks = launch.problem.num_chunks
    _launch_rings(
        on,
        f"scan_{'forward' if states is None else 'states'}_kernel_{suffix}",
        launch,
        launch.tiles * num_chunks,
        _WARPS,
        starts_early=num_chunks > 1,
    )
    return results


def _backward(
    directions: Sequence[Direction],
    dy: Sequence[Tensor],
    dlast_state: Sequence[Tensor | None],
    states: Tensor,
    dt_softplus: bool,
) -> list[Gradients]:
    x = directions[0].x
    batch, length, channels = x.shape
    on = kernels("scan", x.device)
    launch = _Launch(directions)
    launch.use("states", states)
    deterministic = torch.are_deterministic_algorithms_enabled()
    tiles = (channels + STATES - 1) // STATES
    launch.problem.partial_stride = batch * length * STATES if deterministic else 0
    outputs: list[dict[str, Tensor]] = []

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    for i, direction in enumerate(directions):
        of_direction = {
            "dx": empty(batch, length, channels, dtype=x.dtype),
            "ddt": empty(batch, length, channels, dtype=x.dtype),
            "dA": empty(batch * _WARPS, channels, STATES),
            "dD": empty(batch * _WARPS, channels),
            "ddt_bias": empty(batch * _WARPS, channels),
        }
        for name in ("dB", "dC"):
            of_direction[name] = (
                empty(tiles, batch, length, STATES)
                if deterministic
                else torch.zeros((1, batch, length, STATES), device=x.device)
            )
        if direction.initial_state is not None:
            of_direction["dinitial_state"] = empty(batch, channels, STATES)
        launch.point(i, "dy", _as_read(_widened(dy[i], channels), _BACKWARD_READS[0]))
        launch.point(i, "dlast_state", dlast_state[i])
        for name, tensor in of_direction.items():
            launch.point(i, name, tensor)
        outputs.append(of_direction)
    suffix = _NAMES[x.dtype] + ("_softplus" if dt_softplus else "")
    name = f"scan_backward_kernel_{suffix}"
    _launch_rings(on, name, launch, launch.tiles, _WARPS, shared=(_SHARED_SLOTS, _SHARED_PER_RING))
    return [
        Gradients(
            dx=found["dx"],
            ddt=found["ddt"],
            dinitial_state=found.get("dinitial_state"),
            dB=found["dB"].sum(0) if deterministic else found["dB"][0],
            dC=found["dC"].sum(0) if deterministic else found["dC"][0],
            dA=found["dA"].sum(0),
            dD=found["dD"].sum(0),
            ddt_bias=found["ddt_bias"].sum(0),
        )
        for found in outputs
    ]


def _launch_rings(
    on: Kernels,
    name: str,
    launch: _Launch,
    num_rings: int,
    num_warps: int,
    *,
    shared: tuple[int, int] = (0, 0),
    starts_early: bool = False,
) -> None:
    """Run a kernel of rings of warps, as many a block as make the multiprocessors even.

    shared: bytes of dynamic shared memory that a block and each of its rings need; fewer rings
        share a block where they do not fit.
    """
    fixed, per_ring = shared
    most = min(_MAX_RINGS, (on.shared_bytes - fixed) // per_ring) if per_ring else _MAX_RINGS
    rings = min(most, -(-num_rings // on.num_multiprocessors))
    on.launch(
        name,
        launch.problem,
        -(-num_rings // rings),
        32 * num_warps * rings,
        shared_bytes=fixed + per_ring * rings,
        starts_early=starts_early,
    )
