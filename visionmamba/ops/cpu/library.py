"""The compiled kernels as functions on tensors: the structures shared with C++ and the calls.

Every function expects what the faces of the ops have checked: CPU tensors, activations of one dtype
out of float32, bfloat16 and float16, parameters and states float32.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from visionmamba.ops.kernel_cache import UnavailableError

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SMALL_PROBLEM = 1 << 15
_OUT_OF_MEMORY = 1

_Pair = tuple[Tensor, Tensor]
_OptionalPair = tuple[Tensor | None, Tensor | None]


class _View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
    )


class _ScanDirection(ctypes.Structure):
    _fields_ = (
        *((name, _View) for name in ("x", "dt", "dt_r", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_weight", "dt_bias")),
        *((name, ctypes.c_void_p) for name in ("initial_state", "last_state", "checkpoints")),
        ("rank", ctypes.c_int64),
        ("reverse", ctypes.c_int32),
        ("softplus", ctypes.c_int32),
        ("dx", _View),
        ("ddt", _View),
        *((name, ctypes.c_void_p) for name in ("dprojected", "dA", "dD", "ddt_weight")),
        *((name, ctypes.c_void_p) for name in ("ddt_bias", "dinitial_state", "dlast_state")),
    )


class _ScanProblem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "states")),
        *((name, ctypes.c_int32) for name in ("dtype", "num_directions", "num_threads")),
        ("scale", ctypes.c_float),
        *((name, _View) for name in ("y", "z", "dz")),
        ("directions", _ScanDirection * 2),
    )


class _ConvDirection(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("taps", ctypes.c_int64),
        ("reverse", ctypes.c_int32),
        ("y", _View),
        ("dweight", ctypes.c_void_p),
        ("dbias", ctypes.c_void_p),
    )


class _ConvProblem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels")),
        *((name, ctypes.c_int32) for name in ("dtype", "silu", "num_directions", "num_threads")),
        ("x", _View),
        ("dx", _View),
        ("directions", _ConvDirection * 2),
    )


class _NormProblem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "channels")),
        *((name, ctypes.c_int32) for name in ("x_dtype", "residual_dtype", "num_threads")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "normed", "total")),
        *((name, ctypes.c_void_p) for name in ("dvalues", "dweight")),
    )


class _Arguments:
    """Turns tensors into pointers and strides, and keeps them alive until the call is over."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []

    def pointer(self, tensor: Tensor | None) -> int | None:
        """Return the address of a tensor's elements in contiguous order, None for None or empty."""
        if tensor is None or tensor.numel() == 0:
            return None
        tensor = tensor.contiguous()
        self._alive.append(tensor)
        return tensor.data_ptr()

    def view(self, tensor: Tensor | None) -> _View:
        """Return a (B, L, channels) tensor as it lies; only strided channels are copied."""
        if tensor is None or tensor.numel() == 0:
            return _View()
        if tensor.stride(2) != 1 and tensor.shape[2] != 1:
            tensor = tensor.contiguous()
        self._alive.append(tensor)
        return _View(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class Kernels:
    """The functions of one compiled library."""

    def __init__(self, path: Path, checkpoint_length: int) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UnavailableError(f"the compiled kernels do not load: {error}") from error
        assert self._library.vim_checkpoint_length() == checkpoint_length
        self.vector_width: int = self._library.vim_vector_width()
        self._checkpoint_length = checkpoint_length

    def selective_scan(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        dt_softplus: bool,
        reverse: bool,
        save_states: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, the last state and the checkpoints of one scan."""
        arguments = _Arguments()
        y, last_state, checkpoints = self._outputs(x, A, save_states)
        problem = _scan_problem(arguments, x, A, y, z, 1, 1.0)
        problem.directions[0] = _ScanDirection(
            x=arguments.view(x),
            dt=arguments.view(dt),
            B=arguments.view(B),
            C=arguments.view(C),
            A=arguments.pointer(A),
            D=arguments.pointer(D),
            dt_bias=arguments.pointer(dt_bias),
            initial_state=arguments.pointer(initial_state),
            last_state=arguments.pointer(last_state),
            checkpoints=arguments.pointer(checkpoints),
            reverse=reverse,
            softplus=dt_softplus,
        )
        _run(self._library.vim_scan_forward, problem)
        return y, last_state, checkpoints

    def selective_scan_backward(
        self,
        dy: Tensor,
        dlast_state: Tensor | None,
        checkpoints: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        dt_softplus: bool,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of the nine tensors from x to initial_state, empty for None."""
        arguments = _Arguments()
        dx, ddt, dz = _empty(x), _empty(dt), _empty(z, x)
        dA, dD, ddt_bias = _empty(A), _empty(D, A), _empty(dt_bias, A)
        dinitial_state = _empty(initial_state, A)
        dprojected = A.new_empty(*x.shape[:2], 2 * A.shape[1])
        problem = _scan_problem(arguments, x, A, dy, z, 1, 1.0)
        problem.dz = arguments.view(dz)
        problem.directions[0] = _ScanDirection(
            x=arguments.view(x),
            dt=arguments.view(dt),
            B=arguments.view(B),
            C=arguments.view(C),
            A=arguments.pointer(A),
            D=arguments.pointer(D),
            dt_bias=arguments.pointer(dt_bias),
            checkpoints=arguments.pointer(checkpoints),
            reverse=reverse,
            softplus=dt_softplus,
            dx=arguments.view(dx),
            ddt=arguments.view(ddt),
            dprojected=arguments.pointer(dprojected),
            dA=arguments.pointer(dA),
            dD=arguments.pointer(dD),
            ddt_bias=arguments.pointer(ddt_bias),
            dinitial_state=arguments.pointer(dinitial_state),
            dlast_state=arguments.pointer(dlast_state),
        )
        _run(self._library.vim_scan_backward, problem)
        dB, dC = (half.to(B.dtype, copy=True) for half in dprojected.chunk(2, dim=-1))
        return dx, ddt, dA, dB.contiguous(), dC.contiguous(), dD, dz, ddt_bias, dinitial_state

    def bidirectional_scan(
        self,
        x: _Pair,
        projected: _Pair,
        dt_weight: _Pair,
        dt_bias: _Pair,
        A: _Pair,
        D: _Pair,
        z: Tensor | None,
        initial_state: _OptionalPair,
        scale: float,
        save_states: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return y, the two last states and the two sets of checkpoints."""
        arguments = _Arguments()
        y, last_f, kept_f = self._outputs(x[0], A[0], save_states)
        last_b, kept_b = torch.empty_like(last_f), torch.empty_like(kept_f)
        problem = _scan_problem(arguments, x[0], A[0], y, z, 2, scale)
        for i, last_state, kept in ((0, last_f, kept_f), (1, last_b, kept_b)):
            direction = _projected_direction(
                arguments, i, x, projected, dt_weight, dt_bias, A, D, kept
            )
            direction.initial_state = arguments.pointer(initial_state[i])
            direction.last_state = arguments.pointer(last_state)
            problem.directions[i] = direction
        _run(self._library.vim_scan_forward, problem)
        return y, last_f, last_b, kept_f, kept_b

    def bidirectional_scan_backward(
        self,
        dy: Tensor,
        dlast_state: _OptionalPair,
        checkpoints: _Pair,
        x: _Pair,
        projected: _Pair,
        dt_weight: _Pair,
        dt_bias: _Pair,
        A: _Pair,
        D: _Pair,
        z: Tensor | None,
        initial_state: _OptionalPair,
        scale: float,
    ) -> list[Tensor]:
        """Return the gradients of x to initial_state in the op's order, pairs unrolled."""
        arguments = _Arguments()
        problem = _scan_problem(arguments, x[0], A[0], dy, z, 2, scale)
        dz = _empty(z, dy)
        problem.dz = arguments.view(dz)
        rows = []
        for i in (0, 1):
            direction = _projected_direction(
                arguments, i, x, projected, dt_weight, dt_bias, A, D, checkpoints[i]
            )
            dx, dprojected = _empty(x[i]), A[i].new_empty(projected[i].shape)
            ddt_weight, ddt_bias = _empty(dt_weight[i]), _empty(dt_bias[i])
            dA, dD, dinitial_state = _empty(A[i]), _empty(D[i]), _empty(initial_state[i], A[i])
            direction.dx = arguments.view(dx)
            direction.dprojected = arguments.pointer(dprojected)
            direction.ddt_weight = arguments.pointer(ddt_weight)
            direction.ddt_bias = arguments.pointer(ddt_bias)
            direction.dA = arguments.pointer(dA)
            direction.dD = arguments.pointer(dD)
            direction.dinitial_state = arguments.pointer(dinitial_state)
            direction.dlast_state = arguments.pointer(dlast_state[i])
            problem.directions[i] = direction
            rows.append((dx, dprojected, ddt_weight, ddt_bias, dA, dD, dinitial_state))
        _run(self._library.vim_scan_backward, problem)
        columns = [gradient for pair in zip(*rows, strict=True) for gradient in pair]
        columns[2:4] = [gradient.to(projected[0].dtype) for gradient in columns[2:4]]
        return [*columns[:-2], dz, *columns[-2:]]

    def causal_conv1d(
        self,
        x: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        reverses: tuple[bool, ...],
        silu: bool,
    ) -> list[Tensor]:
        """Return the convolution of x with each of one or two sets of weights, reading x once."""
        arguments = _Arguments()
        problem = _conv_problem(arguments, x, weights, biases, reverses, silu)
        outputs = [_empty(x) for _ in weights]
        for direction, y in zip(problem.directions, outputs, strict=False):
            direction.y = arguments.view(y)
        _run(self._library.vim_causal_conv1d_forward, problem)
        return outputs

    def causal_conv1d_backward(
        self,
        dys: tuple[Tensor, ...],
        x: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        reverses: tuple[bool, ...],
        silu: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the gradient of x, of every weight and of every bias (empty for None)."""
        arguments = _Arguments()
        problem = _conv_problem(arguments, x, weights, biases, reverses, silu)
        dx = _empty(x)
        problem.dx = arguments.view(dx)
        dweights = [_empty(weight) for weight in weights]
        dbiases = [_empty(bias, x.new_empty(0, dtype=torch.float32)) for bias in biases]
        for i, dy in enumerate(dys):
            problem.directions[i].y = arguments.view(dy)
            problem.directions[i].dweight = arguments.pointer(dweights[i])
            problem.directions[i].dbias = arguments.pointer(dbiases[i])
        _run(self._library.vim_causal_conv1d_backward, problem)
        return dx, dweights, dbiases

    def rms_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return the normed rows and residual + x (empty without a residual)."""
        arguments = _Arguments()
        normed, total = _empty(x), _empty(residual, x)
        problem = _norm_problem(arguments, x, weight, eps)
        problem.x_dtype = _DTYPES[x.dtype]
        problem.residual_dtype = _DTYPES[total.dtype]
        problem.x = arguments.pointer(x)
        problem.residual = arguments.pointer(residual)
        problem.normed = arguments.pointer(normed)
        problem.total = arguments.pointer(total)
        _run(self._library.vim_rms_norm_forward, problem)
        return normed, total

    def rms_norm_backward(
        self,
        dnormed: Tensor | None,
        dtotal: Tensor | None,
        total: Tensor,
        weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of residual + x, in float32, and of the weight."""
        arguments = _Arguments()
        dvalues, dweight = weight.new_empty(total.shape), _empty(weight)
        problem = _norm_problem(arguments, total, weight, eps)
        problem.x_dtype = _DTYPES[total.dtype if dnormed is None else dnormed.dtype]
        problem.residual_dtype = _DTYPES[total.dtype]
        problem.residual = arguments.pointer(total)
        problem.normed = arguments.pointer(dnormed)
        problem.total = arguments.pointer(dtotal)
        problem.dvalues = arguments.pointer(dvalues)
        problem.dweight = arguments.pointer(dweight)
        _run(self._library.vim_rms_norm_backward, problem)
        return dvalues, dweight

    def _outputs(self, x: Tensor, A: Tensor, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        num_kept = -(-length // self._checkpoint_length) if save_states else 0
        return _empty(x), A.new_empty(batch, *A.shape), A.new_empty(batch, num_kept, *A.shape)


def _empty(like: Tensor | None, otherwise: Tensor | None = None) -> Tensor:
    """Return a contiguous tensor to be filled; one without elements when `like` is None."""
    if like is None:
        assert otherwise is not None
        return otherwise.new_empty(0)
    return like.new_empty(like.shape)


def _scan_problem(
    arguments: _Arguments,
    x: Tensor,
    A: Tensor,
    y: Tensor,
    z: Tensor | None,
    num_directions: int,
    scale: float,
) -> _ScanProblem:
    return _ScanProblem(
        batch=x.shape[0],
        length=x.shape[1],
        channels=x.shape[2],
        states=A.shape[1],
        dtype=_DTYPES[x.dtype],
        num_directions=num_directions,
        num_threads=_num_threads(x.numel() * A.shape[1]),
        scale=scale,
        y=arguments.view(y),
        z=arguments.view(z),
    )


def _projected_direction(
    arguments: _Arguments,
    i: int,
    x: _Pair,
    projected: _Pair,
    dt_weight: _Pair,
    dt_bias: _Pair,
    A: _Pair,
    D: _Pair,
    checkpoints: Tensor,
) -> _ScanDirection:
    rank, d_state = dt_weight[i].shape[1], A[i].shape[1]
    return _ScanDirection(
        x=arguments.view(x[i]),
        dt_r=arguments.view(projected[i][..., :rank]),
        B=arguments.view(projected[i][..., rank : rank + d_state]),
        C=arguments.view(projected[i][..., rank + d_state :]),
        A=arguments.pointer(A[i]),
        D=arguments.pointer(D[i]),
        dt_weight=arguments.pointer(dt_weight[i]),
        dt_bias=arguments.pointer(dt_bias[i]),
        checkpoints=arguments.pointer(checkpoints),
        rank=rank,
        reverse=i,
        softplus=1,
    )


def _conv_problem(
    arguments: _Arguments,
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    reverses: tuple[bool, ...],
    silu: bool,
) -> _ConvProblem:
    batch, length, channels = x.shape
    problem = _ConvProblem(
        batch=batch,
        length=length,
        channels=channels,
        dtype=_DTYPES[x.dtype],
        silu=silu,
        num_directions=len(weights),
        num_threads=_num_threads(8 * x.numel()),
        x=arguments.view(x),
    )
    for i, (weight, bias, reverse) in enumerate(zip(weights, biases, reverses, strict=True)):
        problem.directions[i] = _ConvDirection(
            weight=arguments.pointer(weight.t()),
            bias=arguments.pointer(bias),
            taps=weight.shape[1],
            reverse=reverse,
        )
    return problem


def _norm_problem(arguments: _Arguments, x: Tensor, weight: Tensor, eps: float) -> _NormProblem:
    return _NormProblem(
        rows=x.numel() // x.shape[-1],
        channels=x.shape[-1],
        num_threads=_num_threads(4 * x.numel()),
        eps=eps,
        weight=arguments.pointer(weight),
    )


def _num_threads(work: int) -> int:
    """Return torch's number of threads, or 1 for a problem too small to share."""
    return 1 if work < _SMALL_PROBLEM else torch.get_num_threads()


def _run(function: Callable[[object], int], problem: ctypes.Structure) -> None:
    if function(ctypes.byref(problem)) == _OUT_OF_MEMORY:
        raise MemoryError("the CPU kernel could not get its scratch memory; use a smaller batch")
