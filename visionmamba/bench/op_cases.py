"""The ops with inputs of Vim-Ti's sizes, ready to be timed forward and backward."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Backend = Literal["cpp", "cuda", "torch", "reference"]
Pass = Literal["forward", "forward + backward"]

_D_MODEL, _D_INNER, _D_STATE, _DT_RANK, _D_CONV = 192, 384, 16, 12, 4


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One op with its inputs; all of them get gradients."""

    op: str
    """Name in visionmamba.ops."""
    shape: str
    """What it runs on, for the table."""
    inputs: "tuple[torch.Tensor, ...]"
    """Every tensor that the op takes."""
    call: "Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]"
    """The op on the inputs."""
    reference: "Callable[..., torch.Tensor] | None" = None
    """The same one token at a time, where there is such a form."""

    @functools.cached_property
    def output_gradients(self) -> "tuple[torch.Tensor, ...]":
        """Ones for every output."""
        import torch

        return tuple(map(torch.ones_like, self.forward("torch")))

    def forward(self, backend: Backend) -> "tuple[torch.Tensor, ...]":
        """Return the outputs, without gradients."""
        import torch

        call = self.reference if backend == "reference" and self.reference else self.call
        with torch.inference_mode():
            return _as_tuple(call(*self.inputs))

    def train(self) -> None:
        """Run forward and backward."""
        import torch

        torch.autograd.grad(_as_tuple(self.call(*self.inputs)), self.inputs, self.output_gradients)

    def num_bytes(self, direction: Pass) -> int:
        """Bytes of inputs and outputs; the backward reads the inputs again and writes as much."""
        inputs = sum(tensor.numel() * tensor.element_size() for tensor in self.inputs)
        outputs = sum(t.numel() * t.element_size() for t in self.output_gradients)
        return inputs + outputs if direction == "forward" else 3 * inputs + 2 * outputs


def op_cases(length: int, device: str) -> Iterator[OpCase]:
    """Yield every op with random inputs: batch 1, `length` tokens, float32, on the device."""
    import torch

    from visionmamba.ops import (
        bidirectional_conv1d,
        bidirectional_scan,
        causal_conv1d,
        rms_norm,
        selective_scan,
    )
    from visionmamba.ops.selective_scan.reference import selective_scan_reference

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    def decay_rates() -> torch.Tensor:
        rates = -torch.arange(1.0, _D_STATE + 1, device=device).repeat(_D_INNER, 1)
        return rates.requires_grad_()

    def step_sizes() -> torch.Tensor:
        return (random(1, length, _D_INNER).detach().abs() * 0.1).requires_grad_()

    tokens = (1, length, _D_INNER)
    yield OpCase(
        op="selective_scan",
        shape=f"(1, {length}, {_D_INNER}, N {_D_STATE})",
        inputs=(
            random(*tokens),
            step_sizes(),
            decay_rates(),
            random(1, length, _D_STATE),
            random(1, length, _D_STATE),
            random(_D_INNER),
        ),
        call=selective_scan,
        reference=lambda *inputs: selective_scan_reference(*inputs)[0],
    )
    projected = _DT_RANK + 2 * _D_STATE
    yield OpCase(
        op="bidirectional_scan",
        shape=f"(1, {length}, {_D_INNER}, N {_D_STATE}) both directions, gated",
        inputs=(
            *(random(*tokens) for _ in range(2)),
            *(random(1, length, projected) for _ in range(2)),
            *(random(_D_INNER, _DT_RANK) for _ in range(2)),
            *(random(_D_INNER) for _ in range(2)),
            *(decay_rates() for _ in range(2)),
            *(random(_D_INNER) for _ in range(2)),
            random(*tokens),
        ),
        call=lambda *inputs: bidirectional_scan(
            inputs[0:2],
            inputs[2:4],
            inputs[4:6],
            inputs[6:8],
            inputs[8:10],
            inputs[10:12],
            z=inputs[12],
            scale=0.5,
        ),
    )
    yield OpCase(
        op="causal_conv1d",
        shape=f"(1, {length}, {_D_INNER}) {_D_CONV} taps, SiLU",
        inputs=(random(*tokens), random(_D_INNER, _D_CONV), random(_D_INNER)),
        call=lambda x, weight, bias: causal_conv1d(x, weight, bias, activation="silu"),
    )
    yield OpCase(
        op="bidirectional_conv1d",
        shape=f"(1, {length}, {_D_INNER}) {_D_CONV} taps, SiLU, both directions",
        inputs=(
            random(*tokens),
            *(random(_D_INNER, _D_CONV) for _ in range(2)),
            *(random(_D_INNER) for _ in range(2)),
        ),
        call=lambda x, *weights: bidirectional_conv1d(
            x, weights[:2], weights[2:], activation="silu"
        ),
    )
    yield OpCase(
        op="rms_norm",
        shape=f"(1, {length}, {_D_MODEL}) with residual",
        inputs=(random(1, length, _D_MODEL), random(_D_MODEL), random(1, length, _D_MODEL)),
        call=lambda x, weight, residual: rms_norm(x, weight, residual=residual),
    )


def _as_tuple(outputs: "torch.Tensor | tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor, ...]":
    return outputs if isinstance(outputs, tuple) else (outputs,)
