"""The convolution's CUDA kernels against float64 on the GPU: runs, taps, widths, directions."""

import pytest
import torch
from torch.nn import functional as F

from tests.ops.oracles import relative_error
from visionmamba.ops.cuda.conv import conv_backward, conv_forward, convolve_into

pytestmark = pytest.mark.gpu

# results are rounded to 2^-9 in bfloat16 and 2^-12 in float16; sums over tokens in float32
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.5e-3, torch.float16: 6e-4}
BOTH, DIRECTIONS = (False, True), [(False,), (True,), (False, True)]
QUICK, GENERAL = (384, 4), (70, 7)


def conv_inputs(batch, length, channels, taps, directions, dtype=torch.bfloat16):
    """x as a view of every other half row, weights and biases."""
    x = torch.randn(batch, length, 2 * channels, device="cuda").to(dtype)[..., :channels]
    weight = torch.randn(directions, channels, taps, device="cuda") / taps**0.5
    return x, weight, torch.randn(directions, channels, device="cuda")


def in_float64(x, weights, biases, reverses, silu):
    outs = []
    for i, reverse in enumerate(reverses):
        rows = (x.flip(1) if reverse else x).transpose(1, 2)
        rows = F.pad(rows, (weights.shape[2] - 1, 0))
        bias = None if biases is None else biases[i]
        y = F.conv1d(rows, weights[i][:, None], bias, groups=x.shape[2]).transpose(1, 2)
        y = y.flip(1) if reverse else y
        outs.append(F.silu(y) if silu else y)
    return torch.stack(outs)


def assert_agrees(x, weights, biases, reverses, silu, *, dx=None):
    leaves = [tensor.double().requires_grad_() for tensor in (x, weights)]
    bias = None if biases is None else biases.double().requires_grad_()
    expected = in_float64(*leaves, bias, reverses, silu)
    u = conv_forward(x, weights, biases, reverses, silu)
    assert u.dtype == x.dtype
    assert relative_error(u, expected) < TOLERANCE[x.dtype]
    dus = torch.randn_like(u)
    wanted = [*leaves, *(() if bias is None else (bias,))]
    gradients = torch.autograd.grad(expected, wanted, dus.double())
    actual = conv_backward(dus, x, weights, biases, reverses, silu, dx=dx)
    assert relative_error(actual[0], gradients[0]) < TOLERANCE[x.dtype]
    for summed, wanted_sum in zip(actual[1:], gradients[1:], strict=False):
        assert relative_error(summed, wanted_sum) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("reverses", DIRECTIONS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 63, 64, 65, 197, 1025])
@pytest.mark.parametrize("channels, taps", [QUICK, GENERAL])
def test_values_and_gradients_match_float64(channels, taps, length, reverses):
    assert_agrees(*conv_inputs(2, length, channels, taps, len(reverses)), reverses, True)


@pytest.mark.parametrize("channels, taps", [QUICK, GENERAL])
def test_one_long_sequence_and_many_short_ones(channels, taps):
    for batch, length in ((1, 30_001), (300, 5)):
        assert_agrees(*conv_inputs(batch, length, channels, taps, 2), BOTH, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels, taps", [QUICK, GENERAL])
def test_other_dtypes(channels, taps, dtype):
    assert_agrees(*conv_inputs(2, 197, channels, taps, 2, dtype), BOTH, True)


@pytest.mark.parametrize("reverses", DIRECTIONS, ids=str)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 6, 7, 8])
def test_any_number_of_taps(taps, reverses):
    assert_agrees(*conv_inputs(2, 65, 40, taps, len(reverses)), reverses, True)


@pytest.mark.parametrize("channels", [2, 6, 16, 190, 768])
def test_any_even_width(channels):
    assert_agrees(*conv_inputs(2, 65, channels, 4, 2), BOTH, True)


@pytest.mark.parametrize("reverses", DIRECTIONS, ids=str)
def test_without_bias_and_activation(reverses):
    x, weights, _ = conv_inputs(2, 197, 384, 4, len(reverses))
    assert_agrees(x, weights, None, reverses, False)


def test_gradient_of_x_into_a_strided_view():
    x, weights, biases = conv_inputs(2, 197, 384, 4, 2)
    whole = torch.full((2, 197, 768), 7.0, device="cuda").bfloat16()
    assert_agrees(x, weights, biases, BOTH, True, dx=whole[..., :384])
    assert (whole[..., 384:] == 7.0).all()


@pytest.mark.parametrize("start", [1, 2, 4])
def test_channels_from_odd_addresses(start):
    x, weights, biases = conv_inputs(2, 65, 100, 4, 2)
    assert_agrees(
        x[..., start : start + 48],
        weights[:, :48].contiguous(),
        biases[:, :48].contiguous(),
        BOTH,
        True,
    )


def test_tensors_apart_equal_one_tensor():
    x, weights, biases = conv_inputs(2, 197, 384, 4, 2)
    together = conv_forward(x, weights, biases, BOTH, True)
    apart = [torch.empty_like(together[0]) for _ in BOTH]
    convolve_into(apart, x, tuple(weights), tuple(biases), BOTH, True)
    assert torch.equal(torch.stack(apart), together)
    of_one = conv_backward(together, x, weights, biases, BOTH, True)
    of_two = conv_backward(apart, x, tuple(weights), tuple(biases), BOTH, True)
    assert all(torch.equal(a, b) for a, b in zip(of_one, of_two, strict=True))


def test_float16_stops_at_the_largest_value():
    x, weights, biases = conv_inputs(2, 9, 48, 4, 2, torch.float16)
    u = conv_forward(x, weights * 1e6, biases, BOTH, True)
    assert u.abs().max() == torch.finfo(torch.float16).max


def test_large_inputs_of_silu_stay_finite():
    x, weights, biases = conv_inputs(2, 65, 384, 4, 2)
    assert_agrees(x * 300, weights, biases, BOTH, True)


def test_repeated_gradients_have_equal_bits():
    x, weights, biases = conv_inputs(4, 1025, 384, 4, 2)
    dus = torch.randn(2, 4, 1025, 384, device="cuda").bfloat16()
    first = conv_backward(dus, x, weights, biases, BOTH, True)
    again = conv_backward(dus, x, weights, biases, BOTH, True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.slow
def test_more_than_two_billion_elements():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    batch, length = 6, 1_000_001
    last, weights, biases = conv_inputs(1, length, 384, 4, 2)
    x = last.expand(batch, -1, -1).contiguous()
    assert x.numel() > 1 << 31
    u = conv_forward(x, weights, biases, BOTH, True)
    expected = conv_forward(last, weights, biases, BOTH, True)
    assert torch.equal(u[:, -1:], expected)
    dx, _, _ = conv_backward(u, x, weights, biases, BOTH, True)
    expected_dx, _, _ = conv_backward(expected, last, weights, biases, BOTH, True)
    assert torch.equal(dx[-1:], expected_dx)
