"""The selective scan in Triton: what runs on the GPU. scan.py launches it; nothing else imports it.

One direction, 384 channels, 16 states, softplus and D inside; us, medians of CUDA-graph replays
over inputs beyond the L2 cache; H200, driver 580.159.04, torch 2.11.0+cu130, triton 3.6.0,
2026-11-23. selective_scan_triton and selective_scan_backward_triton of scan.py remake it. Floor:
the exponential unit at 1.98 GHz, forward, each exponential once. *: with a tile less under way.
  (B, L)         forward, bfloat16   floor   share   backward, bfloat16   float32
  (64, 197)             57 *            21     37 %         337 *
  (8, 1025)             56              13     24 %         263 *            274 *
  (8, 6085)            282              80     28 %        1137             1397 *
  (1, 6085)             48              10     21 %         217 *
  (1, 65537)           397 *           108     27 %        1806 *
In plain PyTorch the float32 backward takes 110,000 at (8, 1025) and 569,000 at (8, 6085).

Plan. A program owns a block of channels with all their states and walks a chunk of the sequence in
tiles of a few tokens. A tile is a tensor (TILE, GROUPS, STATES, LANES), channel = group * LANES +
lane: the compiler spreads the last two axes over the lanes of a warp and leaves tokens and groups
in registers, so the recurrence over a tile is a run of multiply-adds in registers, sums over states
and channels take few shuffles, and flipping a tile in time costs nothing. Where the batch is small,
chunks run at once: first what leaves each when zero enters, then what enters each, then the rest.
The backward stores the state that enters every tile, then walks the tiles from the last to the
first. Positions count in scan order; REVERSE maps position p to token L - 1 - p. Tokens beyond the
end get a step of 0, which leaves the state as it is. The state is float32; decays are only ever
multiplied. Bytes a channel and token: forward 3 activations (in chunks 5); backward 7 (in chunks
10), and with 16 states 32 of saved ones, half written and half read.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, assignment"

import functools

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_VARYING = ["length", "chunk_length", "num_chunks", "B_batch", "B_token", "C_batch", "C_token"]
"""Arguments whose values do not call for another compilation; ALIGNED says what matters of some."""


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Return the multiprocessors of a GPU and the threads of a warp (one of 32 on the CPU)."""
    if device.type == "cpu":  # Triton's interpreter
        return 1, 32
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"], driver.get_current_target().warp_size


@triton.jit
def _chain(a, b, c, d):
    """Two steps h -> a h + b and h -> c h + d as one."""
    return a * c, c * b + d


@triton.jit
def _chain_and_entry(a, b, p, q, c, d, r, s):
    """Two steps as one, and beside it what enters the last of them: h -> r h + s."""
    return a * c, c * b + d, a * r, r * b + s


@triton.jit
def _exp2(v, EXACT: tl.constexpr):
    """2^v; EXACT: to the last bit near 1, where an error would repeat over a thousand tokens."""
    if EXACT:
        w = v * LN2
        near = 1.0 + w * (1.0 + w * (0.5 + w * (1 / 6 + w * (1 / 24 + w * (1 / 120)))))
        return tl.where(tl.abs(v) < 0.0625, near, tl.exp2(v))
    return tl.exp2(v)


@triton.jit
def _softplus(v):
    """log(1 + e^v) by the series of the inverse hyperbolic tangent, to float32's precision."""
    w = tl.exp2(-tl.abs(v) * LOG2E)
    s = w / (2.0 + w)  # at most 1/3
    q = s * s
    series = 2 / 5 + q * (2 / 7 + q * (2 / 9 + q * (2 / 11 + q * (2 / 13 + q * (2 / 15)))))
    return tl.maximum(v, 0.0) + s * (2.0 + q * (2 / 3 + q * series))


@triton.jit
def _sigmoid(v):
    w = tl.exp2(-tl.abs(v) * LOG2E)
    return tl.where(v < 0, w, 1.0) / (1.0 + w)


@triton.jit
def _step_size(raw, SOFTPLUS: tl.constexpr):
    if SOFTPLUS:
        return _softplus(raw)
    return raw


