"""A mixer's parameters as the GPU's kernels read them: order, padding, dtypes, one launch."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visionmamba.ops.cuda.driver import kernels

PARAMETERS = (
    "in_weight",
    *(
        f"{name}_{direction}"
        for name in ("conv_weight", "conv_bias", "x_weight", "dt_weight", "dt_bias", "A_log", "D")
        for direction in ("f", "b")
    ),
    "out_weight",
)
"""A mixer's parameters in the order in which they are passed, forward before backward."""


@dataclass(frozen=True, kw_only=True)
class MixerSizes:
    """Sizes of a mixer as its kernels see them."""

    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int

    @property
    def padded_rank(self) -> int:
        """Columns of the step-size weights in memory: whole steps of a tensor-core product."""
        return -(-self.dt_rank // 16) * 16

    @property
    def projected_width(self) -> int:
        """Columns [dt_r | B | C | padding] of the projection of x, in whole 16 bytes."""
        return -(-(self.dt_rank + 2 * self.d_state) // 8) * 8

    @property
    def packed_sizes(self) -> tuple[int, int]:
        """Numbers in the packed parameters of the activations' dtype and of float32."""
        half = 3 * self.d_model + 2 * (self.projected_width + self.padded_rank)
        return self.d_inner * half, 2 * self.d_inner * (self.d_state + self.d_conv + 3)


def sizes_of_mixer(parameters: Sequence[Tensor]) -> MixerSizes:
    """Return the sizes of a mixer with these parameters, in the order of PARAMETERS."""
    in_weight, conv_weight, *_ = parameters
    dt_weight, A_log = parameters[7], parameters[11]
    return MixerSizes(
        d_model=in_weight.shape[1],
        d_inner=in_weight.shape[0] // 2,
        d_state=A_log.shape[1],
        d_conv=conv_weight.shape[1],
        dt_rank=dt_weight.shape[1],
    )


class PackedMixer:
    """A mixer's parameters as the kernels read them, views of one tensor for each dtype.

    half: weights of matrix products in the activations' dtype: in_weight (2E, D), out_weight
    (D, E), x_weight (2, P, E) and dt_weight (2, E, Rp), padded with zeros. single, float32: A
    (2, E, N), conv_weight (2, E, K), conv_bias, dt_bias and D (2, E).
    """

    def __init__(self, sizes: MixerSizes, half: Tensor, single: Tensor) -> None:
        self.sizes = sizes
        self.half, self.single = half, single
        d_model, d_inner = sizes.d_model, sizes.d_inner
        width, rank = sizes.projected_width, sizes.padded_rank
        self.in_weight, self.out_weight, self.x_weight, self.dt_weight = _views(
            half,
            ((2 * d_inner, d_model), (d_model, d_inner), (2, width, d_inner), (2, d_inner, rank)),
        )
        self.A, self.conv_weight, self.conv_bias, self.dt_bias, self.D = _views(
            single,
            (
                (2, d_inner, sizes.d_state),
                (2, d_inner, sizes.d_conv),
                (2, d_inner),
                (2, d_inner),
                (2, d_inner),
            ),
        )


def _views(flat: Tensor, shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_PIECES, _PACK_THREADS = 16, 256


class _Piece(ctypes.Structure):
    _fields_ = (
        ("from_", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("rows", "columns", "all_rows", "all_columns")),
        *((name, ctypes.c_int32) for name in ("first_block", "is_log_rate")),
    )


class _Pieces(ctypes.Structure):
    _fields_ = (
        ("piece", _Piece * _MAX_PIECES),
        ("count", ctypes.c_int32),
        ("from_kind", ctypes.c_int32),
        ("to_kind", ctypes.c_int32 * _MAX_PIECES),
    )


def pack_mixer(parameters: Sequence[Tensor], *, dtype: torch.dtype) -> PackedMixer:
    """Return a mixer's parameters as the kernels read them; one launch.

    Args:
        parameters: in the order of PARAMETERS, contiguous, of one dtype and on one GPU.
        dtype: of the activations, bfloat16 or float16.
    """
    in_weight, *pairs, out_weight = parameters
    sizes = sizes_of_mixer(parameters)
    conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D = (
        pairs[i : i + 2] for i in range(0, len(pairs), 2)
    )
    width, rank = sizes.projected_width, sizes.padded_rank
    half_size, single_size = sizes.packed_sizes
    device = in_weight.device
    half = torch.empty(half_size, dtype=dtype, device=device)
    single = torch.empty(single_size, dtype=torch.float32, device=device)
    pieces = _Pieces(from_kind=_KINDS[in_weight.dtype])
    blocks = 0
    halves = [(in_weight, *in_weight.shape), (out_weight, *out_weight.shape)]
    halves += [(weight, width, sizes.d_inner) for weight in x_weight]
    halves += [(weight, sizes.d_inner, rank) for weight in dt_weight]
    singles = [
        (tensor, sizes.d_inner, tensor.numel() // sizes.d_inner)
        for tensor in (*A_log, *conv_weight, *conv_bias, *dt_bias, *D)
    ]
    for flat, given in ((half, halves), (single, singles)):
        place = flat.data_ptr()
        for tensor, all_rows, all_columns in given:
            piece = pieces.piece[pieces.count]
            piece.from_, piece.to = tensor.data_ptr(), place
            piece.rows, piece.columns = tensor.shape[0], tensor.numel() // tensor.shape[0]
            piece.all_rows, piece.all_columns = all_rows, all_columns
            piece.first_block = blocks
            piece.is_log_rate = tensor is A_log[0] or tensor is A_log[1]
            pieces.to_kind[pieces.count] = _KINDS[flat.dtype]
            pieces.count += 1
            place += all_rows * all_columns * flat.element_size()
            blocks += -(-all_rows * all_columns // _PACK_THREADS)
    kernels("pack", device).launch("pack_kernel_all", pieces, blocks, _PACK_THREADS)
    return PackedMixer(sizes, half, single)
