"""Forward and backward of a model as CUDA graphs in training, so that launches cost nothing.

A step of Vim-Ti is some 900 launches; one by one they keep the host busy longer than the GPU.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_WARM_UP_RUNS = 2


def graph_forward(model: nn.Module, *, copies_gradients: bool) -> Callable[[], None]:
    """Replace the forward of a model on a GPU by replays, and return what undoes it.

    The first training call with gradients records forward and backward for its shape, dtype and
    autocast; calls that differ, in evaluation or without gradients run as before. Parameters must
    stay where they are; dropout follows the GPU's generator as ever.

    Args:
        model: called with tensors that need no gradient, returns a tensor, or a tuple of tensors
            and None.
        copies_gradients: hand out copies of the gradients. Without, they lie where the next
            backward writes, which gradients that accumulate over several backwards cannot have.

    Returns:
        A function that gives the model its own forward back.
    """
    eager = model.forward
    recorded: list[_Recording] = []

    def forward(*inputs: Tensor) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return eager(*inputs)
        if not recorded:
            try:
                recorded.append(_record(model, eager, inputs, copies_gradients=copies_gradients))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                undo()
                warnings.warn(
                    "training launches its kernels one by one, as the model cannot be recorded as "
                    f"a CUDA graph: {str(error).splitlines()[0]}",
                    stacklevel=2,
                )
                return eager(*inputs)
        if recorded[0].key != _key(inputs):
            return eager(*inputs)
        outputs = _Replay.apply(recorded[0], *inputs, *recorded[0].parameters)
        return recorded[0].arranged(outputs)

    def undo() -> None:
        recorded.clear()
        vars(model).pop("forward", None)

    vars(model)["forward"] = forward
    return undo


def can_be_recorded(model: nn.Module) -> bool:
    """Return whether replays would do all that the model does.

    They would not repeat what the host decides anew at each call (a sequence flipped at random, or
    which boxes of a picture are looked at), nor wait for other processes' batch norms.
    """
    return not any(
        isinstance(module, nn.SyncBatchNorm)
        or getattr(module, "flips_at_random", False)
        or getattr(module, "has_varying_shapes", False)
        for module in model.modules()
    )


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """Both graphs and the tensors that they read and write."""

    key: tuple[object, ...]
    parameters: list[nn.Parameter]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    places: tuple[bool, ...] | None  # which parts of a tuple are tensors; None for a tensor alone
    doutputs: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    copies_gradients: bool

    def arranged(self, outputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor | None, ...]:
        """Return tensors as the model itself would."""
        if self.places is None:
            return outputs[0]
        rest = iter(outputs)
        return tuple(next(rest) if is_tensor else None for is_tensor in self.places)


def _key(inputs: tuple[Tensor, ...]) -> tuple[object, ...]:
    """Return all that a recording holds for."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return (autocast, *((one.shape, one.dtype, one.device) for one in inputs))


def _record(
    model: nn.Module,
    eager: Callable[..., Tensor | tuple[Tensor | None, ...]],
    inputs: tuple[Tensor, ...],
    *,
    copies_gradients: bool,
) -> _Recording:
    parameters = [one for one in model.parameters() if one.requires_grad]
    statics = tuple(one.clone() for one in inputs)

    def run() -> Tensor | tuple[Tensor | None, ...]:
        # weights that autocast has cast outside a graph would be read after they have changed
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            return eager(*statics)

    def differentiate(
        outputs: tuple[Tensor, ...], doutputs: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(outputs, parameters, doutputs, allow_unused=True)

    buffers = list(model.buffers())
    former = [one.clone() for one in buffers]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_RUNS):  # kernels are compiled and workspaces made outside
            outputs = _tensors(run())
            differentiate(outputs, tuple(map(torch.zeros_like, outputs)))
            del outputs  # their graph would tie the gradients of the recording to this stream
    torch.cuda.current_stream().wait_stream(stream)
    for one, value in zip(buffers, former, strict=True):
        one.copy_(value)  # batch norms have counted what nobody trains on
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a recording takes its memory anew
    pool = torch.cuda.graph_pool_handle()
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward, pool=pool, capture_error_mode="thread_local"):
        output = run()
    outputs = _tensors(output)
    doutputs = tuple(map(torch.zeros_like, outputs))
    with torch.cuda.graph(backward, pool=pool, capture_error_mode="thread_local"):
        gradients = differentiate(outputs, doutputs)
    return _Recording(
        key=_key(inputs),
        parameters=parameters,
        forward=forward,
        backward=backward,
        inputs=statics,
        outputs=tuple(one.detach() for one in outputs),
        places=None if isinstance(output, Tensor) else tuple(one is not None for one in output),
        doutputs=doutputs,
        gradients=gradients,
        copies_gradients=copies_gradients,
    )


def _tensors(output: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    parts = (output,) if isinstance(output, Tensor) else output
    return tuple(one for one in parts if one is not None)


class _Replay(torch.autograd.Function):
    """Both graphs as one differentiable step."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        for static, given in zip(recording.inputs, tensors, strict=False):
            static.copy_(given)
        recording.forward.replay()
        return tuple(one.clone() for one in recording.outputs)

    @staticmethod
    def backward(ctx: Any, *doutputs: Tensor) -> tuple[Tensor | None, ...]:
        recording: _Recording = ctx.recording
        for static, given in zip(recording.doutputs, doutputs, strict=True):
            static.copy_(given)
        recording.backward.replay()
        gradients = recording.gradients
        if recording.copies_gradients:
            gradients = tuple(None if one is None else one.clone() for one in gradients)
        else:
            gradients = tuple(None if one is None else one.detach() for one in gradients)
        return (None, *(None for _ in recording.inputs), *gradients)
