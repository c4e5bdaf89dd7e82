"""The Triton kernels against float64 on the GPU, compiled."""

import pytest
import torch

from visionmamba.ops.selective_scan.chunked import (
    selective_scan_backward_chunked,
    selective_scan_chunked,
)

pytestmark = pytest.mark.gpu

# bfloat16 results are rounded to 2^-9, float16 ones to 2^-12; float32 sums run over 6085 tokens.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.5e-3, torch.float16: 6e-4}
SMALLEST = 1e-30  # what float32 cannot hold counts as zero
NAMES = ("dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dinitial_state")

SHAPES = [(3, 18, 1), (2, 40, 197), (1, 384, 1025), (1, 48, 6085), (65, 384, 9)]


@pytest.fixture(autouse=True)
def triton_scan():
    """The functions under test; triton is imported where a GPU is found."""
    return pytest.importorskip("visionmamba.ops.triton.scan", reason="triton is not installed")


def relative_error(actual, expected):
    if not torch.isfinite(actual).all():
        return float("nan")
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp_min(SMALLEST))


def make_inputs(shape, *, dtype=torch.bfloat16, d_state=16):
    """All inputs, x to initial_state, and the gradients of both results."""
    batch, channels, length = shape
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    projected = normal(batch, length, 12 + 2 * d_state).to(dtype)
    _, B, C = projected.split([12, d_state, d_state], -1)
    inputs = (
        normal(batch, length, channels).to(dtype),
        normal(batch, length, channels).to(dtype),
        -torch.rand((channels, d_state), generator=generator, device="cuda") * 8,
        B,
        C,
        normal(channels),
        normal(batch, length, channels).to(dtype),
        normal(channels) - 4,
        normal(batch, channels, d_state),
    )
    return inputs, normal(batch, length, channels).to(dtype), normal(batch, channels, d_state)


def assert_agrees(triton_scan, inputs, dy, dstate, *, reverse):
    tolerance = TOLERANCE[dy.dtype]
    in_float64 = [tensor.double() for tensor in inputs]
    expected_y, expected_state, _ = selective_scan_chunked(*in_float64, True, reverse, None)
    y, state = triton_scan.selective_scan_triton(*inputs, True, reverse)
    assert relative_error(y, expected_y) < tolerance
    assert relative_error(state, expected_state) < tolerance
    expected = selective_scan_backward_chunked(
        dy.double(), dstate.double(), *in_float64, True, reverse
    )
    actual = triton_scan.selective_scan_backward_triton(dy, dstate, *inputs, True, reverse)
    for name, gradient, value in zip(NAMES, actual, expected, strict=True):
        assert relative_error(gradient, value) < tolerance, name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scan_and_gradients_match_float64(triton_scan, shape, dtype, reverse):
    assert_agrees(triton_scan, *make_inputs(shape, dtype=dtype), reverse=reverse)


@pytest.mark.parametrize("d_state", [3, 8, 32, 64])
def test_any_number_of_states(triton_scan, d_state):
    assert_agrees(triton_scan, *make_inputs((2, 40, 197), d_state=d_state), reverse=True)


def test_huge_steps_and_vanished_decays_stay_finite_and_right(triton_scan):
    inputs, dy, dstate = make_inputs((1, 48, 6085))
    inputs[1][:, ::7] = 1e4
    inputs[1][:, 3::7] = -1e4
    assert_agrees(triton_scan, inputs, dy, dstate, reverse=False)


def test_gradients_have_equal_bits_twice(triton_scan):
    inputs, dy, dstate = make_inputs((2, 384, 1025))
    first, second = (
        triton_scan.selective_scan_backward_triton(dy, dstate, *inputs, True, False) for _ in (0, 1)
    )
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


def test_runs_in_a_cuda_graph(triton_scan):
    inputs, _, _ = make_inputs((2, 40, 6085))
    expected, _ = triton_scan.selective_scan_triton(*inputs, True, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = triton_scan.selective_scan_triton(*inputs, True, False)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.slow
def test_more_than_two_billion_elements(triton_scan):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    batch, length, channels = 2, 1_500_000, 768
    x = torch.randn(1, 1000, channels, device="cuda", dtype=torch.bfloat16)
    x = x.repeat(batch, length // 1000, 1)
    A = -1 - torch.rand(channels, 4, device="cuda")
    B = torch.randn(batch, length, 4, device="cuda", dtype=torch.bfloat16)
    y, _ = triton_scan.selective_scan_triton(*(x, x, A, B, B, None, None, None, None), True, False)
    end = slice(length - 500, length)
    expected, _, _ = selective_scan_chunked(
        *(tensor[-1:, end].double() for tensor in (x, x)),
        A.double(),
        *(tensor[-1:, end].double() for tensor in (B, B)),
        *(None, None, None, None, True, False, None),
    )
    # 400 tokens after its start a scan no longer remembers what entered it.
    assert relative_error(y[-1:, -100:], expected[:, -100:]) < TOLERANCE[torch.bfloat16]
