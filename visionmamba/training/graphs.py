"""Forward and backward of a model as CUDA graphs in training, so that launches cost nothing.

A step of Vim-Ti is some 900 launches; one by one they keep the host busy longer than the GPU. One
H200, through `fit`, 224 px, batch 128, bfloat16: Vim-Ti 23.4 instead of 47.3 ms a step, Vim-S 42.7
instead of 78.3; more in docs/training.md.
"""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_WARM_UP_RUNS = 2


def why_one_by_one(
    asked: bool | None,
    model: nn.Module,
    *,
    device: torch.device,
    num_processes: int = 1,
    is_sharded: bool = False,
    is_compiled: bool = False,
) -> str | None:
    """Return why training launches its kernels one by one; None: it replays CUDA graphs.

    Args:
        asked: whether graphs are wanted; None takes them where they are known to gain.
        model: the one that is trained.
        device: where.
        num_processes: processes that share a step.
        is_sharded: whether they share the weights, too.
        is_compiled: whether blocks go through torch.compile.
    """
    if asked is False:
        return "so it was asked"
    if device.type != "cuda":
        return f"the model is on the {device.type}"
    if is_sharded:
        return "the weights are divided among processes"
    if is_compiled:
        return "blocks go through torch.compile"
    obstacle = _obstacle(model, num_processes=num_processes)
    if obstacle is not None or asked:
        return obstacle
    return _doubt(num_processes=num_processes)


def launch_text(one_by_one: str | None) -> str:
    """Return in words what `why_one_by_one` decided."""
    if one_by_one is None:
        return "forward and backward are recorded and replayed as CUDA graphs"
    return f"kernels are launched one by one, not as CUDA graphs: {one_by_one}"


