"""Bilinear upsampling as two matrix products, for training segmenters on a GPU.

PyTorch's kernel adds the gradients of all pixels of a cell up one by one, a hundred times slower at
16 pixels a cell (docs/log.md, "Segmentation").
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# of the map that comes in: the work of the products grows with it, 27 against 19 ms at 384
_MAX_SIDE = 192


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (B, C, h, w) at another size (B, C, H, W), in the same dtype.

    Bilinear, edges of pixels aligned, as `F.interpolate(mode="bilinear", align_corners=False)`;
    sums are float32, also under autocast.
    """
    is_trained = torch.is_grad_enabled() and x.requires_grad
    if x.is_cuda and is_trained and max(x.shape[-2:]) <= _MAX_SIDE:
        return upsample_by_products(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False).to(x.dtype)


def upsample_by_products(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return what `upsample` does, by matrix products on any device."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (
            _weights(new, old, exact) for new, old in zip(size, x.shape[-2:], strict=True)
        )
        return (rows @ (exact @ columns.mT)).to(x.dtype)


def _weights(new: int, old: int, like: Tensor) -> Tensor:
    """Return (new, old): the share of each old cell in each new one, two of them not 0."""
    cells = torch.arange(max(new, old), dtype=like.dtype, device=like.device)
    places = ((cells[:new] + 0.5) * (old / new) - 0.5).clamp(0, old - 1)
    return (1 - (places[:, None] - cells[:old]).abs()).clamp(min=0)
