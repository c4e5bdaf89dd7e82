"""The fused projections against float64 on the GPU, from one token to tiles that overhang."""

import pytest
import torch
from torch.nn import functional as F

from visionmamba.ops.cuda import projections
from visionmamba.ops.cuda.projections import (
    gate_project,
    norm_project,
    supports_gate_project,
    supports_norm_project,
)

pytestmark = pytest.mark.gpu

# Both operands of the products are rounded, to 2^-9 and 2^-12, and so is the result.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
EPS = 1e-5
SHAPES = [(1, 1), (3, 197), (2, 333), (5, 4097)]


@pytest.fixture(params=["few", "many"])
def kernel(request, monkeypatch):
    """Take one of the two kinds of kernels at every number of tokens."""
    most = {"few": 1 << 40, "many": 0}[request.param]
    monkeypatch.setattr(projections, "_FEW_MOST_ROWS", most)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def relative_error(actual, expected):
    if not torch.isfinite(actual).all():
        return float("nan")
    return float((actual.double() - expected).norm() / expected.norm())


def norm_inputs(shape, d_model, dtype):
    branch = normal(*shape, d_model, dtype=dtype)
    weight = (normal(4 * d_model, d_model) * d_model**-0.5).to(dtype)
    return branch, 3 * normal(*shape, d_model), 1 + 0.3 * normal(d_model), weight


def gate_inputs(shape, d_model, dtype):
    d_inner = 2 * d_model
    y = normal(2, *shape, d_inner, dtype=dtype)
    z = normal(*shape, 2 * d_inner, dtype=dtype)[..., d_inner:]
    weight = (normal(d_model, d_inner) * d_inner**-0.5).to(dtype)
    return y, z, weight


def norm_project_in_float64(branch, residual, norm_weight, weight):
    total = branch.double() if residual is None else residual.double() + branch.double()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    return (total * scale * norm_weight.double()) @ weight.double().T, total


def gate_project_in_float64(y, z, scale, weight):
    return (scale * (y[0].double() + y[1].double()) * F.silu(z.double())) @ weight.double().T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_project_matches_float64(shape, half, kernel):
    branch, residual, norm_weight, weight = norm_inputs(shape, 192, half)
    xz, total = norm_project(branch, residual, norm_weight, EPS, weight)
    expected_xz, expected_total = norm_project_in_float64(branch, residual, norm_weight, weight)
    assert relative_error(xz, expected_xz) < TOLERANCE[half]
    assert relative_error(total, expected_total) < 1e-7


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_project_matches_float64(shape, half, kernel):
    y, z, weight = gate_inputs(shape, 192, half)
    branch = gate_project(y, z, 0.5, weight, None)
    assert relative_error(branch, gate_project_in_float64(y, z, 0.5, weight)) < TOLERANCE[half]


def test_without_residual_the_total_is_the_branch(kernel):
    branch, _, norm_weight, weight = norm_inputs((2, 197), 192, torch.bfloat16)
    xz, total = norm_project(branch, None, norm_weight, EPS, weight)
    expected, _ = norm_project_in_float64(branch, None, norm_weight, weight)
    assert torch.equal(total, branch.float())
    assert relative_error(xz, expected) < TOLERANCE[torch.bfloat16]


def test_layer_scale_multiplies_each_column(half, kernel):
    y, z, weight = gate_inputs((2, 197), 192, half)
    layer_scale = normal(192)
    branch = gate_project(y, z, 1.0, weight, layer_scale)
    expected = gate_project_in_float64(y, z, 1.0, weight) * layer_scale.double()
    assert relative_error(branch, expected) < TOLERANCE[half]


def test_float16_saturates(kernel):
    y, z, weight = gate_inputs((1, 64), 192, torch.float16)
    branch = gate_project(100 * y, z, 1.0, 100 * weight, torch.full((192,), 1e3, device="cuda"))
    assert branch.abs().max() == torch.finfo(torch.float16).max


def test_a_token_reads_no_other(kernel):
    branch, residual, norm_weight, weight = norm_inputs((1, 130), 192, torch.bfloat16)
    alone = norm_project(branch[:, -1:].clone(), residual[:, -1:].clone(), norm_weight, EPS, weight)
    xz, total = norm_project(branch, residual, norm_weight, EPS, weight)
    assert torch.equal(xz[:, -1:], alone[0])
    assert torch.equal(total[:, -1:], alone[1])


def test_widths_that_no_kernel_reads_are_refused():
    branch, _, _, weight = norm_inputs((1, 8), 96, torch.bfloat16)
    y, z, back = gate_inputs((1, 8), 160, torch.bfloat16)
    assert not supports_norm_project(branch, weight)
    assert not supports_norm_project(branch.float(), weight.float())
    assert not supports_gate_project(y, z, back)


def test_the_norm_is_left_to_its_own_kernel_where_that_is_quicker():
    branch, _, _, weight = norm_inputs((2, 8193), 192, torch.bfloat16)
    assert not supports_norm_project(branch, weight)
    assert supports_norm_project(branch[:1, :197], weight)


def test_graphs_replay_the_same_numbers(kernel):
    branch, residual, norm_weight, weight = norm_inputs((2, 197), 192, torch.bfloat16)
    expected = norm_project(branch, residual, norm_weight, EPS, weight)[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        xz, _ = norm_project(branch, residual, norm_weight, EPS, weight)
    xz.zero_()
    graph.replay()
    assert torch.equal(xz, expected)
