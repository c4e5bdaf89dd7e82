"""Brings detections from the pixels of a model's input to those of the picture in its file."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

_MAX_PIXELS_AT_ONCE = 2**26  # of masks in float32: 256 MiB


def resize_detections(
    found: Mapping[str, Tensor], *, size: tuple[int, int], own_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Returns the detections of one picture in its own pixels; what is no place stays as it is.

    Args:
        found: boxes (n, 4) left, top, right, bottom, possibly masks (n, height, width) bool, and
            others, such as scores and labels.
        size: (height, width) of the model's input without padding, to which `found` refers.
        own_size: (height, width) of the picture in its file.

    Raises:
        ValueError: the masks are not of that size.
    """
    scale = (own_size[1] / size[1], own_size[0] / size[0])
    boxes = found["boxes"]
    resized = {**found, "boxes": boxes * boxes.new_tensor((*scale, *scale))}
    if "masks" not in found or size == own_size:
        return resized
    masks = found["masks"]
    if masks.shape[1:] != size:
        raise ValueError(f"masks must be (n, {size[0]}, {size[1]}), got {tuple(masks.shape)}")
    at_once = max(1, _MAX_PIXELS_AT_ONCE // (own_size[0] * own_size[1]))
    parts = [_resize_masks(part, own_size) for part in torch.split(masks, at_once)]
    resized["masks"] = torch.cat(parts)
    return resized


def _resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns (n, *size) bool: pixels of which at least a half belongs to the object."""
    if not len(masks):
        return masks.new_zeros((0, *size), dtype=torch.bool)
    shares = F.interpolate(masks[:, None].float(), size, mode="bilinear", antialias=True)
    return shares[:, 0] >= 0.5
