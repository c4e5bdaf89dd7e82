"""The gate's CUDA kernels against float64 on the GPU."""

import pytest
import torch
from torch.nn import functional as F

from tests.ops.oracles import relative_error
from visionmamba.ops.cuda.gate import gate, gate_backward, gate_forward, gate_gradients

pytestmark = pytest.mark.gpu

# results are rounded to 2^-9 in bfloat16 and 2^-12 in float16
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.5e-3, torch.float16: 6e-4}


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


def in_float64(y, z, scale):
    return scale * y.double().sum(0) * F.silu(z.double())


@pytest.mark.parametrize("keep_sum", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("channels", [2, 6, 8, 384])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_match_float64(dtype, channels, directions, keep_sum):
    y = normal(directions, 3, 37, channels, dtype=dtype)
    z = normal(3, 37, 2 * channels, dtype=dtype)[..., channels:]
    expected, total = in_float64(y, z, 0.5), y.double().sum(0)
    actual = gate_forward(y, z, 0.5, keep_sum=keep_sum)
    assert relative_error(actual, expected) < TOLERANCE[dtype]
    if keep_sum:
        assert relative_error(y[0], total) < TOLERANCE[dtype]


def test_the_result_lies_where_y_was():
    y, z = normal(2, 3, 37, 384), normal(3, 37, 384)
    assert gate_forward(y.clone(), z, 1.0, keep_sum=False).storage_offset() == 0
    assert gate_forward(y, z, 1.0, keep_sum=True).data_ptr() == y[1].data_ptr()


@pytest.mark.parametrize("channels", [2, 6, 8, 384])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_match_float64(dtype, channels):
    total, dg = (normal(3, 37, channels, dtype=dtype) for _ in range(2))
    z = normal(3, 37, 2 * channels, dtype=dtype)[..., channels:]
    leaves = [tensor.double().requires_grad_() for tensor in (total, z)]
    expected = torch.autograd.grad(in_float64(leaves[0][None], leaves[1], 0.5), leaves, dg.double())
    dxz = torch.full((3, 37, 2 * channels), 7.0, device="cuda").to(dtype)
    dscan = gate_backward(dg, total, z, 0.5, dz=dxz[..., channels:])
    assert relative_error(dscan, expected[0]) < TOLERANCE[dtype]
    assert relative_error(dxz[..., channels:], expected[1]) < TOLERANCE[dtype]
    assert (dxz[..., :channels] == 7.0).all()


def test_large_gates_stay_finite():
    y, z = normal(2, 3, 37, 384), 300 * normal(3, 37, 384)
    total = y.double().sum(0)
    assert (
        relative_error(gate_forward(y, z, 1.0, keep_sum=True), total * F.silu(z.double())) < 2.5e-3
    )
    dscan = gate_backward(y[0], y[0], z, 1.0, dz=torch.empty_like(z))
    assert relative_error(dscan, y[0].double() * F.silu(z.double())) < 2.5e-3


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("channels", [5, 6, 8, 384])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_separate_tensors_of_any_width(dtype, channels, both):
    a, dg = (normal(3, 37, channels, dtype=dtype) for _ in range(2))
    b = normal(3, 37, channels, dtype=dtype) if both else None
    z = normal(3, 37, 2 * channels, dtype=dtype)[..., channels:]
    leaves = [tensor.double().requires_grad_() for tensor in (a, z)]
    total = leaves[0] if b is None else leaves[0] + b.double()
    expected = in_float64(total[None], leaves[1], 0.5)
    assert relative_error(gate(a, b, z, 0.5), expected) < TOLERANCE[dtype]
    gradients = torch.autograd.grad(expected, leaves, dg.double())
    for actual, wanted in zip(gate_gradients(dg, a, b, z, 0.5), gradients, strict=True):
        assert relative_error(actual, wanted) < TOLERANCE[dtype]


@pytest.mark.slow
def test_more_than_two_billion_elements():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    last = normal(1, 1, 1_000_001, 384)
    y = last.expand(1, 6, -1, -1).contiguous()
    z = last[0].expand(6, -1, -1)
    gated = gate_forward(y, z, 1.0, keep_sum=False)
    assert gated.numel() > 1 << 31
    assert torch.equal(gated[-1:], gate_forward(last.clone(), last[0], 1.0, keep_sum=False))
