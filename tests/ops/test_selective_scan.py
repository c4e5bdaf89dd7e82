"""The selective scan on every backend: closed forms, the float64 reference, torch's checks."""

import functools

import pytest
import torch
from torch.nn import functional as F

from tests.ops.oracles import (
    FLOAT32_TOLERANCE,
    HALF_TOLERANCE,
    OPCHECK_WARNING,
    assert_agrees,
    in_float64,
    relative_error,
    scan_inputs,
    scan_reference,
    with_gradients,
)
from visionmamba.ops import selective_scan
from visionmamba.ops.selective_scan.reference import (
    selective_scan_reference,
    selective_scan_reference_backward,
)

LENGTHS = (1, 2, 63, 64, 65, 197, 1000)
EXP_TOLERANCE = 3e-7  # of e^x for x in [-1, 0]: three units in the last place


def scan(inputs, *, reverse=False, dt_softplus=True):
    y, state = selective_scan(**inputs, reverse=reverse, dt_softplus=dt_softplus, return_state=True)
    return {"y": y, "state": state}


def assert_scan_agrees(inputs, device, *, reverse=False, dt_softplus=True, tolerance=None):
    assert_agrees(
        lambda leaves: scan(leaves, reverse=reverse, dt_softplus=dt_softplus),
        lambda leaves: scan_reference(leaves, reverse=reverse, dt_softplus=dt_softplus),
        inputs,
        device,
        tolerance or FLOAT32_TOLERANCE,
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_match_reference(length, reverse, device):
    inputs, expected = reference_case(length, reverse)
    actual = with_gradients(
        lambda leaves: scan(leaves, reverse=reverse),
        {name: value.to(device) for name, value in inputs.items()},
    )
    for name, value in expected.items():
        assert relative_error(actual[name], value) < FLOAT32_TOLERANCE, name


@functools.cache
def reference_case(length, reverse):
    inputs = scan_inputs(length)
    function = functools.partial(scan_reference, reverse=reverse, dt_softplus=True)
    return inputs, in_float64(function, inputs)


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_state", "all"])
def test_optional_inputs_can_be_left_out(left_out, device):
    inputs = scan_inputs(65)
    names = ("D", "z", "dt_bias", "initial_state") if left_out == "all" else (left_out,)
    kept = {name: value for name, value in inputs.items() if name not in names}
    assert_scan_agrees(kept, device)


def test_step_without_softplus(device):
    inputs = scan_inputs(65)
    inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs(), inputs["dt_bias"].abs()
    assert_scan_agrees(inputs, device, dt_softplus=False)


@pytest.mark.parametrize("d_state", [1, 5, 8, 32, 64])
def test_any_number_of_states(d_state, device):
    assert_scan_agrees(scan_inputs(66, d_state=d_state), device)


@pytest.mark.parametrize("d_inner", [1, 16, 40])
def test_any_number_of_channels(d_inner, device):
    assert_scan_agrees(scan_inputs(66, d_inner=d_inner, batch=3), device, reverse=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_half_precision_stays_close_to_reference(reverse, half, device):
    inputs = scan_inputs(197, dtype=half)
    assert_scan_agrees(inputs, device, reverse=reverse, tolerance=HALF_TOLERANCE[half])


def test_half_precision_keeps_its_dtype_and_a_float32_state(half, device):
    inputs = {name: value.to(device) for name, value in scan_inputs(5, dtype=half).items()}
    result = scan(inputs)
    assert result["y"].dtype == half
    assert result["state"].dtype == torch.float32


def test_float16_output_stops_at_the_largest_value(device):
    inputs = {name: value.to(device) for name, value in scan_inputs(9, dtype=torch.float16).items()}
    inputs["D"] = inputs["D"].sign() * 1e6
    assert scan(inputs)["y"].abs().max() == torch.finfo(torch.float16).max


def test_mixed_dtypes_equal_the_same_values_in_float32(device):
    inputs = scan_inputs(65, dtype=torch.bfloat16)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    wide = scan({name: value.float() for name, value in inputs.items()})
    mixed = scan(inputs | {"dt": inputs["dt"].float()})
    assert torch.equal(mixed["y"], wide["y"].bfloat16())
    assert torch.equal(mixed["state"], wide["state"])


def test_autocast_does_not_change_the_result(device):
    inputs = {name: value.to(device) for name, value in scan_inputs(65).items()}
    expected = with_gradients(scan, inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = with_gradients(scan, inputs)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_strided_views_are_read_in_place(device):
    inputs = {name: value.to(device) for name, value in scan_inputs(65).items()}
    expected = scan(inputs)
    nan = torch.full_like(inputs["x"], float("nan"))
    views = {name: torch.cat([inputs[name], nan], dim=-1).chunk(2, -1)[0] for name in ("x", "z")}
    states = torch.cat([inputs["B"], inputs["C"]], dim=-1)
    views |= {"B": states[..., :16], "C": states[..., 16:]}
    views["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    actual = scan(inputs | views)
    for name in ("y", "state"):
        assert relative_error(actual[name], expected[name]) < FLOAT32_TOLERANCE, name


def test_constant_parameters_give_an_explicit_convolution(device):
    batch, length, d_inner, d_state = 2, 50, 6, 4
    x = torch.randn(batch, length, d_inner)
    dt = torch.rand(d_inner) * 0.2 + 0.01
    A, B, C = -torch.rand(d_inner, d_state), torch.randn(d_state), torch.randn(d_state)
    time = torch.arange(length, dtype=torch.float64)
    decay = torch.exp(time * (dt[:, None] * A)[..., None].double())  # (E, N, L)
    kernel = torch.einsum("n,n,enl,e->el", C.double(), B.double(), decay, dt.double())
    padded = F.pad(x.double().transpose(1, 2), (length - 1, 0))
    expected = F.conv1d(padded, kernel.flip(1)[:, None], groups=d_inner).transpose(1, 2)
    tensors = (
        x,
        dt.expand(batch, length, d_inner),
        A,
        B.expand(batch, length, d_state),
        C.expand(batch, length, d_state),
    )
    actual = selective_scan(*(tensor.to(device) for tensor in tensors))
    assert relative_error(actual, expected) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("length", [1, 65, 197])
def test_reversed_equals_flipped(length, device):
    def flipped(leaves):
        along = {name: leaves[name].flip(1) for name in ("x", "dt", "B", "C", "z")}
        result = scan({**leaves, **along})
        return {"y": result["y"].flip(1), "state": result["state"]}

    inputs = {name: value.to(device) for name, value in scan_inputs(length).items()}
    expected = with_gradients(flipped, inputs)
    actual = with_gradients(lambda leaves: scan(leaves, reverse=True), inputs)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < FLOAT32_TOLERANCE, name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [1, 64, 100])
def test_two_halves_with_carried_state_equal_the_whole(cut, reverse, device):
    def halves(leaves):
        along = ("x", "dt", "B", "C", "z")
        parts = [
            {**leaves, **{name: leaves[name][:, piece] for name in along}}
            for piece in (slice(None, cut), slice(cut, None))
        ]
        first, second = reversed(parts) if reverse else parts
        before = scan(first, reverse=reverse)
        after = scan({**second, "initial_state": before["state"]}, reverse=reverse)
        ys = (after["y"], before["y"]) if reverse else (before["y"], after["y"])
        return {"y": torch.cat(ys, dim=1), "state": after["state"]}

    inputs = {name: value.to(device) for name, value in scan_inputs(197).items()}
    expected = with_gradients(lambda leaves: scan(leaves, reverse=reverse), inputs)
    actual = with_gradients(halves, inputs)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < FLOAT32_TOLERANCE, name


def test_huge_steps_and_vanished_decays_stay_finite_and_right(device):
    inputs = scan_inputs(300)
    inputs["dt"] = torch.rand_like(inputs["dt"]) * 100
    inputs["A"] = inputs["A"] * 50
    assert_scan_agrees(inputs, device)


def test_tiny_steps_keep_a_long_memory(device):
    inputs = scan_inputs(1000)
    inputs["dt"] = torch.full_like(inputs["dt"], 1e-5)
    inputs |= {"dt_bias": torch.zeros(19), "x": torch.zeros_like(inputs["x"])}
    expected = inputs["initial_state"].double() * torch.exp(1000 * 1e-5 * inputs["A"].double())
    inputs = {name: value.to(device) for name, value in inputs.items()}
    actual = scan(inputs, dt_softplus=False)["state"]
    assert relative_error(actual, expected) < 3e-5  # a decay near 1 rounded 1000 times the same way


@pytest.mark.parametrize(("lowest", "tolerance"), [(-1.0, EXP_TOLERANCE), (-80.0, 1e-5)])
def test_exponential_is_accurate(lowest, tolerance, device):
    A = torch.linspace(lowest, 0, 4096).view(256, 16)
    ones, zeros = torch.ones(1, 1, 256), torch.zeros(1, 1, 16)
    inputs = {"x": ones, "dt": ones, "A": A, "B": zeros, "C": zeros}
    inputs["initial_state"] = torch.ones(1, 256, 16)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    state = scan(inputs, dt_softplus=False)["state"][0].cpu()
    error = (state.double() / torch.exp(A.double()) - 1).abs().max()
    assert error < tolerance
    assert state[-1, -1] == 1


def test_results_are_the_same_bit_for_bit(device):
    inputs = {name: value.to(device) for name, value in scan_inputs(200, d_inner=96).items()}
    first = with_gradients(scan, inputs)
    for _ in range(3):
        again = with_gradients(scan, inputs)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_gradient_of_the_last_state_alone(device):
    inputs = {name: value.to(device) for name, value in scan_inputs(65).items()}
    names = ("x", "dt", "A", "B", "initial_state")
    leaves = {name: inputs[name].requires_grad_() for name in names}
    state = scan({**inputs, **leaves})["state"]
    actual = torch.autograd.grad(state.sum(), list(leaves.values()))
    wide = {name: value.detach().cpu().double() for name, value in inputs.items()}
    zero, ones = torch.zeros(2, 65, 19).double(), torch.ones(2, 19, 16).double()
    expected = selective_scan_reference_backward(zero, ones, **wide, dt_softplus=True)
    for name, gradient in zip(names, actual, strict=True):
        assert relative_error(gradient, getattr(expected, name)) < FLOAT32_TOLERANCE, name


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_backward_written_by_hand_is_the_derivative(reverse):
    inputs = {name: value.double() for name, value in scan_inputs(30, d_state=3).items()}
    probes = {"y": torch.randn(2, 30, 19).double(), "state": torch.randn(2, 19, 3).double()}
    expected = with_gradients(
        lambda leaves: scan_reference(leaves, reverse=reverse, dt_softplus=True), inputs, probes
    )
    actual = selective_scan_reference_backward(
        probes["y"], probes["state"], **inputs, dt_softplus=True, reverse=reverse
    )
    for name in inputs:
        assert relative_error(getattr(actual, name), expected[f"d{name}"]) < 1e-12, name


def test_float64_inputs_are_computed_in_float64(device):
    inputs = {name: value.double().to(device) for name, value in scan_inputs(65).items()}
    y, _ = selective_scan_reference(**inputs, dt_softplus=True)
    assert relative_error(scan(inputs)["y"], y) < 1e-12


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    small = scan_inputs(5, d_inner=3, d_state=2)
    leaves = [value.double().requires_grad_() for value in small.values()]

    def function(*values):
        result = scan(dict(zip(small, values, strict=True)), reverse=reverse)
        return result["y"], result["state"]

    assert torch.autograd.gradcheck(function, leaves)


@OPCHECK_WARNING
@pytest.mark.parametrize("given", [True, False])
def test_opcheck(given, device):
    inputs = {name: value.to(device) for name, value in scan_inputs(70).items()}
    tensors = [value.requires_grad_() for value in inputs.values()]
    if not given:
        tensors[5:] = [None] * 4
    torch.library.opcheck(torch.ops.visionmamba.selective_scan, (*tensors, True, False, True))


def test_opcheck_of_the_backward(device):
    inputs = {name: value.to(device) for name, value in scan_inputs(70).items()}
    y, state, kept = torch.ops.visionmamba.selective_scan(*inputs.values(), True, False, True)
    arguments = (y, state, kept, *inputs.values(), True, False)
    torch.library.opcheck(torch.ops.visionmamba.selective_scan_backward, arguments)


def test_backward_works_without_stored_states(device):
    inputs = {name: value.to(device) for name, value in scan_inputs(197).items()}
    leaves = [value.requires_grad_() for value in inputs.values()]
    y, _, _ = torch.ops.visionmamba.selective_scan(*leaves, True, False, False)
    wanted, _, _ = torch.ops.visionmamba.selective_scan(*leaves, True, False, True)
    expected = torch.autograd.grad(wanted.sum(), leaves)
    actual = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_compiles_to_one_graph_forward_and_backward(device):
    inputs = {name: value.to(device) for name, value in scan_inputs(65).items()}
    expected = with_gradients(scan, inputs)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, inputs)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_exports_with_a_dynamic_length(device):
    class Module(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            return selective_scan(x, dt, A, B, C, dt_softplus=True)

    def arguments(length):
        inputs = scan_inputs(length)
        return tuple(inputs[name].to(device) for name in ("x", "dt", "A", "B", "C"))

    length = torch.export.Dim("length", min=2)
    dynamic = ({1: length}, {1: length}, None, {1: length}, {1: length})
    program = torch.export.export(Module(), arguments(65), dynamic_shapes=dynamic)
    other = arguments(130)
    assert torch.equal(program.module()(*other), Module()(*other))


WRONG = (
    ("x", lambda t: t[0], r"x must have shape \(B, L, d_inner\), got \(7, 19\); reshape x to 3"),
    ("x", lambda t: t[:, :0], r"x must have shape .* without empty axes, got \(2, 0, 19\)"),
    ("dt", lambda t: t[:, :6], r"dt must have shape .* = \(2, 7, 19\), got \(2, 6, 19\); reshape"),
    ("A", lambda t: t[:5], r"A must have shape \(d_inner, N\) = \(19, 16\), got \(5, 16\)"),
    ("B", lambda t: t[..., :3], r"B must have shape \(B, L, N\) = \(2, 7, 16\), got \(2, 7, 3\)"),
    ("C", lambda t: t[:1], r"C must have shape \(B, L, N\) = \(2, 7, 16\), got \(1, 7, 16\)"),
    ("D", lambda t: t[None], r"D must have shape \(d_inner,\) = \(19,\), got \(1, 19\)"),
    ("z", lambda t: t[..., :5], r"z must have shape .* = \(2, 7, 19\), got \(2, 7, 5\)"),
    ("dt_bias", lambda t: t[:5], r"dt_bias must have shape \(d_inner,\) = \(19,\), got \(5,\)"),
    ("initial_state", lambda t: t[0], r"initial_state must have shape .* got \(19, 16\)"),
    ("x", lambda t: t.long(), r"x must be float32, bfloat16 or float16, got int64; convert"),
    ("B", lambda t: t.double(), r"B must not mix float64 with other dtypes, got float64 beside x"),
    ("C", lambda t: t.to("meta"), r"C must be on cpu like x, got meta; move it with C.to"),
)


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG)
def test_wrong_input_is_named_with_a_remedy(name, spoil, message):
    inputs = scan_inputs(7)
    inputs[name] = spoil(inputs[name])
    with pytest.raises(ValueError, match=f"selective_scan: {message}"):
        selective_scan(**inputs)
