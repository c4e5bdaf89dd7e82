"""Random erasing (arXiv 1708.04896): a rectangle of noise, drawn as by timm's RandomErasing.

The rectangle is drawn with a picture's other changes, the noise made in batches on their device.
"""

import math

import torch
from torch import Tensor

from visionmamba.data.photometric import uniform

TRIES = 10
AREAS, ASPECTS = (
    (0.02, 1 / 3),
    (0.3, 1 / 0.3),
)  # of a rectangle: share of the picture, height / width
NOTHING = (0, 0, 0, 0)

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


def erase(images: Tensor, rectangles: Tensor, *, noise_seed: int) -> Tensor:
    """Returns pictures (B, C, H, W) with normal noise in rectangles (B, 4), which are on the CPU.

    The noise follows from its seed, on every kind of device another.
    """
    if not rectangles[:, 2:].any():
        return images
    rectangles = rectangles.to(images.device)
    generator = torch.Generator(images.device).manual_seed(noise_seed % 2**63)
    noise = torch.empty_like(images).normal_(generator=generator)
    down = _is_inside(rectangles[:, 0], rectangles[:, 2], images.shape[2])
    right = _is_inside(rectangles[:, 1], rectangles[:, 3], images.shape[3])
    inside = (down[:, :, None] & right[:, None, :]).unsqueeze(1)
    return torch.where(inside, noise, images)


def _is_inside(starts: Tensor, lengths: Tensor, count: int) -> Tensor:
    places = torch.arange(count, device=starts.device)
    return (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
