"""The CUDA kernels against float64 on the GPU: shapes that fill, split and overhang their tiles."""

from dataclasses import replace

import pytest
import torch

from visionmamba.ops.cuda import driver, fused_scan, scan_launch
from visionmamba.ops.cuda.fused_scan import (
    bidirectional_backward,
    bidirectional_forward,
    mixer_scan_backward,
    mixer_scan_forward,
    num_state_values,
)
from visionmamba.ops.cuda.scan import Direction, scan_backward, scan_forward
from visionmamba.ops.selective_scan.chunked import (
    selective_scan_backward_chunked,
    selective_scan_chunked,
)

pytestmark = pytest.mark.gpu

# bfloat16 results are rounded to 2^-9; the sums over channels round their terms too.
VALUE_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.5e-3, torch.float16: 6e-4}
GRADIENT_TOLERANCE = 5e-3
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


def test_rings_beyond_the_last_sequence_touch_nothing():
    shape = (10, 256, 40)  # 320 sequence tiles in blocks of three rings
    directions = [make_direction(shape), make_direction(shape, reverse=True)]
    for direction, (y, _) in zip(
        directions, scan_forward(directions, dt_softplus=True), strict=True
    ):
        expected, _, _ = selective_scan_chunked(*in_float64(direction), direction.reverse, None)
        assert relative_error(y, expected) < VALUE_TOLERANCE[torch.bfloat16]


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
    monkeypatch.setattr(scan_launch, "SCRATCH_BYTES", 1 << 16)
    (cut,), _ = scan_backward([direction], [dy], [None], dt_softplus=True)
    for name in ("dx", "ddt", "dB", "dC", "dinitial_state"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)), name
    assert relative_error(cut.dA, whole.dA.double()) < 1e-6


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


MIXER_NAMES = ("du", "ddt_r", "dB", "dC", "ddt_weight", "ddt_bias", "dA", "dD")
MIXER_SHAPES = [(2, 32, 8), (2, 48, 31), (2, 48, 197), (1, 384, 1025), FEW, MANY]


