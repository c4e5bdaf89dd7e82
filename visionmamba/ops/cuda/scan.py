"""The scans on tensors whose step sizes are given: any length, channels and number of states.

Every function expects what the faces of the ops have checked: tensors of one GPU, activations of
one dtype out of float32, bfloat16 and float16, parameters and states float32.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops.cuda import scan_launch
from visionmamba.ops.cuda.driver import kernels
from visionmamba.ops.cuda.scan_launch import (
    BACKWARD_WARPS,
    GROUP,
    NAMES,
    STATES,
    ProblemStructure,
    run_backward,
    run_forward,
    warps_share_backward,
)

_FORWARD_READS, _BACKWARD_READS = (2, 2), (8, 4)
"""Neighbouring channels and states that the kernels read at once."""


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
    at_once = max(
        1, scan_launch.SCRATCH_BYTES // (len(directions) * tiles * groups * STATES * STATES * 2)
    )
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
        self.problem = ProblemStructure(
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
    suffix = NAMES[x.dtype] + ("_softplus" if dt_softplus else "")
    if states is not None:
        launch.problem.states = states.data_ptr()
    makes: Literal["y", "both"] = "y" if states is None else "both"
    run_forward(launch.problem, suffix, x.device, makes=makes)
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
    launch = _Launch(directions)
    problem = launch.problem
    problem.states, problem.width = states.data_ptr(), 2 * STATES
    adds = not torch.are_deterministic_algorithms_enabled()
    tiles = channels // STATES
    parts = 1
    if not adds:
        problem.partial_stride = batch * length * 2 * STATES
        parts = batch * (
            BACKWARD_WARPS if warps_share_backward(problem, kernels("scan", x.device)) else 1
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
    run_backward(problem, NAMES[x.dtype] + ("_softplus" if dt_softplus else ""), 0, x.device)
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
