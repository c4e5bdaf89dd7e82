"""The Triton kernels interpreted on the CPU, against float64; test_interpreter.py runs this file.

Triton decides at its import whether it interprets, so these tests need a process of their own.
"""

import os
from dataclasses import replace

import pytest
import torch

from tests.ops.oracles import (
    FLOAT32_TOLERANCE,
    HALF_TOLERANCE,
    bidirectional_reference,
    make_probes,
    mixer_inputs,
    relative_error,
    scan_inputs,
    with_gradients,
)
from visionmamba.ops.selective_scan.reference import (
    selective_scan_reference,
    selective_scan_reference_backward,
)
from visionmamba.ops.triton import ops, scan
from visionmamba.ops.triton.scan import selective_scan_backward_triton, selective_scan_triton

assert os.environ["TRITON_INTERPRET"] == "1"

TOLERANCE = {torch.float32: FLOAT32_TOLERANCE, **HALF_TOLERANCE}
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of few channels, which the interpreter walks number by number."""
    for name in ("FORWARD", "BACKWARD"):
        tiling = replace(getattr(scan, name), tokens=4, channels=4, lanes=2)
        monkeypatch.setattr(scan, name, tiling)


@pytest.fixture
def chunks(monkeypatch):
    """Sequences of more than 8 tokens are cut in chunks."""
    monkeypatch.setattr(scan, "_SHORTEST_CHUNK", 8)
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(scan, name, replace(getattr(scan, name), programs=1000))


def assert_scan_agrees(inputs, *, reverse, dt_softplus=True):
    """Output, last state and every gradient are those of the float64 reference, by name."""
    tolerance = TOLERANCE[inputs["x"].dtype]
    given = [inputs.get(name) for name in NAMES]
    in_float64 = {name: value.double() for name, value in inputs.items()}
    options = {"reverse": reverse, "dt_softplus": dt_softplus}
    expected_y, expected_state = selective_scan_reference(**in_float64, **options)
    y, state = selective_scan_triton(*given, dt_softplus, reverse)
    assert y.dtype == inputs["x"].dtype
    assert relative_error(y, expected_y) < tolerance
    assert relative_error(state, expected_state) < tolerance

    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    expected = selective_scan_reference_backward(
        dy.double(), dstate.double(), **in_float64, **options
    )
    actual = selective_scan_backward_triton(dy, dstate, *given, dt_softplus, reverse)
    for name, gradient in zip(NAMES, actual, strict=True):
        if name in inputs:
            assert relative_error(gradient, getattr(expected, name)) < tolerance, name
        else:
            assert gradient.numel() == 0, name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "d_inner", "d_state"), [(1, 5, 3), (2, 5, 3), (17, 5, 3), (63, 2, 2)]
)
def test_scan_and_gradients_match_float64(length, d_inner, d_state, reverse):
    inputs = scan_inputs(length, batch=1, d_inner=d_inner, d_state=d_state)
    assert_scan_agrees(inputs, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_hand_on_states_and_gradients(chunks, reverse):
    assert_scan_agrees(scan_inputs(65, batch=1, d_inner=3, d_state=2), reverse=reverse)


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_half_precision(dtype):
    inputs = scan_inputs(9, batch=1, d_inner=5, d_state=3, dtype=dtype)
    assert_scan_agrees(inputs, reverse=False)


@pytest.mark.parametrize("d_state", [1, 16, 32])
def test_any_number_of_states(d_state):
    inputs = scan_inputs(6, batch=1, d_inner=3, d_state=d_state)
    assert_scan_agrees(inputs, reverse=True)


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias", "initial_state"])
def test_what_may_be_left_out(missing):
    inputs = scan_inputs(5, batch=2, d_inner=3, d_state=2)
    del inputs[missing]
    assert_scan_agrees(inputs, reverse=False)


def test_without_softplus():
    inputs = scan_inputs(9, batch=1, d_inner=3, d_state=2)
    inputs["dt"] = inputs["dt"].abs()
    inputs["dt_bias"] = inputs["dt_bias"].abs()
    assert_scan_agrees(inputs, reverse=True, dt_softplus=False)


def test_strided_views_are_read_in_place():
    inputs = scan_inputs(9, batch=2, d_inner=3, d_state=2)
    both = torch.cat([inputs["x"], inputs["z"]], dim=-1)
    inputs["x"], inputs["z"] = both.chunk(2, dim=-1)
    projected = torch.cat([inputs["dt"], inputs["B"], inputs["C"]], dim=-1)
    inputs["dt"], inputs["B"], inputs["C"] = projected.split([3, 2, 2], dim=-1)
    assert_scan_agrees(inputs, reverse=False)


def test_channels_that_do_not_lie_side_by_side():
    inputs = scan_inputs(5, batch=1, d_inner=3, d_state=2)
    inputs["x"] = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["A"] = inputs["A"].T.contiguous().T
    inputs["D"], inputs["dt_bias"] = (inputs[name][:1].expand(3) for name in ("D", "dt_bias"))
    assert_scan_agrees(inputs, reverse=False)


@pytest.mark.parametrize("reverse", [False, True])
def test_huge_steps_and_vanished_decays_stay_finite_and_right(chunks, reverse):
    inputs = scan_inputs(17, batch=1, d_inner=3, d_state=2)
    inputs["dt"][:, ::7] = 1e4
    inputs["dt"][:, 3::7] = -1e4
    assert_scan_agrees(inputs, reverse=reverse)


def test_float16_stops_at_its_largest_number():
    inputs = scan_inputs(3, batch=1, d_inner=2, d_state=2, dtype=torch.float16)
    inputs["x"] = torch.full_like(inputs["x"], 6e4)
    inputs["D"] = torch.full_like(inputs["D"], 4.0)
    inputs["z"] = torch.full_like(inputs["z"], 20.0)
    y, _ = selective_scan_triton(*(inputs[name] for name in NAMES), True, False)
    assert y.isfinite().all()
    assert y.abs().max() == 65504


def test_the_batch_is_cut_where_the_states_would_fill_the_memory(monkeypatch):
    monkeypatch.setattr(scan, "_SCRATCH_BYTES", 1)
    assert_scan_agrees(scan_inputs(6, batch=3, d_inner=3, d_state=2), reverse=False)


def test_ops_scan_in_triton_and_keep_nothing_for_the_backward():
    inputs = scan_inputs(5, batch=2, d_inner=3, d_state=2)
    given = (*(inputs[name] for name in NAMES), True, False)
    y, state, checkpoints = ops.selective_scan(*given, True)
    expected_y, expected_state = selective_scan_triton(*given)
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected_state)
    assert checkpoints.shape == (2, 0, 3, 2)
    gradients = ops.selective_scan_backward(y, state, checkpoints, *given)
    expected = selective_scan_backward_triton(y, state, *given)
    for name, actual, wanted in zip(NAMES, gradients, expected, strict=True):
        assert torch.equal(actual, wanted), name


def test_gradients_have_equal_bits_twice():
    inputs = scan_inputs(5, batch=2, d_inner=3, d_state=2)
    given = [inputs[name] for name in NAMES]
    dy = torch.randn_like(inputs["x"])
    first = selective_scan_backward_triton(dy, None, *given, True, False)
    second = selective_scan_backward_triton(dy, None, *given, True, False)
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("gated", [False, True])
def test_both_directions_match_float64(gated):
    inputs = mixer_inputs(7, batch=2, d_inner=3, d_state=2, dt_rank=2)
    if not gated:
        del inputs["z"]
    in_float64 = {name: value.double() for name, value in inputs.items()}

    def reference(leaves):
        return bidirectional_reference(leaves, scale=0.5)

    probes = make_probes(reference(in_float64))
    expected = with_gradients(reference, in_float64, probes)

    names = ("x", "projected", "dt_weight", "dt_bias", "A", "D")
    order = [f"{name}_{side}" for name in names for side in ("f", "b")]
    order += ["z", "initial_state_f", "initial_state_b"]
    given = (*(inputs.get(name) for name in order), 0.5)
    y, last_f, last_b, *kept = ops.bidirectional_scan(*given, True)
    for name, actual in (("y", y), ("state_f", last_f), ("state_b", last_b)):
        assert relative_error(actual, expected[name]) < FLOAT32_TOLERANCE, name
    dy, *dstates = (probes[name].float() for name in ("y", "state_f", "state_b"))
    gradients = ops.bidirectional_scan_backward(dy, *dstates, *kept, *given)
    for name, gradient in zip(order, gradients, strict=True):
        if name in inputs:
            assert relative_error(gradient, expected[f"d{name}"]) < FLOAT32_TOLERANCE, name
        else:
            assert gradient.numel() == 0, name
