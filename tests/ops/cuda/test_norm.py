"""The norm's CUDA kernels against float64 on the GPU: widths, dtypes, both passes."""

import pytest
import torch

from tests.ops.oracles import relative_error
from visionmamba.ops.cuda.norm import add_rms_norm, add_rms_norm_backward

pytestmark = pytest.mark.gpu

# results are rounded to 2^-9 in bfloat16 and 2^-12 in float16
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.5e-3, torch.float16: 6e-4}
EPS = 1e-5

SHAPES = [(1, 400), (2, 65, 19), (70, 16), (5, 197, 192), (3, 33, 384), (2, 17, 768), (9, 1000)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float32, None),
]


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def norm_inputs(shape, x_dtype, residual_dtype):
    residual = None if residual_dtype is None else normal(*shape, dtype=residual_dtype)
    return normal(*shape, dtype=x_dtype), residual, normal(shape[-1])


def in_float64(x, residual, weight):
    total = x.double() if residual is None else x.double() + residual.double()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight.double()
    return normed, total


def gradients_in_float64(dnormed, dtotal, total, weight):
    total, weight = total.double().requires_grad_(), weight.double().requires_grad_()
    normed, _ = in_float64(total, None, weight)
    loss = (normed * dnormed.double()).sum()
    if dtotal is not None:
        loss = loss + (total * dtotal.double()).sum()
    return torch.autograd.grad(loss, (total, weight))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_match_float64(shape, dtypes):
    x, residual, weight = norm_inputs(shape, *dtypes)
    expected, expected_total = in_float64(x, residual, weight)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert normed.dtype == x.dtype
    assert relative_error(normed, expected) < TOLERANCE[x.dtype]
    if residual is None:
        assert total is None
    else:
        assert total.dtype == residual.dtype
        assert relative_error(total, expected_total) < TOLERANCE[residual.dtype]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_float64(shape, dtypes):
    x_dtype, residual_dtype = dtypes
    total = normal(*shape, dtype=residual_dtype or x_dtype)
    dnormed, weight = normal(*shape, dtype=x_dtype), normal(shape[-1])
    dtotal = None if residual_dtype is None else normal(*shape, dtype=residual_dtype)
    expected, expected_dweight = gradients_in_float64(dnormed, dtotal, total, weight)
    dx, dresidual, dweight = add_rms_norm_backward(
        dnormed, dtotal, total, weight, EPS, x_dtype, residual_dtype
    )
    assert relative_error(dx, expected) < TOLERANCE[x_dtype]
    assert relative_error(dweight, expected_dweight) < TOLERANCE[torch.float32]
    if residual_dtype is None:
        assert dresidual is None
    else:
        assert dresidual.dtype == residual_dtype
        assert relative_error(dresidual, expected) < TOLERANCE[residual_dtype]


def test_a_row_alone():
    x, residual, weight = norm_inputs((7,), torch.float32, torch.float32)
    expected, expected_total = in_float64(x, residual, weight)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert relative_error(normed, expected) < TOLERANCE[torch.float32]
    assert relative_error(total, expected_total) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("width", [19, 192])
def test_a_missing_gradient_counts_as_zero(width):
    total, weight = normal(3, 65, width), normal(width)
    gradient = normal(3, 65, width)
    zeros = torch.zeros_like(gradient)
    for given, padded in (
        ((None, gradient), (zeros, gradient)),
        ((gradient, None), (gradient, zeros)),
    ):
        rest = (total, weight, EPS, torch.bfloat16, torch.float32)
        half = [None if g is None else g.bfloat16() for g in (given[0], padded[0])]
        actual = add_rms_norm_backward(half[0], given[1], *rest)
        expected = add_rms_norm_backward(half[1], padded[1], *rest)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("width", [19, 192, 384, 768])
