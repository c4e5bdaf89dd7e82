"""The fused core of the mixer on every backend, against two sequential scans in float64."""

import functools

import pytest
import torch

from tests.ops.oracles import (
    FLOAT32_TOLERANCE,
    HALF_TOLERANCE,
    OPCHECK_WARNING,
    assert_agrees,
    bidirectional_reference,
    in_float64,
    mixer_inputs,
    relative_error,
    with_gradients,
)
from visionmamba.ops import bidirectional_scan

PAIRS = ("x", "projected", "dt_weight", "dt_bias", "A", "D")


def mix(leaves, *, scale=0.5):
    pairs = {name: (leaves[f"{name}_f"], leaves[f"{name}_b"]) for name in PAIRS}
    if "initial_state_f" in leaves:
        pairs["initial_state"] = (leaves["initial_state_f"], leaves["initial_state_b"])
    y, states = bidirectional_scan(**pairs, z=leaves.get("z"), scale=scale, return_state=True)
    return {"y": y, "state_f": states[0], "state_b": states[1]}


def assert_mix_agrees(inputs, device, *, scale=0.5, tolerance=FLOAT32_TOLERANCE):
    assert_agrees(
        lambda leaves: mix(leaves, scale=scale),
        lambda leaves: bidirectional_reference(leaves, scale=scale),
        inputs,
        device,
        tolerance,
    )


def on(device, inputs):
    return {name: value.to(device) for name, value in inputs.items()}


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 197, 1000])
def test_values_and_gradients_match_reference(length, device):
    inputs, expected = reference_case(length)
    actual = with_gradients(mix, on(device, inputs))
    for name, value in expected.items():
        assert relative_error(actual[name], value) < FLOAT32_TOLERANCE, name


@functools.cache
def reference_case(length):
    inputs = mixer_inputs(length)
    return inputs, in_float64(functools.partial(bidirectional_reference, scale=0.5), inputs)


@pytest.mark.parametrize("left_out", [("z",), ("initial_state_f", "initial_state_b")])
def test_gate_and_states_can_be_left_out(left_out, device):
    inputs = mixer_inputs(65)
    kept = {name: value for name, value in inputs.items() if name not in left_out}
    assert_mix_agrees(kept, device, scale=1.0)


@pytest.mark.parametrize(
    ("d_inner", "d_state", "dt_rank"), [(1, 1, 1), (16, 8, 4), (33, 5, 3), (48, 32, 12), (8, 64, 2)]
)
def test_any_sizes(d_inner, d_state, dt_rank, device):
    inputs = mixer_inputs(66, d_inner=d_inner, d_state=d_state, dt_rank=dt_rank, batch=3)
    assert_mix_agrees(inputs, device)


def test_half_precision_stays_close_to_reference(half, device):
    inputs = mixer_inputs(197, dtype=half)
    assert_mix_agrees(inputs, device, tolerance=HALF_TOLERANCE[half])


def test_float16_output_stops_at_the_largest_value(device):
    inputs = on(device, mixer_inputs(9, dtype=torch.float16))
    y = mix(inputs, scale=1e7)["y"]
    assert y.abs().max() == torch.finfo(torch.float16).max


def test_both_directions_may_share_their_tensors(device):
    inputs = on(device, mixer_inputs(65))
    shared = ("x", "projected", "dt_weight", "dt_bias", "D")

    def unroll(leaves):
        both = {f"{name}_b": leaves[f"{name}_f"] for name in shared}
        return {**leaves, **both}

    own = {name: value for name, value in inputs.items() if name[:-2] not in shared or "_f" in name}
    actual = with_gradients(lambda leaves: mix(unroll(leaves)), own)
    expected = with_gradients(
        lambda leaves: bidirectional_reference(unroll(leaves), scale=0.5),
        {name: value.cpu().double() for name, value in own.items()},
    )
    for name, value in expected.items():
        assert relative_error(actual[name], value) < FLOAT32_TOLERANCE, name


def test_halves_of_one_projection_are_read_in_place(device):
    inputs = on(device, mixer_inputs(65))
    expected = mix(inputs)
    nan = torch.full_like(inputs["z"], float("nan"))
    views = {
        "x_f": torch.cat([inputs["x_f"], nan], -1).chunk(2, -1)[0],
        "z": torch.cat([nan, inputs["z"]], -1).chunk(2, -1)[1],
    }
    actual = mix(inputs | views)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < FLOAT32_TOLERANCE, name


def test_mixed_dtypes_equal_the_same_values_in_float32(device):
    inputs = on(device, mixer_inputs(65, dtype=torch.bfloat16))
    wide = mix({name: value.float() for name, value in inputs.items()})
    mixed = mix(inputs | {"z": inputs["z"].float()})
    assert torch.equal(mixed["y"], wide["y"].bfloat16())


