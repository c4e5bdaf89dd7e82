"""Pictures cut into rows of patches, ready for a matrix product: the op."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cut_patches(
    images: Tensor, patch_size: int, stride: int, grid: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return patches (B, h * w, C * p * p) in row-major order, converted to dtype.

    Args:
        images: (B, C, H, W).
        patch_size: side p of a patch.
        stride: distance of neighbouring patches.
        grid: rows h and columns w of patches; where they reach beyond the picture they hold zeros.
        dtype: of the result.
    """
    patches: Tensor = _cut_patches(images, patch_size, stride, *grid, dtype)
    return patches


def cut_patches_torch(
    images: Tensor, patch_size: int, stride: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the op's result by plain PyTorch operations."""
    height, width = _covered(patch_size, stride, rows, columns)
    missing = width - images.shape[3], height - images.shape[2]
    if any(missing):
        images = F.pad(images, (0, missing[0], 0, missing[1]))
    patches = images.unfold(2, patch_size, stride).unfold(3, patch_size, stride)
    patches = patches.permute(0, 2, 3, 1, 4, 5)  # (B, h, w, C, p, p)
    patches = patches.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return patches.flatten(3).flatten(1, 2)


def _covered(patch_size: int, stride: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the height and width in pixels that the patches cover."""
    return (rows - 1) * stride + patch_size, (columns - 1) * stride + patch_size


@torch.library.custom_op("visionmamba::cut_patches", mutates_args=())
def _cut_patches(
    images: Tensor, patch_size: int, stride: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return cut_patches_torch(images, patch_size, stride, rows, columns, dtype)


@_cut_patches.register_fake
def _(
    images: Tensor, patch_size: int, stride: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    batch, channels = images.shape[:2]
    return images.new_empty(batch, rows * columns, channels * patch_size**2, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, *ctx.sizes, _ = inputs
    ctx.shape, ctx.dtype = images.shape, images.dtype


def _backward(ctx: Any, dpatches: Tensor) -> tuple[Tensor | None, ...]:
    patch_size, stride, rows, columns = ctx.sizes
    height, width = ctx.shape[2:]
    covered = _covered(patch_size, stride, rows, columns)
    wide = torch.promote_types(dpatches.dtype, torch.float32)
    dimages = F.fold(dpatches.transpose(1, 2).to(wide), covered, patch_size, stride=stride)
    return dimages[..., :height, :width].to(ctx.dtype), None, None, None, None, None


_cut_patches.register_autograd(_backward, setup_context=_setup_context)