def make_mixer(shape, *, rank=12, dtype=torch.bfloat16, d_state=16, largest_step=1.0):
    batch, channels, length = shape
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    columns, width = -(-rank // 16) * 16, -(-(rank + 2 * d_state) // 8) * 8
    projected = torch.zeros((2, batch, length, width), device="cuda")
    projected[..., : rank + 2 * d_state] = normal(2, batch, length, rank + 2 * d_state)
    dt_weight = torch.zeros((2, channels, columns), device="cuda")
    dt_weight[..., :rank] = normal(2, channels, rank) * largest_step / rank**0.5
    return {
        "u": normal(2, batch, length, channels).to(dtype),
        "projected": projected.to(dtype),
        "dt_weight": dt_weight.to(dtype),
        "dt_bias": normal(2, channels) - 4,
        "A": -torch.rand((2, channels, d_state), generator=generator, device="cuda") * 8,
        "D": normal(2, channels),
    }


def mixer_in_float64(given, i, rank):
    one = {name: tensor[i].double() for name, tensor in given.items()}
    d_state = one["A"].shape[1]
    dt_r, B, C, _ = one["projected"].tensor_split((rank, rank + d_state, rank + 2 * d_state), -1)
    dt = dt_r @ one["dt_weight"][:, :rank].T
    return (one["u"], dt, one["A"], B, C, one["D"], None, one["dt_bias"], None, True)


def mixer_values_in_float64(given, rank):
    return torch.stack(
        [selective_scan_chunked(*mixer_in_float64(given, i, rank), i == 1, None)[0] for i in (0, 1)]
    )


def mixer_gradients_in_float64(given, dscan, rank):
    rows = []
    for i in (0, 1):
        arguments = mixer_in_float64(given, i, rank)
        dx, ddt, dA, dB, dC, dD, _, ddt_bias, _ = selective_scan_backward_chunked(
            dscan.double(), None, *arguments, i == 1
        )
        ddt_r = ddt @ given["dt_weight"][i, :, :rank].double()
        ddt_weight = torch.einsum("ble,blr->er", ddt, given["projected"][i, ..., :rank].double())
        rows.append((dx, ddt_r, dB, dC, ddt_weight, ddt_bias, dA, dD))
    stacked = (torch.stack(tensors) for tensors in zip(*rows, strict=True))
    return dict(zip(MIXER_NAMES, stacked, strict=True))


def mixer_gradients(given, dscan, rank, states=None):
    du, dprojected, ddt_weight, ddt_bias, dA, dD = mixer_scan_backward(
        dscan, **given, rank=rank, states=states
    )
    d_state = dA.shape[2]
    ddt_r, dB, dC, padding = dprojected.tensor_split((rank, rank + d_state, rank + 2 * d_state), -1)
    assert not padding.any()
    found = (du, ddt_r, dB, dC, ddt_weight, ddt_bias, dA, dD)
    return dict(zip(MIXER_NAMES, found, strict=True))


def assert_mixer_scans_agree(given):
    """Compare values and every gradient with float64."""
    dscan = torch.randn_like(given["u"][0])
    expected = mixer_values_in_float64(given, 12)
    tolerance = VALUE_TOLERANCE[torch.bfloat16]
    assert relative_error(mixer_scan_forward(**given, rank=12), expected) < tolerance
    expected = mixer_gradients_in_float64(given, dscan, 12)
    for name, actual in mixer_gradients(given, dscan, 12).items():
        assert relative_error(actual, expected[name]) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("shape", MIXER_SHAPES, ids=str)
def test_mixer_scans_match_float64(shape):
    assert_mixer_scans_agree(make_mixer(shape))


@pytest.mark.parametrize(("rank", "d_state"), [(4, 16), (24, 16), (48, 16), (3, 16), (12, 8)])
def test_mixer_scans_take_any_rank_and_state(rank, d_state):
    given = make_mixer((2, 48, 197), rank=rank, d_state=d_state)
    dscan = torch.randn_like(given["u"][0])
    expected = mixer_values_in_float64(given, rank)
    assert relative_error(mixer_scan_forward(**given, rank=rank), expected) < GRADIENT_TOLERANCE
    expected = mixer_gradients_in_float64(given, dscan, rank)
    for name, actual in mixer_gradients(given, dscan, rank).items():
        assert relative_error(actual, expected[name]) < GRADIENT_TOLERANCE, name


def test_mixer_scans_of_one_token():
    given = make_mixer((3, 16, 1))
    expected = mixer_values_in_float64(given, 12)
    tolerance = VALUE_TOLERANCE[torch.bfloat16]
    assert relative_error(mixer_scan_forward(**given, rank=12), expected) < tolerance


def test_mixer_scans_in_float16():
    given = make_mixer((2, 34, 197), dtype=torch.float16)
    actual = mixer_scan_forward(**given, rank=12)
    tolerance = VALUE_TOLERANCE[torch.float16]
    assert relative_error(actual, mixer_values_in_float64(given, 12)) < tolerance


@pytest.mark.parametrize("shape", [FEW, (1, 384, 1025), MANY, FULL], ids=str)
def test_mixer_scans_write_over_their_input(shape):
    given = make_mixer(shape)
    expected = mixer_scan_forward(**given, rank=12)
    actual = mixer_scan_forward(**given, rank=12, out=given["u"])
    assert actual is given["u"]
    assert torch.equal(actual, expected)


def test_mixer_scans_with_huge_steps_stay_finite_and_right():
    assert_mixer_scans_agree(make_mixer((2, 48, 197), largest_step=40.0))


@pytest.mark.parametrize("deterministic", [False, True])
def test_mixer_backward_in_parts_of_the_batch(monkeypatch, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    given = make_mixer((5, 32, 40))
    dscan = torch.randn_like(given["u"][0])
    expected = mixer_gradients_in_float64(given, dscan, 12)
    monkeypatch.setattr(scan_launch, "SCRATCH_BYTES", 1 << 16)
    for name, actual in mixer_gradients(given, dscan, 12).items():
        assert relative_error(actual, expected[name]) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("shape", [(2, 48, 197), FEW, (8, 384, 65), MANY], ids=str)
def test_mixer_backward_takes_the_states_that_the_forward_left(shape):
    given = make_mixer(shape)
    dscan = torch.randn_like(given["u"][0])
    numbers = num_state_values(shape[0], shape[2], shape[1])
    states = torch.empty(numbers, dtype=torch.bfloat16, device="cuda")
    y = mixer_scan_forward(**given, rank=12, states=states)
    assert torch.equal(y, mixer_scan_forward(**given, rank=12))
    expected = mixer_gradients_in_float64(given, dscan, 12)
    for name, actual in mixer_gradients(given, dscan, 12, states=states).items():
        assert relative_error(actual, expected[name]) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("shape", [(3, 64, 40), (24, 768, 40)], ids=str)
def test_mixer_gradients_have_equal_bits_where_asked(shape):
    given = make_mixer(shape)
    dscan = torch.randn_like(given["u"][0])
    first, second = (mixer_gradients(given, dscan, 12) for _ in (0, 1))
    for name in MIXER_NAMES:
        assert torch.equal(first[name], second[name]), name


def test_steps_inside_the_bidirectional_scans_equal_steps_before_them(monkeypatch):
    given = make_mixer((2, 48, 197))
    pairs = [
        (given["u"][0], given["u"][1]),
        (given["projected"][0, ..., :44], given["projected"][1, ..., :44]),
        (given["dt_weight"][0, :, :12].float(), given["dt_weight"][1, :, :12].float()),
        *((given[name][0], given[name][1]) for name in ("dt_bias", "A", "D")),
    ]
    states = torch.randn((4, 2, 48, 16), device="cuda")
    dscan = torch.randn_like(given["u"][0])

    def run():
        values = bidirectional_forward(*pairs, (states[0], states[1]))
        gradients = bidirectional_backward(
            dscan, (states[2], states[3]), *pairs, (states[0], states[1])
        )
        return [tensor for both in (values, gradients) for one in both for tensor in one]

    inside = run()
    monkeypatch.setattr(fused_scan, "_takes_fused", lambda *_, **__: False)
    for i, (actual, expected) in enumerate(zip(inside, run(), strict=True)):
        assert relative_error(actual, expected.double()) < 2 * GRADIENT_TOLERANCE, i


MILLION = (1, 32, 1_048_577)


@pytest.mark.slow
def test_a_million_tokens_match_float64():
    direction = make_direction(MILLION, reverse=True)
    expected, expected_state, _ = selective_scan_chunked(*in_float64(direction), True, None)
    ((y, state),) = scan_forward([direction], dt_softplus=True)
    assert relative_error(y, expected) < VALUE_TOLERANCE[torch.bfloat16]
    assert relative_error(state, expected_state) < VALUE_TOLERANCE[torch.bfloat16]
    dy, dlast_state = torch.randn_like(y), torch.randn_like(state)
    gradients = backward_in_float64(direction, dy, dlast_state)
    (actual,), _ = scan_backward([direction], [dy], [dlast_state], dt_softplus=True)
    for name in NAMES:
        assert relative_error(getattr(actual, name), gradients[name]) < GRADIENT_TOLERANCE, name


@pytest.mark.slow
def test_mixer_scans_of_a_million_tokens_match_float64():
    assert_mixer_scans_agree(make_mixer(MILLION))


@pytest.mark.slow
def test_more_than_two_billion_elements():
    torch.cuda.empty_cache()
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