def test_autocast_does_not_change_the_result(device):
    inputs = on(device, mixer_inputs(65))
    expected = with_gradients(mix, inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = with_gradients(mix, inputs)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_results_are_the_same_bit_for_bit(device):
    inputs = on(device, mixer_inputs(200, d_inner=96))
    first = with_gradients(mix, inputs)
    for _ in range(3):
        again = with_gradients(mix, inputs)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_huge_steps_stay_finite_and_right(device):
    inputs = mixer_inputs(300)
    for side in ("f", "b"):
        inputs[f"dt_bias_{side}"] = torch.full_like(inputs[f"dt_bias_{side}"], 90.0)
    assert_mix_agrees(inputs, device)


def test_gradcheck():
    small = mixer_inputs(4, batch=1, d_inner=2, d_state=2, dt_rank=1)
    leaves = [value.double().requires_grad_() for value in small.values()]

    def function(*values):
        return tuple(mix(dict(zip(small, values, strict=True))).values())

    assert torch.autograd.gradcheck(function, leaves)


def op_arguments(inputs):
    names = [f"{name}_{side}" for name in PAIRS for side in ("f", "b")]
    return [inputs[name] for name in (*names, "z", "initial_state_f", "initial_state_b")]


@OPCHECK_WARNING
def test_opcheck(device):
    tensors = [value.requires_grad_() for value in op_arguments(on(device, mixer_inputs(70)))]
    torch.library.opcheck(torch.ops.visionmamba.bidirectional_scan, (*tensors, 0.5, True))


def test_opcheck_of_the_backward(device):
    tensors = op_arguments(on(device, mixer_inputs(70)))
    y, *states = torch.ops.visionmamba.bidirectional_scan(*tensors, 0.5, True)
    arguments = (y, *states, *tensors, 0.5)
    torch.library.opcheck(torch.ops.visionmamba.bidirectional_scan_backward, arguments)


def test_backward_works_without_stored_states(device):
    leaves = [value.requires_grad_() for value in op_arguments(on(device, mixer_inputs(197)))]
    y, *_ = torch.ops.visionmamba.bidirectional_scan(*leaves, 0.5, False)
    wanted, *_ = torch.ops.visionmamba.bidirectional_scan(*leaves, 0.5, True)
    expected = torch.autograd.grad(wanted.sum(), leaves)
    actual = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_compiles_to_one_graph_forward_and_backward(device):
    inputs = on(device, mixer_inputs(65))
    expected = with_gradients(mix, inputs)
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, inputs)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_exports(device):
    class Module(torch.nn.Module):
        def forward(self, *values):
            return tuple(mix(dict(zip(names, values, strict=True))).values())

    inputs = on(device, mixer_inputs(65))
    names, values = list(inputs), tuple(inputs.values())
    program = torch.export.export(Module(), values)
    for actual, expected in zip(program.module()(*values), Module()(*values), strict=True):
        assert torch.equal(actual, expected)


WRONG = (
    ("x_b", lambda t: t[:, :3], r"x\[1\] must have shape \(B, L, E\) = \(2, 7, 19\), got \(2, 3,"),
    ("projected_f", lambda t: t[..., :9], r"projected\[0\] must have shape .* = \(2, 7, 37\), got"),
    ("dt_weight_b", lambda t: t.T, r"dt_weight\[1\] must have shape \(E, R\) = \(19, 5\), got"),
    ("A_b", lambda t: t[:, :4], r"A\[1\] must have shape \(E, N\) = \(19, 16\), got \(19, 4\)"),
    ("z", lambda t: t[0], r"z must have shape \(B, L, E\) = \(2, 7, 19\), got \(7, 19\)"),
    ("D_f", lambda t: t.int(), r"D\[0\] must be float32, bfloat16 or float16, got int32; convert"),
    ("x_b", lambda t: t.to("meta"), r"x\[1\] must be on cpu like x\[0\], got meta; move it"),
)


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG)
def test_wrong_input_is_named_with_a_remedy(name, spoil, message):
    inputs = mixer_inputs(7)
    inputs[name] = spoil(inputs[name])
    with pytest.raises(ValueError, match=f"bidirectional_scan: {message}"):
        mix(inputs)


def test_missing_direction_is_named():
    inputs = mixer_inputs(7)
    pairs = {name: (inputs[f"{name}_f"], inputs[f"{name}_b"]) for name in PAIRS}
    pairs["A"] = pairs["A"][:1]
    with pytest.raises(ValueError, match="A must hold one tensor for each of the 2 directions"):
        bidirectional_scan(**pairs, z=None)