def test_more_rows_than_the_blocks_hold_at_once(width):
    total, weight = normal(12_003, width), normal(width)
    dnormed = normal(12_003, width, dtype=torch.bfloat16)
    expected, expected_dweight = gradients_in_float64(dnormed, total, total, weight)
    dx, dresidual, dweight = add_rms_norm_backward(
        dnormed, total, total, weight, EPS, torch.bfloat16, torch.float32
    )
    assert relative_error(dx, expected) < TOLERANCE[torch.bfloat16]
    assert relative_error(dresidual, expected) < TOLERANCE[torch.float32]
    assert relative_error(dweight, expected_dweight) < TOLERANCE[torch.float32]


def test_rows_that_no_wide_read_may_touch():
    storage = normal(2 * 7 * 192 + 1, dtype=torch.bfloat16)
    x, residual = storage[1:].view(2, 7, 192), normal(2 * 7 * 192 + 1)[1:].view(2, 7, 192)
    weight = normal(193)[1:]
    expected, expected_total = in_float64(x, residual, weight)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert relative_error(normed, expected) < TOLERANCE[torch.bfloat16]
    assert relative_error(total, expected_total) < TOLERANCE[torch.float32]


def test_strided_rows_are_copied():
    x, residual, weight = norm_inputs((2, 7, 384), torch.bfloat16, torch.float32)
    normed, _ = add_rms_norm(x[..., ::2], residual[..., 192:], weight[:192], EPS)
    expected, _ = in_float64(x[..., ::2], residual[..., 192:], weight[:192])
    assert relative_error(normed, expected) < TOLERANCE[torch.bfloat16]


def test_float16_stops_at_the_largest_value():
    x = torch.full((3, 192), 60000.0, device="cuda").half()
    normed, total = add_rms_norm(x, x, torch.full((192,), 1e6, device="cuda"), EPS)
    assert normed.abs().max() == total.abs().max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize("width", [19, 192])
def test_repeated_gradients_have_equal_bits(width):
    total, weight = normal(5000, width), normal(width)
    dnormed = normal(5000, width, dtype=torch.bfloat16)
    rest = (total, weight, EPS, torch.bfloat16, torch.float32)
    first = add_rms_norm_backward(dnormed, total, *rest)
    again = add_rms_norm_backward(dnormed, total, *rest)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_sum_may_be_written_over_the_residual():
    x, residual, weight = (torch.randn(3, 197, 192, device="cuda") for _ in range(3))
    weight = weight[0, 0]
    expected, expected_total = add_rms_norm(x.bfloat16(), residual, weight, EPS)
    normed, total = add_rms_norm(x.bfloat16(), residual, weight, EPS, total=residual)
    assert total is residual
    assert torch.equal(normed, expected)
    assert torch.equal(total, expected_total)


@pytest.mark.parametrize("width", [192, 191])
def test_a_stream_that_begins_here_is_written_too(width):
    x, weight = torch.randn(3, 197, width, device="cuda").bfloat16(), torch.rand(width).cuda()
    total = torch.empty(x.shape, device="cuda")
    normed, _ = add_rms_norm(x, None, weight, EPS, total=total)
    assert torch.equal(normed, add_rms_norm(x, None, weight, EPS)[0])
    assert torch.equal(total, x.float())


@pytest.mark.slow
@pytest.mark.parametrize("width", [191, 192])
def test_more_than_two_billion_elements(width):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    rows = (1 << 31) // width + 100
    x = torch.ones((1, width), device="cuda").bfloat16().expand(rows, -1).contiguous()
    x[-50:] = normal(50, width)
    weight = normal(width)
    normed, _ = add_rms_norm(x, None, weight, EPS)
    expected, _ = in_float64(x[-50:], None, weight)
    assert relative_error(normed[-50:], expected) < TOLERANCE[torch.bfloat16]
    dx, _, _ = add_rms_norm_backward(x, None, x, weight, EPS, torch.bfloat16, None)
    expected, _ = gradients_in_float64(x[-50:], None, x[-50:], weight)
    assert relative_error(dx[-50:], expected) < TOLERANCE[torch.bfloat16]
