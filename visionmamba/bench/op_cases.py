"""The ops with inputs of Vim-Ti's sizes, ready to be timed forward and backward.

Activations are noise; step sizes, decay rates and taps are those of a mixer at initialisation, so
that skipping decays that have underflowed cannot flatter a kernel.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from visionmamba.models.mixer import BidirectionalMixer

Backend = Literal["cpp", "cuda", "triton", "torch", "reference"]
Pass = Literal["forward", "forward + backward"]
Dtype = Literal["float32", "bfloat16"]

_D_MODEL, _D_CONV = 192, 4


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One op with its inputs; all of them get gradients."""

    op: str
    """Name in visionmamba.ops, or of a step inside a fused one."""
    shape: str
    """What it runs on, for the table."""
    batch: int
    """Sequences."""
    length: int
    """Tokens of each."""
    inputs: "tuple[torch.Tensor, ...]"
    """Every tensor that the op takes."""
    call: "Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]"
    """The op on the inputs."""
    num_exponentials: int
    """Exponentials and other functions of the special unit that a forward cannot do without."""
    on_cpu: "Callable[..., torch.Tensor | tuple[torch.Tensor, ...]] | None" = None
    """The same in float32 on the CPU, where `call` cannot run there."""
    reference: "Callable[..., torch.Tensor] | None" = None
    """The same one token at a time, where there is such a form."""
    has_gradients: bool = True
    """Whether it is timed with its backward too."""

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

    def first_sample_on_cpu(self) -> "torch.Tensor":
        """Return the first output for the first sequence, computed in float32 on the CPU."""
        import torch

        inputs = [self.first_sample(tensor.detach()).float().cpu() for tensor in self.inputs]
        with torch.inference_mode():
            return _as_tuple((self.on_cpu or self.call)(*inputs))[0]

    def first_sample(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Return activations (B, L, ...) or (2, B, L, ...) of one sequence, parameters whole."""
        if tensor.shape[:2] == (self.batch, self.length):
            return tensor[:1]
        return tensor[:, :1] if tensor.shape[1:3] == (self.batch, self.length) else tensor

    def num_bytes(self, direction: Pass) -> int:
        """Bytes of inputs and outputs; the backward reads the inputs again and writes as much."""
        inputs = sum(tensor.numel() * tensor.element_size() for tensor in self.inputs)
        outputs = sum(t.numel() * t.element_size() for t in self.output_gradients)
        return inputs + outputs if direction == "forward" else 3 * inputs + 2 * outputs


def op_cases(
    *, batch: int, length: int, device: str, dtype: Dtype = "float32", seed: int = 0
) -> Iterator[OpCase]:
    """Yield every op with inputs on the device; parameters stay in float32.

    Args:
        batch: sequences.
        length: tokens of each.
        device: "cpu" or "cuda"; the steps of the fused mixer are there on "cuda" alone.
        dtype: of the activations.
        seed: of the noise.
    """
    import torch

    from visionmamba.models.mixer import BidirectionalMixer, DirectionalSSM
    from visionmamba.ops import (
        bidirectional_conv1d,
        bidirectional_scan,
        causal_conv1d,
        rms_norm,
        selective_scan,
    )
    from visionmamba.ops.cuda import cuda_backend
    from visionmamba.ops.selective_scan.reference import selective_scan_reference

    torch.manual_seed(seed)
    mixer = BidirectionalMixer(_D_MODEL).to(device)
    forward, backward = mixer.directions
    assert isinstance(forward, DirectionalSSM) and isinstance(backward, DirectionalSSM)
    directions = (forward, backward)
    d_inner, d_state, rank = forward.D.shape[0], forward.d_state, forward.dt_rank

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, length, *shape, device=device).to(getattr(torch, dtype))

    def leaves(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)

    x, z = noise(d_inner), noise(d_inner)
    with torch.no_grad():
        projected = [one.x_proj(x.float()).to(x.dtype) for one in directions]
        dt = [
            torch.nn.functional.softplus(values[..., :rank].float() @ one.dt_weight.T + one.dt_bias)
            for values, one in zip(projected, directions, strict=True)
        ]
    case = functools.partial(OpCase, batch=batch, length=length)
    elements = batch * length * d_inner
    prefix = f"({batch}, {length}, {d_inner}"
    yield case(
        op="selective_scan",
        shape=f"{prefix}, N {d_state})",
        inputs=leaves(
            x, dt[0].to(x.dtype), forward.A, *projected[0][..., rank:].chunk(2, -1), forward.D
        ),
        call=selective_scan,
        num_exponentials=elements * d_state,
        reference=lambda *inputs: selective_scan_reference(*inputs)[0],
    )
    yield case(
        op="bidirectional_scan",
        shape=f"{prefix}, N {d_state}) both directions, gated",
        inputs=leaves(
            *(x, noise(d_inner)),
            *projected,
            *(one.dt_weight for one in directions),
            *(one.dt_bias for one in directions),
            *(one.A for one in directions),
            *(one.D for one in directions),
            z,
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
        num_exponentials=elements * (2 * (d_state + 2) + 2),  # softplus and SiLU: 2 each
    )
    yield case(
        op="causal_conv1d",
        shape=f"{prefix}) {_D_CONV} taps, SiLU",
        inputs=leaves(x, forward.conv_weight, forward.conv_bias),
        call=lambda x, weight, bias: causal_conv1d(x, weight, bias, activation="silu"),
        num_exponentials=2 * elements,
    )
    yield case(
        op="bidirectional_conv1d",
        shape=f"{prefix}) {_D_CONV} taps, SiLU, both directions",
        inputs=leaves(
            x, *(one.conv_weight for one in directions), *(one.conv_bias for one in directions)
        ),
        call=lambda x, *weights: bidirectional_conv1d(
            x, weights[:2], weights[2:], activation="silu"
        ),
        num_exponentials=4 * elements,
    )
    yield case(
        op="rms_norm",
        shape=f"({batch}, {length}, {_D_MODEL}) with residual",
        inputs=leaves(
            noise(_D_MODEL), torch.ones(_D_MODEL, device=device), noise(_D_MODEL).float()
        ),
        call=lambda x, weight, residual: rms_norm(x, weight, residual=residual),
        num_exponentials=batch * length,
    )
    if device == "cuda" and dtype == "bfloat16" and cuda_backend(x.device).has_kernels:
        yield from _fused_cases(mixer, noise(_D_MODEL), x, projected, prefix)


def _fused_cases(
    mixer: "BidirectionalMixer",
    hidden: "torch.Tensor",
    x: "torch.Tensor",
    projected: "list[torch.Tensor]",
    prefix: str,
) -> Iterator[OpCase]:
    """Yield both scans with step sizes given and with step sizes made inside, and the mixer."""
    import torch
    from torch.nn import functional as F

    from visionmamba.ops.cuda.pack import pack_mixer

    parameters = mixer.parameters_to_fuse()
    assert parameters is not None
    packed = pack_mixer([one.detach() for one in parameters], dtype=torch.bfloat16)
    sizes = packed.sizes
    batch, length, _ = hidden.shape
    case = functools.partial(OpCase, batch=batch, length=length)
    elements, d_state, rank = x.numel(), sizes.d_state, sizes.dt_rank
    padding = sizes.projected_width - projected[0].shape[-1]
    padded = F.pad(torch.stack(projected), (0, padding))
    dt_r, B, C, _ = padded.tensor_split((rank, rank + d_state, rank + 2 * d_state), -1)
    yield case(
        op="both scans, step sizes given",
        shape=f"{prefix}, N {d_state}) both directions",
        inputs=(
            torch.stack((x, x)),
            torch.einsum("iblr,ier->ible", dt_r, packed.dt_weight[..., :rank]),
            *(B, C, packed.A, packed.D, packed.dt_bias),
        ),
        call=_given_scans,
        num_exponentials=elements * 2 * (d_state + 2),
        on_cpu=_given_scans_on_cpu,
        has_gradients=False,
    )
    yield case(
        op="both scans of the mixer",
        shape=f"{prefix}, N {d_state}) both directions",
        inputs=tuple(
            tensor.detach().clone().requires_grad_()
            for tensor in (
                torch.stack((x, x)),
                padded,
                packed.dt_weight,
                packed.dt_bias,
                packed.A,
                packed.D,
            )
        ),
        call=_mixer_scan(rank),
        num_exponentials=elements * 2 * (d_state + 2),
        on_cpu=functools.partial(_mixer_scan_on_cpu, rank, d_state),
    )
    half = mixer.to(torch.bfloat16)
    copies = tuple(half.parameters())
    yield case(
        op="fused_mixer",
        shape=f"{prefix}, D {_D_MODEL}, N {d_state})",
        inputs=(hidden.requires_grad_(), *copies),
        call=lambda hidden, *_: half(hidden),
        num_exponentials=elements * (2 * (d_state + 4) + 2),
        on_cpu=lambda hidden, *given: _mixer_on_cpu(half, hidden, given),
    )


def _given_scans(*both: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
    """Return y of both directions from one launch; every tensor holds both."""
    from visionmamba.ops.cuda.scan import Direction, scan_forward

    directions = [
        Direction(
            x=x,
            dt=dt,
            A=A,
            B=B,
            C=C,
            D=D,
            dt_bias=dt_bias,
            initial_state=None,
            reverse=i == 1,
        )
        for i, (x, dt, B, C, A, D, dt_bias) in enumerate(zip(*both, strict=True))
    ]
    return tuple(y for y, _ in scan_forward(directions, dt_softplus=True))


def _given_scans_on_cpu(*both: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
    from visionmamba.ops import selective_scan

    return tuple(
        selective_scan(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True, reverse=i == 1)
        for i, (x, dt, B, C, A, D, dt_bias) in enumerate(zip(*both, strict=True))
    )


def _mixer_scan(rank: int) -> "Callable[..., torch.Tensor]":
    """Return the scans of the fused mixer as a function with gradients."""
    import torch

    from visionmamba.ops.cuda.fused_scan import mixer_scan_backward, mixer_scan_forward
    from visionmamba.ops.cuda.mixer import num_kept_states

    class MixerScan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
            u = tensors[0]
            kept = num_kept_states(u[0], u.shape[3])
            ctx.states = u.new_empty(kept, dtype=torch.bfloat16) if kept else None
            ctx.save_for_backward(*tensors)
            return mixer_scan_forward(*tensors, rank=rank, states=ctx.states)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            tensors = ctx.saved_tensors
            du, dprojected, ddt_weight, *rest = mixer_scan_backward(
                dy[0].contiguous(), *tensors, rank=rank, states=ctx.states
            )
            padding = tensors[2].shape[2] - rank
            padded = torch.nn.functional.pad(ddt_weight, (0, padding))
            return du, dprojected.to(du.dtype), padded.to(du.dtype), *rest

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return mixer_scan_forward(*tensors, rank=rank)
        y: torch.Tensor = MixerScan.apply(*tensors)
        return y

    return call


def _mixer_scan_on_cpu(
    rank: int,
    d_state: int,
    u: "torch.Tensor",
    projected: "torch.Tensor",
    dt_weight: "torch.Tensor",
    dt_bias: "torch.Tensor",
    A: "torch.Tensor",
    D: "torch.Tensor",
) -> "torch.Tensor":
    import torch

    from visionmamba.ops import selective_scan

    both = []
    for i in (0, 1):
        dt_r, B, C, _ = projected[i].tensor_split((rank, rank + d_state, rank + 2 * d_state), -1)
        dt = dt_r @ dt_weight[i, :, :rank].T
        both.append(
            selective_scan(
                *(u[i], dt, A[i], B, C, D[i]), dt_bias=dt_bias[i], dt_softplus=True, reverse=i == 1
            )
        )
    return torch.stack(both)


def _mixer_on_cpu(
    mixer: "BidirectionalMixer", hidden: "torch.Tensor", parameters: "tuple[torch.Tensor, ...]"
) -> "torch.Tensor":
    import torch

    names = (name for name, _ in mixer.named_parameters())
    given = dict(zip(names, parameters, strict=True))
    output: torch.Tensor = torch.func.functional_call(mixer, given, (hidden,))
    return output


def _as_tuple(outputs: "torch.Tensor | tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor, ...]":
    return outputs if isinstance(outputs, tuple) else (outputs,)
