"""The selective scan in plain PyTorch operations, for any device and without a compiler.

All chunks of the sequence advance together, one position of the chunk a step, so L tokens take
about 3 sqrt(L) steps of large tensor operations. Decays are only ever multiplied, never divided
by, so underflow and large dt are harmless.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops._checks import as_stored

_SLICE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class ScanGradients:
    """Gradients of the bare recurrence in the compute dtype, and the output recomputed for them."""

    y: Tensor
    dx: Tensor
    ddt: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor
    dinitial_state: Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64 inputs (gradient checks) and float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    *,
    reverse: bool,
    checkpoint_length: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the bare recurrence (dt is the final step size, no gate).

    Args:
        x, dt: (B, L, E); A: (E, N); B, C: (B, L, N); D: (E,); initial_state: (B, E, N); all of
            one floating dtype.
        reverse: scan from token L-1 to 0.
        checkpoint_length: when given, also collect the states that enter each run of so many
            tokens.

    Returns:
        y (B, L, E), last_state (B, E, N) and checkpoints (B, ceil(L / checkpoint_length), E, N),
        empty when not asked for.
    """
    batch, length, d_inner = x.shape
    layout = _Layout(length, reverse)
    if checkpoint_length is not None:
        layout = _Layout(length, reverse, math.gcd(layout.chunk, checkpoint_length))
    state = x.new_zeros(batch, d_inner, A.shape[1]) if initial_state is None else initial_state
    dt_chunks, B_chunks, C_chunks = layout.split(dt), layout.split(B), layout.split(C)
    drive = layout.split(dt * x)
    entering, last_state = _entering_states(dt_chunks, A, B_chunks, drive, state)
    h = entering
    outputs = []
    for step in range(layout.chunk):
        h = torch.exp(dt_chunks[:, :, step, :, None] * A) * h
        h = h + drive[:, :, step, :, None] * B_chunks[:, :, step, None, :]
        outputs.append(torch.matmul(h, C_chunks[:, :, step, :, None]).squeeze(-1))
    y = layout.join(torch.stack(outputs, dim=2))
    if D is not None:
        y = y + D * x
    if checkpoint_length is None:
        return y, last_state, x.new_empty(batch, 0, d_inner, A.shape[1])
    stride = checkpoint_length // layout.chunk
    return y, last_state, entering[:, ::stride].contiguous()


def scan_backward(
    dy: Tensor,
    dlast_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    *,
    reverse: bool,
) -> ScanGradients:
    """Return the gradients of `scan_forward`, a slice of channels at a time to bound memory."""
    length, d_inner = x.shape[1:]
    slice_width = _SLICE_BYTES // (x.shape[0] * length * A.shape[1] * x.element_size())
    slice_width = max(1, min(d_inner, slice_width))
    parts = []
    for start in range(0, d_inner, slice_width):
        own = slice(start, start + slice_width)
        parts.append(
            _slice_backward(
                dy[..., own],
                None if dlast_state is None else dlast_state[:, own],
                x[..., own],
                dt[..., own],
                A[own],
                B,
                C,
                None if D is None else D[own],
                None if initial_state is None else initial_state[:, own],
                _Layout(length, reverse),
            )
        )
    return ScanGradients(
        y=torch.cat([part.y for part in parts], dim=-1),
        dx=torch.cat([part.dx for part in parts], dim=-1),
        ddt=torch.cat([part.ddt for part in parts], dim=-1),
        dA=torch.cat([part.dA for part in parts]),
        dB=torch.stack([part.dB for part in parts]).sum(0),
        dC=torch.stack([part.dC for part in parts]).sum(0),
        dD=torch.cat([part.dD for part in parts]),
        dinitial_state=torch.cat([part.dinitial_state for part in parts], dim=1),
    )


