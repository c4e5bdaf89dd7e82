"""The root-mean-square norm on every backend, against its formula in float64."""

import pytest
import torch

from tests.ops.oracles import (
    FLOAT32_TOLERANCE,
    HALF_TOLERANCE,
    OPCHECK_WARNING,
    assert_agrees,
    with_gradients,
)
from visionmamba.ops import rms_norm


def norm_inputs(*shape, dtype=torch.float32):
    return {
        "x": torch.randn(shape).to(dtype),
        "weight": torch.randn(shape[-1]),
        "residual": torch.randn(shape),
    }


def norm(leaves):
    if "residual" not in leaves:
        return {"normed": rms_norm(leaves["x"], leaves["weight"])}
    normed, total = rms_norm(leaves["x"], leaves["weight"], residual=leaves["residual"])
    return {"normed": normed, "total": total}


def formula(leaves):
    total = leaves["x"] + leaves.get("residual", 0)
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * leaves["weight"]
    return {"normed": normed, "total": total} if "residual" in leaves else {"normed": normed}


@pytest.mark.parametrize("shape", [(1, 1, 1), (19,), (3, 16), (2, 65, 19), (2, 197, 192)])
def test_values_and_gradients_match_formula(shape, device):
    assert_agrees(norm, formula, norm_inputs(*shape), device, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("shape", [(19,), (2, 65, 19), (2, 197, 192)])
def test_without_residual(shape, device):
    inputs = norm_inputs(*shape)
    del inputs["residual"]
    assert_agrees(norm, formula, inputs, device, FLOAT32_TOLERANCE)


def test_half_precision_beside_a_float32_residual(half, device):
    inputs = norm_inputs(2, 65, 40, dtype=half)
    assert_agrees(norm, formula, inputs, device, HALF_TOLERANCE[half])
    result = norm({name: value.to(device) for name, value in inputs.items()})
    assert (result["normed"].dtype, result["total"].dtype) == (half, torch.float32)


def test_half_precision_residual_keeps_its_dtype(half, device):
    inputs = norm_inputs(2, 65, 40, dtype=half)
    inputs["residual"] = inputs["residual"].to(half)
    assert_agrees(norm, formula, inputs, device, HALF_TOLERANCE[half])
    result = norm({name: value.to(device) for name, value in inputs.items()})
    assert result["total"].dtype == half


def test_float16_outputs_stop_at_the_largest_value(device):
    inputs = norm_inputs(3, 40, dtype=torch.float16)
    inputs["weight"] *= 1e6
    inputs["residual"] = torch.full((3, 40), 60000.0).half()
    inputs["x"] = inputs["residual"].clone()
    result = norm({name: value.to(device) for name, value in inputs.items()})
    assert result["normed"].abs().max() == torch.finfo(torch.float16).max
    assert result["total"].abs().max() == torch.finfo(torch.float16).max


def test_gradient_of_one_output_alone(device):
    inputs = norm_inputs(2, 65, 19)
    for name in ("normed", "total"):
        assert_agrees(
            lambda leaves, name=name: {name: norm(leaves)[name] + 0 * norm(leaves)["normed"]},
            lambda leaves, name=name: {name: formula(leaves)[name] + 0 * formula(leaves)["normed"]},
            inputs,
            device,
            FLOAT32_TOLERANCE,
        )


def test_autocast_does_not_change_the_result(device):
    inputs = {name: value.to(device) for name, value in norm_inputs(2, 65, 40).items()}
    expected = with_gradients(norm, inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = with_gradients(norm, inputs)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_results_are_the_same_bit_for_bit(device):
    inputs = {name: value.to(device) for name, value in norm_inputs(4, 500, 96).items()}
    first = with_gradients(norm, inputs)
    for _ in range(4):
        again = with_gradients(norm, inputs)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(with_residual):
    inputs = norm_inputs(2, 3, 4)
    names = list(inputs) if with_residual else ["x", "weight"]
    leaves = [inputs[name].double().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: tuple(norm(dict(zip(names, values, strict=True))).values()), leaves
    )


@OPCHECK_WARNING
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(with_residual, device):
    inputs = {name: value.to(device) for name, value in norm_inputs(2, 65, 19).items()}
    x, weight, residual = (value.requires_grad_() for value in inputs.values())
    arguments = (x, weight, residual if with_residual else None, 1e-5)
    torch.library.opcheck(torch.ops.visionmamba.rms_norm, arguments)
    ones = torch.ones_like(x)
    given = (x.detach(), weight.detach(), 1e-5)
    if with_residual:
        backward = (ones.bfloat16(), ones, *given, torch.bfloat16, torch.float32)
    else:
        backward = (ones, None, *given, torch.float32, None)
    torch.library.opcheck(torch.ops.visionmamba.rms_norm_backward, backward)


def test_compiles_to_one_graph_forward_and_backward(device):
    inputs = {name: value.to(device) for name, value in norm_inputs(2, 65, 19).items()}
    expected = with_gradients(norm, inputs)
    actual = with_gradients(torch.compile(norm, fullgraph=True, backend="aot_eager"), inputs)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_wrong_shapes_are_named():
    x, weight, residual = norm_inputs(2, 5, 8).values()
    with pytest.raises(ValueError, match=r"weight must have shape \(D,\) = \(8,\), got \(7,\)"):
        rms_norm(x, weight[:7])
    with pytest.raises(ValueError, match=r"residual must have shape .* = \(2, 5, 8\), got"):
        rms_norm(x, weight, residual=residual[:1])
