"""Both scans of a mixer with the step sizes made inside: dt_r, B and C are read where they lie.

Sizes that the kernels do not take so go through the scans with given step sizes.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops.cuda import scan_launch
from visionmamba.ops.cuda.scan import Direction, Gradients, scan_backward, scan_forward
from visionmamba.ops.cuda.scan_launch import (
    BACKWARD_WARPS,
    GROUP,
    NAMES,
    STATES,
    ProblemStructure,
    run_backward,
    run_forward,
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


def _fused_problem(like: Tensor, width: int, rank: int, **pointers: _Pointers) -> ProblemStructure:
    """Return both scans of contiguous activations `like` (..., B, L, E), and rows of a width."""
    batch, length, channels = like.shape[-3:]
    size = like.element_size()
    problem = ProblemStructure(
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
    suffix = f"{NAMES[u.dtype]}_rank{dt_weight.shape[2]}"
    if states is None:
        run_forward(problem, suffix, u.device, makes="y")
    else:
        problem.states = states.data_ptr()
        run_forward(problem, suffix, u.device, makes="both")
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
    suffix = f"{NAMES[y[0].dtype]}_rank{weights.shape[2]}"
    run_forward(problem, suffix, y[0].device, makes="y")
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
    problem: ProblemStructure, columns: int, device: torch.device, states: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return drows (2, B, L, P), ddt_weight, ddt_bias, dA and dD (2, E, ...) of a problem.

    columns: of the weights of the step sizes, padding included.
    """
    batch, length, channels = problem.batch, problem.length, problem.channels
    tiles = channels // STATES
    adds = not torch.are_deterministic_algorithms_enabled()
    row_copies, parts = (1, 1) if adds else (tiles, batch * BACKWARD_WARPS)
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
        at_once = min(
            batch, max(1, scan_launch.SCRATCH_BYTES // (2 * num_state_values(1, length, channels)))
        )
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
            run_forward(problem, f"bfloat16_rank{columns}", device, makes="states")
        run_backward(problem, f"bfloat16_rank{columns}", columns // 16, device)
    drows, ddt_weight, ddt_bias, dA, dD = (
        view.sum(dim) if view.shape[dim] > 1 else view.select(dim, 0)
        for view, dim in zip(views, (0, 1, 1, 1, 1), strict=True)
    )
    return drows, ddt_weight[..., : problem.rank], ddt_bias[..., 0], dA, dD[..., 0]


def _advance(
    direction: Any, problem: ProblemStructure, sequences: int, part_numbers: dict[str, int]
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
        **{name: 4 * BACKWARD_WARPS * numbers for name, numbers in part_numbers.items()},
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
    padding = (0, width - given_width)
    rows = _packed((F.pad(projected[0], padding), F.pad(projected[1], padding)))
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