def graph_forward(
    model: nn.Module,
    *,
    copies_gradients: bool,
    on_failure: Callable[[str], None] | None = None,
) -> Callable[[], None]:
    """Replace the forward of a model on a GPU by replays, and return what undoes it.

    The first training call with gradients records forward and backward for its shape, dtype and
    autocast; calls that differ, in evaluation, without gradients, or before the backward of the
    call before run as without. Parameters must stay where they are; dropout follows the GPU's
    generator as ever. Where the model waits for the GPU or memory is short, all calls run as
    without, after one warning.

    Args:
        model: called with tensors that need no gradient, returns a tensor, or a tuple of tensors
            and None.
        copies_gradients: hand out copies of the gradients. Without, they lie where the next
            backward writes, which gradients that accumulate over several backwards cannot have.
        on_failure: called with the reason when recording fails.

    Returns:
        A function that gives the model its own forward back.
    """
    eager = model.forward
    recorded: list[_Recording] = []
    under_way: list[weakref.ref[_Turn]] = []

    def forward(*inputs: Any, **options: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return eager(*inputs, **options)
        if not recorded:
            reason = record(inputs, options)
            if reason is not None:
                give_up(reason)
                return eager(*inputs, **options)
        is_waiting = bool(under_way) and under_way[0]() is not None  # its activations are needed
        if options or is_waiting or recorded[0].key != _key(inputs):
            return eager(*inputs, **options)
        turn = _Turn()
        under_way[:] = [weakref.ref(turn)]
        outputs = _Replay.apply(recorded[0], turn, *inputs, *recorded[0].parameters)
        return recorded[0].arranged(outputs)

    def record(inputs: tuple[Any, ...], options: dict[str, Any]) -> str | None:
        try:
            if options:
                raise RuntimeError(f"its forward is given {', '.join(options)} by name")
            recording = _record(model, eager, inputs, copies_gradients=copies_gradients)
        except RuntimeError as error:  # let go of here, as it holds what did not fit into memory
            return (str(error) or type(error).__name__).splitlines()[0]
        recorded.append(recording)
        return None

    def give_up(reason: str) -> None:
        undo()
        torch.cuda.empty_cache()
        _restore_random_numbers(reason)
        warnings.warn(
            "training launches its kernels one by one, as the model cannot be recorded as a CUDA "
            f"graph: {reason}; cuda_graphs=False (--no-cuda-graphs) does not try",
            stacklevel=3,
        )
        if on_failure is not None:
            on_failure(reason)

    def undo() -> None:
        recorded.clear()
        vars(model).pop("forward", None)

    vars(model)["forward"] = forward
    return undo


def _obstacle(model: nn.Module, *, num_processes: int) -> str | None:
    """Return why replays would not do all that the model does.

    They would not repeat what the host decides anew at each call, nor wait for other processes.
    """
    for module in model.modules():
        if getattr(module, "has_varying_shapes", False):
            return f"shapes inside {type(module).__name__} differ from batch to batch"
        if getattr(module, "flips_at_random", False):
            return f"{type(module).__name__} flips sequences at random"
        if getattr(module, "activation_checkpointing", False) and _has_drop_path(module):
            return "activation checkpointing restores the random state of drop path"
        if isinstance(module, nn.SyncBatchNorm) or (
            num_processes > 1 and isinstance(module, _BatchNorm)  # becomes one
        ):
            return "batch norms wait for other processes"
    return None


def _has_drop_path(module: nn.Module) -> bool:
    return any(isinstance(one, DropPath) for one in module.modules())


def _doubt(*, num_processes: int) -> str | None:
    """Return why nobody should get graphs without asking: what has not been measured."""
    if torch.version.hip is not None:
        return "not measured on AMD GPUs; cuda_graphs=True (--cuda-graphs) tries"
    if num_processes > 1:
        return "not measured with several processes; cuda_graphs=True (--cuda-graphs) tries"
    return None


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


def _key(inputs: tuple[Any, ...]) -> tuple[object, ...]:
    """Return all that a recording holds for."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return (
        autocast,
        *(
            (one.shape, one.dtype, one.device, one.requires_grad)
            if isinstance(one, Tensor)
            else type(one)
            for one in inputs
        ),
    )


def _record(
    model: nn.Module,
    eager: Callable[..., Tensor | tuple[Tensor | None, ...]],
    inputs: tuple[Any, ...],
    *,
    copies_gradients: bool,
) -> _Recording:
    if not all(isinstance(one, Tensor) and not one.requires_grad for one in inputs):
        raise RuntimeError("its forward is given other things than tensors without gradients")
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
    random_state = torch.cuda.get_rng_state()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):  # kernels are compiled and workspaces made outside
                # the product's own kernel gives the backward's thread a context before cuBLAS asks
                outputs = tuple(one * 1 for one in _tensors(run()))
                differentiate(outputs, tuple(map(torch.zeros_like, outputs)))
                del outputs  # their graph would tie the gradients of the recording to this stream
    finally:
        torch.cuda.current_stream().wait_stream(stream)
        for one, value in zip(buffers, former, strict=True):
            one.copy_(value)  # batch norms have counted what nobody trains on
        torch.cuda.set_rng_state(random_state)  # and drop path has drawn for it
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


def _restore_random_numbers(reason: str) -> None:
    """Make the GPU's generator work again after a recording that broke off.

    torch 2.11 leaves it inside that recording, where it refuses; one that works takes it out.

    Raises:
        RuntimeError: it goes on refusing.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    try:
        torch.rand((), device="cuda")
    except RuntimeError:
        try:
            one = torch.ones((), device="cuda")
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                one.mul_(1)
            torch.rand((), device="cuda")
        except RuntimeError as error:
            raise RuntimeError(
                f"recording the model as a CUDA graph broke off ({reason}) and left the GPU "
                "without random numbers; start again with cuda_graphs=False (--no-cuda-graphs)"
            ) from error


def _tensors(output: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    parts = (output,) if isinstance(output, Tensor) else output
    if not isinstance(parts, tuple) or not all(isinstance(one, Tensor | None) for one in parts):
        raise RuntimeError(f"it returns a {type(output).__name__} that is no tuple of tensors")
    return tuple(one for one in parts if one is not None)


class _Turn:
    """Lives from a replayed forward until its backward, or until nobody can ask for that."""


class _Replay(torch.autograd.Function):
    """Both graphs as one differentiable step."""

    @staticmethod
    def forward(
        ctx: Any, recording: _Recording, turn: _Turn, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.recording = recording
        ctx.turn = turn
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
        ctx.turn = None
        gradients = recording.gradients
        if recording.copies_gradients:
            gradients = tuple(None if one is None else one.clone() for one in gradients)
        else:
            gradients = tuple(None if one is None else one.detach() for one in gradients)
        return (None, None, *(None for _ in recording.inputs), *gradients)
