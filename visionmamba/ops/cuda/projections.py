"""The projections of a mixer at inference with the pointwise work before them, one launch each.

Structures shared with projections.cu, and the choice between its two kinds of kernels: blocks that
keep their weights in shared memory where tokens are many, many small blocks where they are few.
"""

import ctypes

import torch
from torch import Tensor

from visionmamba.ops.cuda.driver import DTYPE_NAMES, Kernels, kernels

_DTYPES = (torch.bfloat16, torch.float16)
_D_MODEL, _D_INNER = 192, 384
"""Widths that the kernels are made for: those of Vim-Ti."""
_TILE, _FEW_TILE = 64, 16
"""Tokens of a tile."""
_BLOCK_COLUMNS, _FEW_COLUMNS = 384, 64
_MANY_THREADS, _FEW_THREADS = 512, 128
_MANY_SHARED = _BLOCK_COLUMNS * _D_MODEL * 2 + 3 * _TILE * _D_MODEL * 2 + 64
_FEW_STAGES = 6 * _FEW_COLUMNS * 128
_FEW_MOST_ROWS = 1024
"""Most tokens for which small blocks are quicker."""
_NORM_MOST_ROWS = 16384
"""Most tokens for which the norm and its product are quicker as one kernel than as two."""


class _NormProject(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("branch", "weight", "residual", "norm_weight")),
        *((name, ctypes.c_void_p) for name in ("out", "total")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("columns", "parts")),
        ("eps", ctypes.c_float),
    )


class _GateProject(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "z", "weight", "layer_scale", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "z_row")),
        *((name, ctypes.c_int32) for name in ("columns", "parts", "d_inner")),
        ("scale", ctypes.c_float),
    )


def supports_norm_project(branch: Tensor, weight: Tensor) -> bool:
    """Return whether norm_project takes branch (B, L, D) and weight (2E, D), and is quicker."""
    columns, d_model = weight.shape
    if branch.dtype not in _DTYPES or d_model != _D_MODEL or columns % _BLOCK_COLUMNS:
        return False
    rows = branch.numel() // d_model
    return rows <= _NORM_MOST_ROWS and _is_quick(branch.device, rows)


def norm_project(
    branch: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, normalise and project.

    total = residual + branch and xz = (total / rms(total) * norm_weight) @ weight.T; what is
    multiplied is rounded to the branch's dtype, the sums are float32.

    Args:
        branch: (B, L, D) bfloat16 or float16, contiguous.
        residual: (B, L, D) float32, contiguous; None: total is the branch.
        norm_weight: (D,) float32.
        eps: added to the mean square.
        weight: (2E, D) in branch's dtype, contiguous. It is read before the kernel launched last
            has ended, so it must come from an earlier one.

    Returns:
        xz (B, L, 2E) in branch's dtype, and total (B, L, D) float32.
    """
    batch, length, _ = branch.shape
    columns, rows = weight.shape[0], batch * length
    out = branch.new_empty((batch, length, columns))
    total = torch.empty_like(branch, dtype=torch.float32)
    problem = _NormProject(
        branch=branch.data_ptr(),
        weight=weight.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        norm_weight=norm_weight.data_ptr(),
        out=out.data_ptr(),
        total=total.data_ptr(),
        rows=rows,
        columns=columns,
        eps=eps,
    )
    found = kernels("projections", branch.device)
    if _are_many(found, rows):
        problem.parts = columns // _BLOCK_COLUMNS
        groups = min(found.num_multiprocessors // problem.parts, -(-rows // _TILE))
        name, blocks = f"norm_project_kernel_{DTYPE_NAMES[branch.dtype]}", groups * problem.parts
        found.launch(
            name, problem, blocks, _MANY_THREADS, shared_bytes=_MANY_SHARED, starts_early=True
        )
    else:
        tiles = -(-rows // _FEW_TILE)
        problem.parts = _parts(found, tiles, columns)
        name = f"norm_project_few_kernel_{DTYPE_NAMES[branch.dtype]}"
        shared = _FEW_STAGES + 2 * _FEW_TILE * _D_MODEL
        blocks = tiles * problem.parts
        found.launch(name, problem, blocks, _FEW_THREADS, shared_bytes=shared, starts_early=True)
    return out, total


def supports_gate_project(y: Tensor, z: Tensor, weight: Tensor) -> bool:
    """Return whether gate_project takes these tensors, shaped as there, and is quicker."""
    if y.dtype not in _DTYPES or weight.shape != (_D_MODEL, _D_INNER):
        return False
    rows_are_even = z.shape[0] == 1 or z.stride(0) == z.shape[1] * z.stride(1)
    rows_are_wide = z.stride(2) == 1 and z.stride(1) % 8 == 0 and z.data_ptr() % 16 == 0
    return rows_are_even and rows_are_wide and _is_quick(y.device, z.shape[0] * z.shape[1])


def gate_project(
    y: Tensor,
    z: Tensor,
    scale: float,
    weight: Tensor,
    layer_scale: Tensor | None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Add both directions, gate and project.

    branch = (scale * (y[0] + y[1]) * silu(z)) @ weight.T * layer_scale; what is multiplied is
    rounded to y's dtype, the sums are float32.

    Args:
        y: (2, B, L, E) bfloat16 or float16, contiguous.
        z: (B, L, E) in y's dtype, rows of contiguous numbers at one distance from each other.
        scale: factor of the sum of both directions.
        weight: (D, E) in y's dtype, contiguous; as in norm_project, no result of the last kernel.
        layer_scale: (D,) float32, or None for ones.
        out: (B, L, D) in y's dtype, contiguous: receives the branch.

    Returns:
        branch (B, L, D) in y's dtype; float16 saturates.
    """
    _, batch, length, _ = y.shape
    columns, rows = weight.shape[0], batch * length
    out = y.new_empty((batch, length, columns)) if out is None else out
    problem = _GateProject(
        y=y.data_ptr(),
        z=z.data_ptr(),
        weight=weight.data_ptr(),
        layer_scale=None if layer_scale is None else layer_scale.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        z_row=2 * z.stride(1),
        columns=columns,
        d_inner=_D_INNER,
        scale=scale,
    )
    found = kernels("projections", y.device)
    if _are_many(found, rows):
        blocks = min(found.num_multiprocessors, -(-rows // _TILE))
        name = f"gate_project_kernel_{DTYPE_NAMES[y.dtype]}"
        found.launch(
            name, problem, blocks, _MANY_THREADS, shared_bytes=_MANY_SHARED, starts_early=True
        )
    else:
        tiles = -(-rows // _FEW_TILE)
        problem.parts = _parts(found, tiles, columns)
        name = f"gate_project_few_kernel_{DTYPE_NAMES[y.dtype]}"
        shared = _FEW_STAGES + 2 * _FEW_TILE * _D_INNER
        blocks = tiles * problem.parts
        found.launch(name, problem, blocks, _FEW_THREADS, shared_bytes=shared, starts_early=True)
    return out


def _is_quick(device: torch.device, rows: int) -> bool:
    return 0 < rows <= _FEW_MOST_ROWS or kernels("projections", device).capability == (9, 0)


def _are_many(found: Kernels, rows: int) -> bool:
    return rows > _FEW_MOST_ROWS and found.capability == (9, 0)


def _parts(found: Kernels, tiles: int, columns: int) -> int:
    """Return in how many parts the columns are cut so that every multiprocessor has two blocks."""
    steps = columns // _FEW_COLUMNS
    for parts in range(1, steps):
        if steps % parts == 0 and parts * tiles >= 2 * found.num_multiprocessors:
            return parts
    return steps
