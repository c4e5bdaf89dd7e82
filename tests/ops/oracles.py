"""Inputs by name, float64 answers with every gradient, and the measure of agreement."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.ops.selective_scan.reference import selective_scan_reference

# Measured worst relative errors are 1.4e-6 in float32, 5e-3 in bfloat16 and 1e-3 in float16.
FLOAT32_TOLERANCE = 5e-6
HALF_TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}

# opcheck itself reads .grad of its own copies; torch warns of that where a warning is an error.
OPCHECK_WARNING = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)

Inputs = dict[str, Tensor]
Results = dict[str, Tensor]
Function = Callable[[Mapping[str, Tensor]], Results]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what was expected; nan if anything is not finite."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if not torch.isfinite(actual).all():
        return float("nan")
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def with_gradients(function: Function, inputs: Inputs, probes: Results | None = None) -> Results:
    """The results and, as 'd' + name, each input's gradient of the sum of probe * result."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    results = function(leaves)
    if probes is None:
        probes = make_probes(results)
    loss = torch.zeros((), dtype=torch.float64, device=next(iter(results.values())).device)
    for name, result in results.items():
        loss = loss + (result.double() * probes[name].to(result.device)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {**results, **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def make_probes(results: Results) -> Results:
    """Fixed random weights for every result."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(result.shape, generator=generator, dtype=torch.float64)
        for name, result in results.items()
    }


def in_float64(oracle: Function, inputs: Inputs) -> Results:
    """The oracle's results and gradients for these inputs, computed in float64."""
    return with_gradients(oracle, {name: value.double() for name, value in inputs.items()})


def assert_agrees(
    function: Function,
    oracle: Function,
    inputs: Inputs,
    device: str,
    tolerance: float,
) -> None:
    """Every result and gradient of `function` on the device is the float64 oracle's, by name."""
    expected = in_float64(oracle, inputs)
    actual = with_gradients(function, {name: value.to(device) for name, value in inputs.items()})
    for name, value in expected.items():
        assert relative_error(actual[name], value) < tolerance, name


def scan_inputs(
    length: int, *, batch: int = 2, d_inner: int = 19, d_state: int = 16, **dtypes: torch.dtype
) -> Inputs:
    """All inputs of the selective scan; dtype= sets that of the activations."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dtype = dtypes.get("dtype", torch.float32)
    return {
        "x": normal(batch, length, d_inner).to(dtype),
        "dt": (normal(batch, length, d_inner) - 1).to(dtype),
        "A": -4 * torch.rand((d_inner, d_state), generator=generator),
        "B": normal(batch, length, d_state).to(dtype),
        "C": normal(batch, length, d_state).to(dtype),
        "D": normal(d_inner),
        "z": normal(batch, length, d_inner).to(dtype),
        "dt_bias": normal(d_inner),
        "initial_state": normal(batch, d_inner, d_state),
    }


def scan_reference(inputs: Mapping[str, Tensor], *, reverse: bool, dt_softplus: bool) -> Results:
    """The sequential scan as a function of named inputs."""
    y, state = selective_scan_reference(**inputs, reverse=reverse, dt_softplus=dt_softplus)
    return {"y": y, "state": state}


def mixer_inputs(
    length: int,
    *,
    batch: int = 2,
    d_inner: int = 19,
    d_state: int = 16,
    dt_rank: int = 5,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """All inputs of the bidirectional scan, _f and _b by direction."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {"z": normal(batch, length, d_inner).to(dtype)}
    for side in ("f", "b"):
        inputs |= {
            f"x_{side}": normal(batch, length, d_inner).to(dtype),
            f"projected_{side}": normal(batch, length, dt_rank + 2 * d_state).to(dtype),
            f"dt_weight_{side}": normal(d_inner, dt_rank) / dt_rank**0.5,
            f"dt_bias_{side}": normal(d_inner) - 1,
            f"A_{side}": -4 * torch.rand((d_inner, d_state), generator=generator),
            f"D_{side}": normal(d_inner),
            f"initial_state_{side}": normal(batch, d_inner, d_state),
        }
    return inputs


def bidirectional_reference(inputs: Mapping[str, Tensor], *, scale: float) -> Results:
    """The mixer's core as published, one token at a time: gate each direction, then sum."""
    total: Tensor | float = 0.0
    results = {}
    for side in ("f", "b"):
        A, dt_weight = inputs[f"A_{side}"], inputs[f"dt_weight_{side}"]
        sizes = [dt_weight.shape[1], A.shape[1], A.shape[1]]
        dt_r, B, C = torch.split(inputs[f"projected_{side}"], sizes, dim=-1)
        y, results[f"state_{side}"] = selective_scan_reference(
            inputs[f"x_{side}"],
            F.linear(dt_r, dt_weight),
            A,
            B,
            C,
            inputs[f"D_{side}"],
            z=inputs.get("z"),
            dt_bias=inputs[f"dt_bias_{side}"],
            dt_softplus=True,
            initial_state=inputs.get(f"initial_state_{side}"),
            reverse=side == "b",
        )
        total = total + y
    assert isinstance(total, Tensor)
    return {"y": total * scale, **results}
