"""The CUDA kernels against float64 on the GPU: shapes that fill, split and overhang their tiles."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from visionmamba.ops.cuda import driver, scan
from visionmamba.ops.cuda.scan import (
    Direction,
    gate_backward,
    gate_forward,
    scan_backward,
    scan_forward,
)
from visionmamba.ops.selective_scan.chunked import (
    selective_scan_backward_chunked,
    selective_scan_chunked,
)

pytestmark = pytest.mark.gpu

# bfloat16 results are rounded to 2^-9; the sums over channels round their terms too.
VALUE_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.5e-3, torch.float16: 6e-4}
GRADIENT_TOLERANCE = 4e-3
NAMES = ("dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias", "dinitial_state")

FULL, FEW, MANY = (2, 40, 197), (1, 48, 6085), (70, 256, 9)
SHAPES = [(1, 2, 1), (2, 16, 8), (3, 18, 31), FULL, (1, 384, 1025), FEW, MANY, (1, 32, 65537)]


def relative_error(actual, expected):
    if not torch.isfinite(actual).all():
        return float("nan")
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm())


def make_direction(shape, *, reverse=False, dtype=torch.bfloat16, d_state=16):
    batch, length, channels = shape[0], shape[2], shape[1]
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    projected = normal(batch, length, 12 + 2 * d_state).to(dtype)
    _, B, C = projected.split([12, d_state, d_state], -1)
    return Direction(
        x=normal(batch, length, channels).to(dtype),
        dt=normal(batch, length, channels).to(dtype),
        A=-torch.rand((channels, d_state), generator=generator, device="cuda") * 8,
        B=B,
        C=C,
        D=normal(channels),
        dt_bias=normal(channels) - 4,
        initial_state=normal(batch, channels, d_state),
        reverse=reverse,
    )


def in_float64(direction):
    names = ("x", "dt", "A", "B", "C", "D")
    given = [getattr(direction, name).double() for name in names]
    return (*given, None, direction.dt_bias.double(), direction.initial_state.double(), True)


def backward_in_float64(direction, dy, dlast_state):
    grads = selective_scan_backward_chunked(
        dy.double(), dlast_state.double(), *in_float64(direction), direction.reverse
    )
    names = ("dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dinitial_state")
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_match_float64(shape, dtype, reverse):
    direction = make_direction(shape, dtype=dtype, reverse=reverse)
    expected_y, expected_state, _ = selective_scan_chunked(*in_float64(direction), reverse, None)
    ((y, state),) = scan_forward([direction], dt_softplus=True)
    assert relative_error(y, expected_y) < VALUE_TOLERANCE[dtype]
    assert relative_error(state, expected_state) < VALUE_TOLERANCE[dtype]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_float64(shape, reverse):
    direction = make_direction(shape, reverse=reverse)
    dy = torch.randn_like(direction.x)
    dlast_state = torch.randn_like(direction.initial_state)
    expected = backward_in_float64(direction, dy, dlast_state)
    (actual,), _ = scan_backward([direction], [dy], [dlast_state], dt_softplus=True)
    for name in NAMES:
        assert relative_error(getattr(actual, name), expected[name]) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("d_state", [3, 8, 32, 64])
def test_any_number_of_states(d_state):
    direction = make_direction(FULL, d_state=d_state)
    dy = torch.randn_like(direction.x)
    dlast_state = torch.randn_like(direction.initial_state)
    expected = backward_in_float64(direction, dy, dlast_state)
    (actual,), _ = scan_backward([direction], [dy], [dlast_state], dt_softplus=True)
    for name in NAMES:
        assert relative_error(getattr(actual, name), expected[name]) < GRADIENT_TOLERANCE, name


def test_both_directions_in_one_launch_equal_two():
    directions = [make_direction(FULL), make_direction(FULL, reverse=True)]
    for direction, (y, state) in zip(
        directions, scan_forward(directions, dt_softplus=True), strict=True
    ):
        ((alone, alone_state),) = scan_forward([direction], dt_softplus=True)
        assert torch.equal(y, alone)
        assert torch.equal(state, alone_state)


def test_deterministic_gradients_have_equal_bits():
    direction = make_direction((2, 384, 197))
    dy = torch.randn_like(direction.x)
    (first,), _ = scan_backward([direction], [dy], [None], dt_softplus=True)
    (second,), _ = scan_backward([direction], [dy], [None], dt_softplus=True)
    for name in ("dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_gradients_added_with_atomics_match_float64():
    torch.use_deterministic_algorithms(False)
    direction = make_direction((2, 384, 197))
    dy = torch.randn_like(direction.x)
    dlast_state = torch.randn_like(direction.initial_state)
    expected = backward_in_float64(direction, dy, dlast_state)
    (actual,), _ = scan_backward([direction], [dy], [dlast_state], dt_softplus=True)
    for name in NAMES:
        assert relative_error(getattr(actual, name), expected[name]) < GRADIENT_TOLERANCE, name


def test_huge_steps_and_vanished_decays_stay_finite_and_right():
    direction = make_direction(FULL)
    direction.dt[:, ::7] = 100.0
    direction.dt[:, 3::7] = -100.0
    expected, _, _ = selective_scan_chunked(*in_float64(direction), False, None)
    ((y, _),) = scan_forward([direction], dt_softplus=True)
    assert relative_error(y, expected) < VALUE_TOLERANCE[torch.bfloat16]


def test_the_batch_is_cut_where_the_states_would_fill_the_memory(monkeypatch):
    direction = make_direction((5, 32, 40))
    dy = torch.randn_like(direction.x)
    (whole,), _ = scan_backward([direction], [dy], [None], dt_softplus=True)
    monkeypatch.setattr(scan, "_SCRATCH_BYTES", 1 << 16)
    (cut,), _ = scan_backward([direction], [dy], [None], dt_softplus=True)
    for name in ("dx", "ddt", "dB", "dC", "dinitial_state"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)), name
    assert relative_error(cut.dA, whole.dA.double()) < 1e-6


@pytest.mark.parametrize("channels", [5, 6, 8, 384])
@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
def test_gate_matches_float64(channels, dtype):
    both = torch.randn(3, 37, 2 * channels, device="cuda").to(dtype)
    a, z = both[..., :channels].contiguous(), both[..., channels:]
    b, dy = (torch.randn(3, 37, channels, device="cuda").to(dtype) for _ in (0, 1))
    leaves = [tensor.double().requires_grad_() for tensor in (a, b, z)]
    expected = 0.5 * (leaves[0] + leaves[1]) * F.silu(leaves[2])
    da, _, dz = torch.autograd.grad(expected, leaves, dy.double())
    assert relative_error(gate_forward(a, b, z, 0.5), expected) < VALUE_TOLERANCE[dtype]
    actual_da, actual_dz = gate_backward(dy, a, b, z, 0.5)
    assert relative_error(actual_da, da) < VALUE_TOLERANCE[dtype]
    assert relative_error(actual_dz, dz) < VALUE_TOLERANCE[dtype]


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
def test_gradients_on_less_shared_memory(shared_kib, monkeypatch):
    direction = make_direction((9, 384, 65))
    dy = torch.randn_like(direction.x)
    dlast_state = torch.randn_like(direction.initial_state)
    expected = backward_in_float64(direction, dy, dlast_state)
    kernels = driver.kernels("scan", direction.x.device)
    monkeypatch.setattr(kernels, "shared_bytes", shared_kib * 1024)
    (actual,), _ = scan_backward([direction], [dy], [dlast_state], dt_softplus=True)
    for name in NAMES:
        assert relative_error(getattr(actual, name), expected[name]) < GRADIENT_TOLERANCE, name


@pytest.mark.slow
def test_a_million_tokens_match_float64():
    direction = make_direction((1, 32, 1_048_577), reverse=True)
    expected, expected_state, _ = selective_scan_chunked(*in_float64(direction), True, None)
    ((y, state),) = scan_forward([direction], dt_softplus=True)
    assert relative_error(y, expected) < VALUE_TOLERANCE[torch.bfloat16]
    assert relative_error(state, expected_state) < VALUE_TOLERANCE[torch.bfloat16]


@pytest.mark.slow
def test_more_than_two_billion_elements():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    last = make_direction((1, 384, 700_001))
    whole = replace(
        last,
        x=last.x.expand(8, -1, -1).contiguous(),
        dt=last.dt.expand(8, -1, -1).contiguous(),
        B=last.B.expand(8, -1, -1).contiguous(),
        C=last.C.expand(8, -1, -1).contiguous(),
        initial_state=last.initial_state.expand(8, -1, -1).contiguous(),
    )
    assert whole.x.numel() > 1 << 31
    ((y, state),) = scan_forward([whole], dt_softplus=True)
    ((expected, expected_state),) = scan_forward([last], dt_softplus=True)
    for row in (0, 7):
        assert relative_error(y[row], expected[0].double()) < 1e-3
        assert relative_error(state[row], expected_state[0].double()) < 1e-5
