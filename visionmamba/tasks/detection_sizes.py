"""Brings detections from the pixels of a model's input to those of the picture in its file."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from visionmamba.data.object_masks import Counts, encode_mask

_MASK_THRESHOLD = 0.5


class FoundObjects(NamedTuple):
    """The objects found in a picture, in its own pixels."""

    boxes: NDArray[np.float64]
    """(n, 4): left, top, right, bottom."""
    scores: NDArray[np.float64]
    """(n,) from 0 to 1."""
    labels: NDArray[np.int64]
    """(n,) from 1."""
    masks: tuple[Counts, ...]
    """Run lengths of each mask; none where only boxes are judged."""

    def take(self, chosen: NDArray[Any]) -> "FoundObjects":
        """Returns the objects that places, or a mask (n,), choose."""
        places = np.arange(len(self.labels))[chosen].tolist()
        masks = tuple(self.masks[place] for place in places if self.masks)
        return FoundObjects(self.boxes[places], self.scores[places], self.labels[places], masks)


def own_objects(
    found: Mapping[str, Tensor],
    *,
    size: tuple[int, int],
    own_size: tuple[int, int],
    at: tuple[int, int] = (0, 0),
    picture_size: tuple[int, int] | None = None,
) -> FoundObjects:
    """Returns what a model found, in the picture's own pixels and in the model's order.

    Every mask is resized inside its box and kept as run lengths, so that many objects of a large
    picture take little memory. A pixel belongs to an object when at least half of it does.

    Args:
        found: boxes (n, 4) left, top, right, bottom, scores (n,), labels (n,), and masks
            (n, height, width) or (n, 1, height, width), bool or from 0 to 1, that are 0 outside of
            their boxes.
        size: (height, width) of the model's input without padding, to which `found` refers.
        own_size: (height, width) of what the model saw in the picture's own pixels.
        at: where in the picture that begins: row and column.
        picture_size: (height, width) of the picture; None when the model saw all of it.

    Raises:
        ValueError: the masks are not of that size.
    """
    boxes, scores, labels, masks = (
        found[name].detach() for name in ("boxes", "scores", "labels", "masks")
    )
    masks = masks[:, 0] if masks.ndim == 4 else masks
    if masks.shape != (len(boxes), *size):
        raise ValueError(f"masks must be {(len(boxes), *size)}, got {tuple(masks.shape)}")
    top, left = at
    held = boxes.cpu().double().numpy()
    scale = (own_size[1] / size[1], own_size[0] / size[0])
    runs = [
        _own_mask(mask, box, own_size=own_size, at=at, picture_size=picture_size or own_size)
        for mask, box in zip(masks, held.tolist(), strict=True)
    ]
    return FoundObjects(
        boxes=held * (*scale, *scale) + (left, top, left, top),
        scores=scores.cpu().double().numpy(),
        labels=labels.cpu().to(torch.int64).numpy(),
        masks=tuple(runs),
    )


def _own_mask(
    mask: Tensor,
    box: tuple[float, float, float, float],
    *,
    own_size: tuple[int, int],
    at: tuple[int, int],
    picture_size: tuple[int, int],
) -> Counts:
    """Returns the run lengths of a mask (height, width), of which only the box is looked at."""
    rows = _Span.of(box[1], box[3], mask.shape[0], own_size[0])
    columns = _Span.of(box[0], box[2], mask.shape[1], own_size[1])
    if not (rows.length and columns.length):
        return np.array([picture_size[0] * picture_size[1]])
    part = mask[rows.first : rows.last, columns.first : columns.last] >= _MASK_THRESHOLD
    pixels = part.to("cpu", torch.uint8).numpy()
    place = at[0] + rows.own_first, at[1] + columns.own_first
    if tuple(mask.shape) != own_size:
        image = Image.fromarray(pixels * 255).resize(
            (columns.length, rows.length),
            Image.Resampling.BILINEAR,
            box=(columns.start, rows.start, columns.stop, rows.stop),
        )
        pixels = (np.asarray(image) >= 128).view(np.uint8)
    return encode_mask(pixels, at=place, size=picture_size)


class _Span(NamedTuple):
    """A stretch of a side, in pixels of the model's input and of the picture."""

    first: int
    last: int
    """Behind the last pixel of the input that is needed."""
    own_first: int
    length: int
    """Pixels of the picture."""
    start: float
    stop: float
    """What these pixels show, counted in the input's from `first` on."""

    @classmethod
    def of(cls, low: float, high: float, length: int, own_length: int) -> "_Span":
        scale = own_length / length
        own_first = max(math.floor(math.floor(low) * scale), 0)
        own_last = min(math.ceil(math.ceil(high) * scale), own_length)
        first = math.floor(own_first / scale)
        last = min(math.ceil(own_last / scale), length)
        start, stop = own_first / scale - first, min(own_last / scale, last) - first
        return cls(first, last, own_first, max(own_last - own_first, 0), start, stop)