@triton.jit
def _tokens(position, length, REVERSE: tl.constexpr):
    if REVERSE:
        position = length - 1 - position
    return position.to(tl.int64)


@triton.jit
def _last_of_tile(values, index, TILE: tl.constexpr):
    return tl.sum(tl.where((index == TILE - 1)[:, None, None, None], values, 0.0), axis=0)


@triton.jit
def _store(ptr, values, mask):
    """Store in the pointer's dtype; float16 stops at its largest number instead of infinity."""
    if ptr.dtype.element_ty == tl.float16:
        values = tl.clamp(values, -65504.0, 65504.0)
    tl.store(ptr, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def chunk_ends_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    dy_ptr,
    dt_bias_ptr,
    ends_ptr,  # (B, chunks, E, N): the state that leaves each chunk when zero enters
    adjoints_ptr,  # (B, chunks, E, N): its mirror image for the backward, or None
    step_sums_ptr,  # (B, chunks, E)
    scale,
    length,
    channels,
    d_state,
    chunk_length,
    num_chunks,
    x_batch,
    x_token,
    dt_batch,
    dt_token,
    B_batch,
    B_token,
    C_batch,
    C_token,
    z_batch,
    z_token,
    dy_batch,
    dy_token,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,  # tiles whose loads are under way at once
    ALIGNED: tl.constexpr,  # bytes that divide the addresses of B's and C's rows
):
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    blocks = tl.cdiv(channels, GROUPS * LANES)
    chunk_row = tl.program_id(0) // blocks  # batch * num_chunks + chunk
    batch = (chunk_row // num_chunks).to(tl.int64)
    start = (chunk_row % num_chunks) * chunk_length
    stop = tl.minimum(start + chunk_length, length)
    channel = tl.program_id(0) % blocks * (GROUPS * LANES)
    channel += tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    state = tl.arange(0, STATES)
    index = tl.arange(0, TILE)
    cell = channel[:, None, :] * d_state + state[None, :, None]
    cell_mask = (channel < channels)[:, None, :] & (state < d_state)[None, :, None]
    A = tl.load(A_ptr + cell, mask=cell_mask, other=0.0) * LOG2E
    bias = tl.zeros((GROUPS, LANES), tl.float32)
    if dt_bias_ptr is not None:
        bias = tl.load(dt_bias_ptr + channel, mask=channel < channels, other=0.0)

    h = tl.zeros((GROUPS, STATES, LANES), tl.float32)
    adjoint = tl.zeros((GROUPS, STATES, LANES), tl.float32)
    passed = tl.full((GROUPS, STATES, LANES), 1.0, tl.float32)
    step_sum = tl.zeros((GROUPS, LANES), tl.float32)
    first = (index == 0)[:, None, None, None]
    for position in tl.range(start, stop, TILE, num_stages=STAGES):
        token = _tokens(position + index, length, REVERSE)
        here = position + index < stop
        mask = here[:, None, None] & (channel < channels)[None]
        state_mask = here[:, None] & (state < d_state)[None, :]
        x_at = batch * x_batch + token[:, None, None] * x_token + channel[None]
        dt_at = batch * dt_batch + token[:, None, None] * dt_token + channel[None]
        B_rows = B_ptr + batch * B_batch + token[:, None] * B_token
        B_rows = tl.multiple_of(B_rows, (ALIGNED, ALIGNED))
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        raw = tl.load(dt_ptr + dt_at, mask=mask, other=0.0).to(tl.float32) + bias[None]
        B = tl.load(B_rows + state[None, :], mask=state_mask, other=0.0).to(tl.float32)
        step = tl.where(mask, _step_size(raw, SOFTPLUS), 0.0)
        decay = _exp2(step[:, :, None, :] * A[None], EXACT)
        drive = (step * x)[:, :, None, :] * B[:, None, :, None]
        drive += tl.where(first, decay * h[None], 0.0)
        since, states = tl.associative_scan((decay, drive), 0, _chain)
        h = _last_of_tile(states, index, TILE)
        step_sum += tl.sum(step, axis=0)
        if adjoints_ptr is not None:
            C_rows = C_ptr + batch * C_batch + token[:, None] * C_token
            C_rows = tl.multiple_of(C_rows, (ALIGNED, ALIGNED))
            dy_at = batch * dy_batch + token[:, None, None] * dy_token + channel[None]
            C = tl.load(C_rows + state[None, :], mask=state_mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32) * scale
            if z_ptr is not None:
                z_at = batch * z_batch + token[:, None, None] * z_token + channel[None]
                z = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
                dy *= z * _sigmoid(z)
            handed_on = tl.sum(since * (dy[:, :, None, :] * C[:, None, :, None]), axis=0)
            adjoint += passed * handed_on
            passed *= _last_of_tile(since, index, TILE)
    row = chunk_row.to(tl.int64) * channels
    tl.store(ends_ptr + row * d_state + cell, h, mask=cell_mask)
    tl.store(step_sums_ptr + row + channel, step_sum, mask=channel < channels)
    if adjoints_ptr is not None:
        tl.store(adjoints_ptr + row * d_state + cell, adjoint, mask=cell_mask)


@triton.jit(do_not_specialize=["num_chunks"])
def fold_chunks_kernel(
    ends_ptr,  # (B, chunks, E, N); becomes what enters each chunk
    step_sums_ptr,
    A_ptr,
    first_ptr,  # (B, E, N) what enters the first chunk, or None for zero
    channels,
    d_state,
    num_chunks,
    FROM_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    cells = channels * d_state
    blocks = tl.cdiv(cells, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    cell = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    A = tl.load(A_ptr + cell, mask=inside, other=0.0) * LOG2E
    h = tl.zeros((BLOCK,), tl.float32)
    if first_ptr is not None:
        h = tl.load(first_ptr + batch * cells + cell, mask=inside, other=0.0)
    for start in range(0, num_chunks, AT_ONCE):
        ends = ()
        sums = ()
        for i in tl.static_range(AT_ONCE):
            chunk = start + i
            mask = cell < tl.where(chunk < num_chunks, cells, 0)
            if FROM_LAST:
                chunk = num_chunks - 1 - chunk
            row = batch * num_chunks + chunk
            ends += (tl.load(ends_ptr + row * cells + cell, mask=mask, other=0.0),)
            at = row * channels + cell // d_state
            sums += (tl.load(step_sums_ptr + at, mask=mask, other=0.0),)
        for i in tl.static_range(AT_ONCE):
            chunk = start + i
            mask = cell < tl.where(chunk < num_chunks, cells, 0)
            if FROM_LAST:
                chunk = num_chunks - 1 - chunk
            row = batch * num_chunks + chunk
            tl.store(ends_ptr + row * cells + cell, h, mask=mask)
            h = tl.exp2(sums[i] * A) * h + ends[i]


@triton.jit(do_not_specialize=_VARYING)
def scan_forward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    dt_bias_ptr,
    entering_ptr,  # (B, chunks, E, N) or None for zero
    other_ptr,  # (B, L, E) contiguous: added before scale and gate, or None
    y_ptr,  # (B, L, E) contiguous
    last_state_ptr,  # (B, E, N)
    scale,
    length,
    channels,
    d_state,
    chunk_length,
    num_chunks,
    x_batch,
    x_token,
    dt_batch,
    dt_token,
    B_batch,
    B_token,
    C_batch,
    C_token,
    z_batch,
    z_token,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,  # tiles whose loads are under way at once
    ALIGNED: tl.constexpr,  # bytes that divide the addresses of B's and C's rows
):
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    blocks = tl.cdiv(channels, GROUPS * LANES)
    chunk_row = tl.program_id(0) // blocks  # batch * num_chunks + chunk
    batch = (chunk_row // num_chunks).to(tl.int64)
    start = (chunk_row % num_chunks) * chunk_length
    stop = tl.minimum(start + chunk_length, length)
    channel = tl.program_id(0) % blocks * (GROUPS * LANES)
    channel += tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    state = tl.arange(0, STATES)
    index = tl.arange(0, TILE)
    cell = channel[:, None, :] * d_state + state[None, :, None]
    cell_mask = (channel < channels)[:, None, :] & (state < d_state)[None, :, None]
    A = tl.load(A_ptr + cell, mask=cell_mask, other=0.0) * LOG2E
    bias = tl.zeros((GROUPS, LANES), tl.float32)
    if dt_bias_ptr is not None:
        bias = tl.load(dt_bias_ptr + channel, mask=channel < channels, other=0.0)
    D = tl.zeros((GROUPS, LANES), tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + channel, mask=channel < channels, other=0.0)
    h = tl.zeros((GROUPS, STATES, LANES), tl.float32)
    if entering_ptr is not None:
        row = chunk_row.to(tl.int64) * channels * d_state
        h = tl.load(entering_ptr + row + cell, mask=cell_mask, other=0.0)

    first = (index == 0)[:, None, None, None]
    for position in tl.range(start, stop, TILE, num_stages=STAGES):
        token = _tokens(position + index, length, REVERSE)
        here = position + index < stop
        mask = here[:, None, None] & (channel < channels)[None]
        state_mask = here[:, None] & (state < d_state)[None, :]
        x_at = batch * x_batch + token[:, None, None] * x_token + channel[None]
        dt_at = batch * dt_batch + token[:, None, None] * dt_token + channel[None]
        B_rows = B_ptr + batch * B_batch + token[:, None] * B_token
        B_rows = tl.multiple_of(B_rows, (ALIGNED, ALIGNED))
        C_rows = C_ptr + batch * C_batch + token[:, None] * C_token
        C_rows = tl.multiple_of(C_rows, (ALIGNED, ALIGNED))
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        raw = tl.load(dt_ptr + dt_at, mask=mask, other=0.0).to(tl.float32) + bias[None]
        B = tl.load(B_rows + state[None, :], mask=state_mask, other=0.0).to(tl.float32)
        C = tl.load(C_rows + state[None, :], mask=state_mask, other=0.0).to(tl.float32)
        step = tl.where(mask, _step_size(raw, SOFTPLUS), 0.0)
        decay = _exp2(step[:, :, None, :] * A[None], EXACT)
        drive = (step * x)[:, :, None, :] * B[:, None, :, None]
        drive += tl.where(first, decay * h[None], 0.0)
        _, states = tl.associative_scan((decay, drive), 0, _chain)
        h = _last_of_tile(states, index, TILE)
        y = tl.sum(states * C[:, None, :, None], axis=2) + D[None] * x
        out_at = (batch * length + token)[:, None, None] * channels + channel[None]
        if other_ptr is not None:
            y += tl.load(other_ptr + out_at, mask=mask, other=0.0).to(tl.float32)
        y *= scale
        if z_ptr is not None:
            z_at = batch * z_batch + token[:, None, None] * z_token + channel[None]
            z = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
            y *= z * _sigmoid(z)
        _store(y_ptr + out_at, y, mask)
    if stop == length:
        tl.store(last_state_ptr + batch * channels * d_state + cell, h, mask=cell_mask)


@triton.jit(do_not_specialize=[*_VARYING, "dB_block"])
def scan_backward_kernel(
    dy_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    dt_bias_ptr,
    entering_ptr,  # (B, chunks, E, N) states, or None for zero
    arriving_ptr,  # (B, chunks, E, N) gradients of the states that leave, or None for zero
    tile_states_ptr,  # (B, chunks, tiles of a chunk, E, N): scratch
    dx_ptr,  # (B, L, E) contiguous, like ddt and dz
    ddt_ptr,
    dz_ptr,
    dA_ptr,  # (B, chunks, E, N)
    dB_ptr,  # (channel blocks, B, L, N), like dC
    dC_ptr,
    dD_ptr,  # (B, chunks, E), like ddt_bias
    ddt_bias_ptr,
    dinitial_state_ptr,  # (B, E, N) or None
    scale,
    length,
    channels,
    d_state,
    chunk_length,
    num_chunks,
    dB_block,
    dy_batch,
    dy_token,
    x_batch,
    x_token,
    dt_batch,
    dt_token,
    B_batch,
    B_token,
    C_batch,
    C_token,
    z_batch,
    z_token,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,  # tiles whose loads are under way at once
    ALIGNED: tl.constexpr,  # bytes that divide the addresses of B's and C's rows
):
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    blocks = tl.cdiv(channels, GROUPS * LANES)
    block = tl.program_id(0) % blocks
    chunk_row = tl.program_id(0) // blocks  # batch * num_chunks + chunk
    batch = (chunk_row // num_chunks).to(tl.int64)
    start = (chunk_row % num_chunks) * chunk_length
    stop = tl.minimum(start + chunk_length, length)
    channel = block * (GROUPS * LANES)
    channel += tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    state = tl.arange(0, STATES)
    index = tl.arange(0, TILE)
    cells = channels * d_state
    cell = channel[:, None, :] * d_state + state[None, :, None]
    cell_mask = (channel < channels)[:, None, :] & (state < d_state)[None, :, None]
    row = chunk_row.to(tl.int64)
    tile_row = row * (chunk_length // TILE)
    A = tl.load(A_ptr + cell, mask=cell_mask, other=0.0) * LOG2E
    bias = tl.zeros((GROUPS, LANES), tl.float32)
    if dt_bias_ptr is not None:
        bias = tl.load(dt_bias_ptr + channel, mask=channel < channels, other=0.0)
    D = tl.zeros((GROUPS, LANES), tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + channel, mask=channel < channels, other=0.0)
    h = tl.zeros((GROUPS, STATES, LANES), tl.float32)
    if entering_ptr is not None:
        h = tl.load(entering_ptr + row * cells + cell, mask=cell_mask, other=0.0)
    adjoint = tl.zeros((GROUPS, STATES, LANES), tl.float32)
    if arriving_ptr is not None:
        adjoint = tl.load(arriving_ptr + row * cells + cell, mask=cell_mask, other=0.0)
    first = (index == 0)[:, None, None, None]
    nothing = tl.full((TILE, GROUPS, STATES, LANES), -0.0, tl.float32)
    whole = tl.full((TILE, GROUPS, STATES, LANES), 1.0, tl.float32)

    num_tiles = tl.cdiv(stop - start, TILE)
    for tile in tl.range(num_tiles, num_stages=STAGES):
        tl.store(tile_states_ptr + (tile_row + tile) * cells + cell, h, mask=cell_mask)
        position = start + tile * TILE + index
        token = _tokens(position, length, REVERSE)
        mask = (position < stop)[:, None, None] & (channel < channels)[None]
        state_mask = (position < stop)[:, None] & (state < d_state)[None, :]
        x_at = batch * x_batch + token[:, None, None] * x_token + channel[None]
        dt_at = batch * dt_batch + token[:, None, None] * dt_token + channel[None]
        B_rows = B_ptr + batch * B_batch + token[:, None] * B_token
        B_rows = tl.multiple_of(B_rows, (ALIGNED, ALIGNED))
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        raw = tl.load(dt_ptr + dt_at, mask=mask, other=0.0).to(tl.float32) + bias[None]
        B = tl.load(B_rows + state[None, :], mask=state_mask, other=0.0).to(tl.float32)
        step = tl.where(mask, _step_size(raw, SOFTPLUS), 0.0)
        decay = _exp2(step[:, :, None, :] * A[None], EXACT)
        drive = (step * x)[:, :, None, :] * B[:, None, :, None]
        drive += tl.where(first, decay * h[None], 0.0)
        _, states = tl.associative_scan((decay, drive), 0, _chain)
        h = _last_of_tile(states, index, TILE)
    tl.debug_barrier()  # other lanes may read what was stored

    dA = tl.zeros((GROUPS, STATES, LANES), tl.float32)
    dD = tl.zeros((GROUPS, LANES), tl.float32)
    ddt_bias = tl.zeros((GROUPS, LANES), tl.float32)
    for tiles_left in tl.range(num_tiles, 0, -1, num_stages=STAGES):
        tile = tiles_left - 1
        position = start + tile * TILE + index
        token = _tokens(position, length, REVERSE)
        mask = (position < stop)[:, None, None] & (channel < channels)[None]
        state_mask = (position < stop)[:, None] & (state < d_state)[None, :]
        x_at = batch * x_batch + token[:, None, None] * x_token + channel[None]
        dt_at = batch * dt_batch + token[:, None, None] * dt_token + channel[None]
        B_rows = B_ptr + batch * B_batch + token[:, None] * B_token
        B_rows = tl.multiple_of(B_rows, (ALIGNED, ALIGNED))
        C_rows = C_ptr + batch * C_batch + token[:, None] * C_token
        C_rows = tl.multiple_of(C_rows, (ALIGNED, ALIGNED))
        dy_at = batch * dy_batch + token[:, None, None] * dy_token + channel[None]
        out_at = (batch * length + token)[:, None, None] * channels + channel[None]
        sum_at = block.to(tl.int64) * dB_block
        sum_at += (batch * length + token)[:, None] * d_state + state[None, :]
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        raw = tl.load(dt_ptr + dt_at, mask=mask, other=0.0).to(tl.float32) + bias[None]
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32) * scale
        B = tl.load(B_rows + state[None, :], mask=state_mask, other=0.0).to(tl.float32)
        C = tl.load(C_rows + state[None, :], mask=state_mask, other=0.0).to(tl.float32)
        h = tl.load(tile_states_ptr + (tile_row + tile) * cells + cell, mask=cell_mask, other=0.0)
        step = tl.where(mask, _step_size(raw, SOFTPLUS), 0.0)

        decay = _exp2(step[:, :, None, :] * A[None], EXACT)
        drive = (step * x)[:, :, None, :] * B[:, None, :, None]
        drive += tl.where(first, decay * h[None], 0.0)
        before = tl.where(first, h[None], nothing)
        _, states, _, before = tl.associative_scan(
            (decay, drive, whole, before), 0, _chain_and_entry
        )
        if z_ptr is not None:
            z_at = batch * z_batch + token[:, None, None] * z_token + channel[None]
            z = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
            y = tl.sum(states * C[:, None, :, None], axis=2) + D[None] * x
            gate = _sigmoid(z)
            _store(dz_ptr + out_at, dy * y * gate * (1.0 + z * (1.0 - gate)), mask)
            dy *= z * gate
        dC = tl.sum(tl.sum(dy[:, :, None, :] * states, axis=1), axis=2)
        tl.store(dC_ptr + sum_at, dC, mask=state_mask)

        # What reaches the state before a token: decay * (C dy + what reaches the state after it).
        direct = dy[:, :, None, :] * C[:, None, :, None]
        backwards = tl.flip(decay, 0)
        drive = backwards * tl.flip(direct, 0) + tl.where(first, backwards * adjoint[None], 0.0)
        after = tl.where(first, adjoint[None], nothing)
        _, reaching, _, after = tl.associative_scan(
            (backwards, drive, whole, after), 0, _chain_and_entry
        )
        adjoint = _last_of_tile(reaching, index, TILE)
        of_state = direct + tl.flip(after, 0)
        of_exponent = tl.flip(reaching, 0) * before
        dB = tl.sum(tl.sum((step * x)[:, :, None, :] * of_state, axis=1), axis=2)
        tl.store(dB_ptr + sum_at, dB, mask=state_mask)
        of_input = tl.sum(of_state * B[:, None, :, None], axis=2)
        dA += tl.sum(of_exponent * step[:, :, None, :], axis=0)
        ddt = of_input * x + LN2 * tl.sum(of_exponent * A[None], axis=2)
        if SOFTPLUS:
            ddt *= _sigmoid(raw)
        _store(dx_ptr + out_at, of_input * step + D[None] * dy, mask)
        _store(ddt_ptr + out_at, ddt, mask)
        dD += tl.sum(dy * x, axis=0)
        ddt_bias += tl.sum(tl.where(mask, ddt, 0.0), axis=0)
    tl.store(dA_ptr + row * cells + cell, dA, mask=cell_mask)
    tl.store(dD_ptr + row * channels + channel, dD, mask=channel < channels)
    tl.store(ddt_bias_ptr + row * channels + channel, ddt_bias, mask=channel < channels)
    if dinitial_state_ptr is not None and start == 0:
        tl.store(dinitial_state_ptr + batch * cells + cell, adjoint, mask=cell_mask)
