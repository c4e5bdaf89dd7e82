"""The depthwise convolutions on every backend, against torch's conv1d in float64."""

import pytest
import torch
from torch.nn import functional as F

from tests.ops.oracles import (
    FLOAT32_TOLERANCE,
    HALF_TOLERANCE,
    OPCHECK_WARNING,
    assert_agrees,
    with_gradients,
)
from visionmamba.ops import bidirectional_conv1d, causal_conv1d


def conv_inputs(length, *, channels=19, taps=4, batch=2, dtype=torch.float32):
    return {
        "x": torch.randn(batch, length, channels).to(dtype),
        "weight": torch.randn(channels, taps),
        "bias": torch.randn(channels),
    }


def convolve(leaves, *, reverse=False, activation="silu"):
    y = causal_conv1d(
        leaves["x"],
        leaves["weight"],
        leaves.get("bias"),
        reverse=reverse,
        activation=activation,
    )
    return {"y": y}


def reference(leaves, *, reverse=False, activation="silu"):
    x, weight = leaves["x"], leaves["weight"]
    x = (x.flip(1) if reverse else x).transpose(1, 2)
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    y = F.conv1d(padded, weight[:, None], leaves.get("bias"), groups=x.shape[1]).transpose(1, 2)
    y = y.flip(1) if reverse else y
    return {"y": F.silu(y) if activation == "silu" else y}


def assert_conv_agrees(inputs, device, *, tolerance=FLOAT32_TOLERANCE, **options):
    assert_agrees(
        lambda leaves: convolve(leaves, **options),
        lambda leaves: reference(leaves, **options),
        inputs,
        device,
        tolerance,
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 128, 129, 1000])
def test_values_and_gradients_match_torch(length, reverse, device):
    assert_conv_agrees(conv_inputs(length), device, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 3, 7])
def test_any_number_of_taps(taps, reverse, device):
    assert_conv_agrees(conv_inputs(140, taps=taps), device, reverse=reverse)


@pytest.mark.parametrize("channels", [1, 16, 64])
def test_any_number_of_channels(channels, device):
    assert_conv_agrees(conv_inputs(70, channels=channels, batch=3), device)


def test_without_bias_and_activation(device):
    inputs = conv_inputs(140)
    del inputs["bias"]
    assert_conv_agrees(inputs, device, activation=None)


@pytest.mark.parametrize("reverse", [False, True])
def test_half_precision_stays_close(reverse, half, device):
    inputs = conv_inputs(140, dtype=half)
    assert_conv_agrees(inputs, device, reverse=reverse, tolerance=HALF_TOLERANCE[half])


def test_float16_output_stops_at_the_largest_value(device):
    inputs = conv_inputs(9, dtype=torch.float16)
    inputs["weight"] *= 1e6
    y = convolve({name: value.to(device) for name, value in inputs.items()}, activation=None)["y"]
    assert y.abs().max() == torch.finfo(torch.float16).max


def test_strided_view_is_read_in_place(device):
    inputs = {name: value.to(device) for name, value in conv_inputs(140).items()}
    nan = torch.full_like(inputs["x"], float("nan"))
    view = torch.cat([inputs["x"], nan], dim=-1).chunk(2, dim=-1)[0]
    assert torch.equal(convolve({**inputs, "x": view})["y"], convolve(inputs)["y"])


def both_inputs(length, dtype=torch.float32):
    forward, backward = conv_inputs(length, dtype=dtype), conv_inputs(length)
    return {
        "x": forward["x"],
        "weight_f": forward["weight"],
        "weight_b": backward["weight"],
        "bias_f": forward["bias"],
        "bias_b": backward["bias"],
    }


def both(leaves):
    u_f, u_b = bidirectional_conv1d(
        leaves["x"],
        (leaves["weight_f"], leaves["weight_b"]),
        (leaves["bias_f"], leaves["bias_b"]),
        activation="silu",
    )
    return {"u_f": u_f, "u_b": u_b}


def one_by_one(leaves):
    x, w_f, w_b, b_f, b_b = (leaves[name] for name in both_names())
    u_f = reference({"x": x, "weight": w_f, "bias": b_f})
    u_b = reference({"x": x, "weight": w_b, "bias": b_b}, reverse=True)
    return {"u_f": u_f["y"], "u_b": u_b["y"]}


def both_names():
    return ("x", "weight_f", "weight_b", "bias_f", "bias_b")


@pytest.mark.parametrize("length", [1, 2, 129, 300])
def test_both_directions_at_once_match_torch(length, device):
    assert_agrees(both, one_by_one, both_inputs(length), device, FLOAT32_TOLERANCE)


def test_both_directions_in_half_precision(half, device):
    inputs = both_inputs(140, dtype=half)
    assert_agrees(both, one_by_one, inputs, device, HALF_TOLERANCE[half])


def test_results_are_the_same_bit_for_bit(device):
    inputs = {name: value.to(device) for name, value in both_inputs(700).items()}
    first = with_gradients(both, inputs)
    for _ in range(4):
        again = with_gradients(both, inputs)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    leaves = [value.double().requires_grad_() for value in conv_inputs(6, channels=2).values()]
    assert torch.autograd.gradcheck(
        lambda x, w, b: causal_conv1d(x, w, b, reverse=reverse, activation="silu"), leaves
    )


def test_gradcheck_of_both_directions():
    shapes = ((1, 5, 2), (2, 4), (2, 4), (2,), (2,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda *values: tuple(both(dict(zip(both_names(), values, strict=True))).values()), leaves
    )


@OPCHECK_WARNING
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias, device):
    inputs = {name: value.to(device) for name, value in conv_inputs(140).items()}
    x, weight, bias = (value.requires_grad_() for value in inputs.values())
    arguments = (x, weight, bias if with_bias else None, True, True)
    torch.library.opcheck(torch.ops.visionmamba.causal_conv1d, arguments)
    backward = (torch.ones_like(x), *(a.detach() if torch.is_tensor(a) else a for a in arguments))
    torch.library.opcheck(torch.ops.visionmamba.causal_conv1d_backward, backward)


@OPCHECK_WARNING
def test_opcheck_of_both_directions(device):
    tensors = [value.to(device).requires_grad_() for value in both_inputs(140).values()]
    torch.library.opcheck(torch.ops.visionmamba.bidirectional_conv1d, (*tensors, True))
    detached = [tensor.detach() for tensor in tensors]
    backward = (torch.ones_like(detached[0]), torch.ones_like(detached[0]), *detached, True)
    torch.library.opcheck(torch.ops.visionmamba.bidirectional_conv1d_backward, backward)


def test_compiles_to_one_graph_forward_and_backward(device):
    inputs = {name: value.to(device) for name, value in both_inputs(65).items()}
    expected = with_gradients(both, inputs)
    actual = with_gradients(torch.compile(both, fullgraph=True, backend="aot_eager"), inputs)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        convolve(conv_inputs(5), activation="relu")


def test_wrong_weight_is_named():
    inputs = conv_inputs(5)
    inputs["weight"] = inputs["weight"][:3]
    with pytest.raises(ValueError, match=r"weight must have shape \(E, K\) = \(19, 4\), got"):
        convolve(inputs)


def test_missing_direction_is_named():
    x, weight, bias = conv_inputs(5).values()
    with pytest.raises(ValueError, match="weight must hold one tensor for each of the 2"):
        bidirectional_conv1d(x, (weight,), (bias, bias))