class _Layout:
    """Cut a sequence into chunks and put it together again; the scan always runs upwards inside."""

    def __init__(self, length: int, reverse: bool, chunk: int | None = None) -> None:
        self.length = length
        self.reverse = reverse
        self.chunk = chunk or min(64, 2 ** math.ceil(math.log2(length) / 2))
        self.num_chunks = -(-length // self.chunk)

    def split(self, values: Tensor) -> Tensor:
        if self.reverse:
            values = values.flip(1)
        # A padded token has dt = 0: it neither decays nor drives the state.
        padded = F.pad(values, (0, 0, 0, self.num_chunks * self.chunk - self.length))
        return padded.reshape(len(values), self.num_chunks, self.chunk, values.shape[2])

    def join(self, chunks: Tensor) -> Tensor:
        values = chunks.flatten(1, 2)[:, : self.length]
        return values.flip(1) if self.reverse else values.contiguous()


def _entering_states(
    dt: Tensor, A: Tensor, B: Tensor, drive: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the states entering the chunks (B, chunks, E, N) and leaving the last (B, E, N)."""
    num_chunks = dt.shape[1]
    h = torch.zeros_like(state).unsqueeze(1).repeat(1, num_chunks, 1, 1)
    for step in range(dt.shape[2]):
        h = torch.exp(dt[:, :, step, :, None] * A) * h
        h = h + drive[:, :, step, :, None] * B[:, :, step, None, :]
    decay = torch.exp(dt.sum(2)[..., None] * A)
    entering = []
    for chunk in range(num_chunks):
        entering.append(state)
        state = decay[:, chunk] * state + h[:, chunk]
    return torch.stack(entering, dim=1), state


def _slice_backward(
    dy: Tensor,
    dlast_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    layout: _Layout,
) -> ScanGradients:
    state_shape = (x.shape[0], x.shape[2], A.shape[1])
    first = x.new_zeros(state_shape) if initial_state is None else initial_state
    dt_chunks, B_chunks, C_chunks = layout.split(dt), layout.split(B), layout.split(C)
    drive, dy_chunks = layout.split(dt * x), layout.split(dy)
    h, _ = _entering_states(dt_chunks, A, B_chunks, drive, first)
    decays, states = [], [h]
    for step in range(layout.chunk):
        decays.append(torch.exp(dt_chunks[:, :, step, :, None] * A))
        h = decays[step] * h + drive[:, :, step, :, None] * B_chunks[:, :, step, None, :]
        states.append(h)

    # What a chunk hands back to the one before it, first as if nothing came from later chunks.
    carry = torch.zeros_like(h)
    for step in reversed(range(layout.chunk)):
        carry = carry + dy_chunks[:, :, step, :, None] * C_chunks[:, :, step, None, :]
        carry = decays[step] * carry
    total_decay = torch.exp(dt_chunks.sum(2)[..., None] * A)
    incoming = []
    adjoint = x.new_zeros(state_shape) if dlast_state is None else dlast_state
    for chunk in reversed(range(layout.num_chunks)):
        incoming.append(adjoint)
        adjoint = total_decay[:, chunk] * adjoint + carry[:, chunk]
    lam = torch.stack(incoming[::-1], dim=1)

    dA = torch.zeros_like(A)
    outputs: list[tuple[Tensor, ...]] = []
    for step in reversed(range(layout.chunk)):
        lam = lam + dy_chunks[:, :, step, :, None] * C_chunks[:, :, step, None, :]
        decayed = lam * decays[step] * states[step]
        dA = dA + (decayed * dt_chunks[:, :, step, :, None]).sum((0, 1))
        outputs.append(
            (
                torch.matmul(states[step + 1], C_chunks[:, :, step, :, None]).squeeze(-1),
                torch.matmul(lam, B_chunks[:, :, step, :, None]).squeeze(-1),
                (decayed * A).sum(-1),
                torch.matmul(drive[:, :, step, None, :], lam).squeeze(-2),
                torch.matmul(dy_chunks[:, :, step, None, :], states[step + 1]).squeeze(-2),
            )
        )
        lam = decays[step] * lam
    y, dinput, ddt, dB, dC = (
        layout.join(torch.stack(values[::-1], dim=2)) for values in zip(*outputs, strict=True)
    )
    dx = dinput * dt
    if D is not None:
        y = y + D * x
        dx = dx + D * dy
    return ScanGradients(
        y=y,
        dx=dx,
        ddt=ddt + dinput * x,
        dA=dA,
        dB=dB,
        dC=dC,
        dD=(dy * x).sum((0, 1)),
        dinitial_state=adjoint,
    )


def selective_scan_chunked(
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
    checkpoint_length: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the whole op's y in x's dtype, last state and checkpoints."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = compute_dtype(x)
        step_size, _ = _step_size(dt.to(dtype), dt_bias, dt_softplus)
        y, last_state, checkpoints = scan_forward(
            x.to(dtype),
            step_size,
            A,
            B.to(dtype),
            C.to(dtype),
            D,
            initial_state,
            reverse=reverse,
            checkpoint_length=checkpoint_length,
        )
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return as_stored(y, x.dtype), last_state.clone(), checkpoints


def selective_scan_backward_chunked(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the nine tensors from x to initial_state, empty for those None."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = compute_dtype(x)
        step_size, slope = _step_size(dt.to(dtype), dt_bias, dt_softplus)
        dscan = dy.to(dtype)
        if z is not None:
            dscan = dscan * F.silu(z.to(dtype))
        grads = scan_backward(
            dscan,
            dlast_state,
            x.to(dtype),
            step_size,
            A,
            B.to(dtype),
            C.to(dtype),
            D,
            initial_state,
            reverse=reverse,
        )
        ddt = grads.ddt if slope is None else grads.ddt * slope
        empty = A.new_empty(0)
        return (
            grads.dx.to(x.dtype),
            ddt.to(dt.dtype),
            grads.dA,
            grads.dB.to(B.dtype),
            grads.dC.to(C.dtype),
            empty if D is None else grads.dD,
            x.new_empty(0) if z is None else silu_gate_gradient(dy, grads.y, z),
            A.new_empty(0) if dt_bias is None else ddt.sum((0, 1)),
            A.new_empty(0) if initial_state is None else grads.dinitial_state,
        )


def silu_gate_gradient(dy: Tensor, ungated: Tensor, z: Tensor) -> Tensor:
    """Return the gradient of z in y = ungated * silu(z), in z's dtype."""
    gate = z.to(ungated.dtype)
    sigmoid = torch.sigmoid(gate)
    return (dy * ungated * sigmoid * (1 + gate * (1 - sigmoid))).to(z.dtype)


def _step_size(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the final step size and, with softplus, its slope with respect to what went in."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if not dt_softplus:
        return dt, None
    return F.softplus(dt), torch.sigmoid(dt)
