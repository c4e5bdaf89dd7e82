"""Random erasing (arXiv 1708.04896): a rectangle of noise, drawn as by timm's RandomErasing.

The rectangle is drawn with a picture's other changes, the noise made on the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visionmamba.data.photometric import uniform

TRIES = 10
AREAS, ASPECTS = (
    (0.02, 1 / 3),
    (0.3, 1 / 0.3),
)  # of a rectangle: share of the picture, height / width
NOTHING = (0, 0, 0, 0)

# of splitmix64, as signed numbers
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_MASK = 2**24 - 1  # as many bits as a float32 holds

Rectangle = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""


def draw_rectangle(size: tuple[int, int]) -> Rectangle:
    """Returns what is erased of a picture (height, width); `NOTHING` when ten tries do not fit."""
    height, width = size
    for _ in range(TRIES):
        area = height * width * uniform(*AREAS)
        aspect = math.exp(uniform(*map(math.log, ASPECTS)))
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if tall < height and wide < width:
            top = int(torch.randint(height - tall + 1, ()))
            return top, int(torch.randint(width - wide + 1, ())), tall, wide
    return NOTHING


def erase(images: Tensor, rectangles: Sequence[Rectangle], noise_seeds: Sequence[int]) -> Tensor:
    """Returns the pictures (B, C, H, W), changed in place: normal noise in a rectangle of each.

    The noise of a picture follows from its seed, in whatever batch and on whatever device.
    """
    rows = [row for row, rectangle in enumerate(rectangles) if rectangle[2] and rectangle[3]]
    if not rows:
        return images
    chosen, seeds, places = (
        torch.tensor(values).to(images.device, non_blocking=True)
        for values in (rows, [noise_seeds[i] for i in rows], [rectangles[i] for i in rows])
    )
    noise = _noise(seeds, images.shape[1:])
    down = _is_inside(places[:, 0], places[:, 2], images.shape[2])
    right = _is_inside(places[:, 1], places[:, 3], images.shape[3])
    inside = (down[:, :, None] & right[:, None, :]).unsqueeze(1)
    return images.index_copy_(0, chosen, torch.where(inside, noise, images[chosen]))


def _noise(seeds: Tensor, shape: torch.Size) -> Tensor:
    """Returns (B, *shape) normal numbers for (B,) int64 seeds, by counting (splitmix64)."""
    counts = torch.arange(1, shape.numel() + 1, device=seeds.device)
    states = seeds[:, None] + counts * _STEP
    for bits, factor in _MIXING:
        states = (states ^ ((states >> bits) & ((1 << (64 - bits)) - 1))) * factor
    radii = ((states >> 40) & _MASK).add(1).float() / (_MASK + 1)
    angles = ((states >> 16) & _MASK).float() / (_MASK + 1)
    normal = (-2 * radii.log()).sqrt_() * (2 * math.pi * angles).cos_()
    return normal.view(len(seeds), *shape)


def _is_inside(starts: Tensor, lengths: Tensor, count: int) -> Tensor:
    places = torch.arange(count, device=starts.device)
    return (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
