"""Masks of single objects as COCO writes them: outlines and run lengths, checked, then decoded.

Nothing here trusts what it reads: lengths must fill the picture exactly before any memory is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Counts = NDArray[np.int64]
"""Lengths of the runs of 0 and 1 in turn, column after column; the first may be 0."""

_MAX_CHARACTERS = 6  # of one length in a compressed text: 30 bits
_MAX_OUTLINE_PX = 10_000_000
_MAX_LENGTH = 2**31
_DRAWN_AT_ONCE = 2**22  # pixels of objects, each of which takes 24 bytes meanwhile


class Segment(NamedTuple):
    """A mask as it was written; what `decode` needs in the least memory."""

    parts: tuple[NDArray[np.float64], ...]
    """Outlines x0, y0, x1, y1, ... in pixels, or a single array of run lengths."""
    is_outline: bool


class NoAreaError(ValueError):
    """Outlines without three corners."""


def encode_mask(
    mask: NDArray[np.uint8] | NDArray[np.bool_],
    *,
    at: tuple[int, int] = (0, 0),
    size: tuple[int, int] | None = None,
) -> Counts:
    """Returns the run lengths of an (H, W) mask, not empty, whose values are 0 and 1.

    Args:
        mask: the whole mask, or a part of it outside of which the picture is 0.
        at: top and left of the part.
        size: height and width of the picture; None for those of the mask.
    """
    height, width = size or mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.array([height * width])
    held = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = at[0] + int(rows[0]), at[1] + int(columns[0])
    # an empty row, where the picture has one, keeps runs of neighbouring columns apart
    num_rows = min(len(held) + 1, height)
    line = np.zeros((held.shape[1], num_rows), dtype=np.bool_)
    line[:, : len(held)] = held.T
    edges = np.flatnonzero(np.diff(line.ravel(), prepend=False, append=False))
    first, last = edges[::2], edges[1::2] - 1
    bounds = np.empty(len(edges) + 1, dtype=np.int64)
    bounds[:-1:2] = (first // num_rows + left) * height + first % num_rows + top
    bounds[1::2] = (last // num_rows + left) * height + last % num_rows + top + 1
    bounds[-1] = height * width
    held_bounds = bounds[:-1] if bounds[-2] == bounds[-1] else bounds
    return np.diff(held_bounds, prepend=0)


def decode_mask(counts: Counts, height: int, width: int) -> NDArray[np.uint8]:
    """Returns (height, width) of 0 and 1; the lengths must add up to height * width."""
    line = np.repeat((np.arange(len(counts)) % 2).astype(np.uint8), counts)
    return line.reshape(width, height).T


def decode_part(
    counts: Counts, height: int, *, rows: tuple[int, int], columns: tuple[int, int]
) -> NDArray[np.uint8]:
    """Returns a rectangle of a mask, of 0 and 1, without decoding the rest.

    Args:
        counts: run lengths of the whole mask.
        height: of the picture.
        rows: first row, and the one behind the last; inside the picture.
        columns: first column, and the one behind the last; inside the picture.
    """
    (top, bottom), (left, right) = rows, columns
    starts, stops = (ends.clip(left * height, right * height) for ends in _runs(counts))
    is_seen = starts < stops
    starts, stops = starts[is_seen], stops[is_seen]
    # a run that goes round the foot of a column is one of each column
    nums = (stops - 1) // height - starts // height + 1
    run = np.repeat(np.arange(len(nums)), nums)
    number = np.arange(len(run)) - np.repeat(np.cumsum(nums) - nums, nums)
    column = starts[run] // height + number
    first = np.maximum(starts[run] - column * height, 0).clip(top, bottom) - top
    last = np.minimum(stops[run] - column * height, height).clip(top, bottom) - top
    changes = np.zeros((right - left, bottom - top + 1), dtype=np.int8)
    np.add.at(changes, (column - left, first), 1)
    np.subtract.at(changes, (column - left, last), 1)
    part: NDArray[np.uint8] = np.cumsum(changes[:, :-1], axis=1, dtype=np.int8).T.view(np.uint8)
    return part


def column_runs(masks: Sequence[Counts], height: int, width: int) -> tuple[NDArray[np.int64], ...]:
    """Returns which mask, column, first row and row behind the last each run of 1 has, in order.

    Args:
        masks: run lengths of masks of a picture; a run round the foot of a column is one of each.
        height: of the picture.
        width: of the picture.
    """
    counts = np.concatenate([np.empty(0, dtype=np.int64), *masks])
    nums = np.array([len(one) for one in masks], dtype=np.int64)
    place = np.arange(len(counts)) - np.repeat(np.cumsum(nums) - nums, nums)
    held = np.flatnonzero((place & 1) * counts)
    stops = np.cumsum(counts)[held]  # in all masks as one line, as each fills the picture
    starts = stops - counts[held]
    line = starts // height
    top, bottom = starts - line * height, stops - line * height
    if (bottom > height).any():
        nums = -(-bottom // height)
        run = np.repeat(np.arange(len(nums)), nums)
        passed = np.arange(len(run)) - (np.cumsum(nums) - nums)[run]
        line = line[run] + passed
        top = np.maximum(top[run] - passed * height, 0)
        bottom = np.minimum(bottom[run] - passed * height, height)
    number = line // width
    return number, line - number * width, top, bottom


def draw_runs(
    runs: Tensor, num_masks: int, size: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """Returns masks (num_masks, height, width) uint8 of 0 and 1, drawn on a device.

    Args:
        runs: (2, r) int64 on the CPU: where each of r runs down a column begins in the masks as one
            line, row after row and mask after mask, and how many pixels it has.
        num_masks: how many masks there are.
        size: (height, width) of each.
        device: None for the CPU.
    """
    height, width = size
    masks = torch.zeros(num_masks * height * width, dtype=torch.uint8, device=device)
    ends = runs[1].cumsum(0)  # here, so that nothing below waits for the device
    total = int(ends[-1]) if len(ends) else 0
    bounds = torch.tensor(range(_DRAWN_AT_ONCE, total, _DRAWN_AT_ONCE), dtype=torch.int64)
    parts = torch.searchsorted(ends, bounds)
    chunks = torch.tensor_split(runs.to(device, non_blocking=True), parts, dim=1)
    nums = [int(own.sum()) for own in torch.tensor_split(runs[1], parts)]
    for (starts, lengths), num in zip(chunks, nums, strict=True):
        firsts = starts - (lengths.cumsum(0) - lengths) * width
        pixels = torch.arange(num, device=device).mul_(width)
        masks[pixels.add_(firsts.repeat_interleave(lengths, output_size=num))] = 1
    return masks.view(num_masks, height, width)


def merge_masks(masks: Sequence[Counts]) -> Counts:
    """Returns the run lengths of what at least one of some masks of a picture holds."""
    runs = [_runs(counts) for counts in masks]
    edges = np.concatenate([ends for run in runs for ends in run])
    steps = np.concatenate([np.full(len(ends), step) for run in runs
                            for ends, step in zip(run, (1, -1), strict=True)])  # fmt: skip
    order = np.lexsort((-steps, edges))  # where one run ends and another begins they are one
    edges, depths = edges[order], np.cumsum(steps[order])
    is_bound = (depths == 0) | ((depths == 1) & (steps[order] == 1))
    total = masks[0].sum()
    bounds = edges[is_bound]
    if not len(bounds) or bounds[-1] < total:
        bounds = np.append(bounds, total)
    merged: Counts = np.diff(bounds, prepend=0)
    return merged


def mask_area(counts: Counts) -> int:
    """Returns the number of pixels of the object."""
    return int(counts[1::2].sum())


def mask_box(counts: Counts, height: int) -> tuple[int, int, int, int] | None:
    """Returns left, top, right, bottom around the object's pixels, None where it has none.

    Args:
        counts: run lengths of the mask.
        height: of the picture.
    """
    starts, stops = _runs(counts)
    first, last = starts, stops - 1
    if not len(first):
        return None
    left, right = int(first[0]) // height, int(last[-1]) // height + 1
    if (first // height != last // height).any():  # a run goes round the foot of a column
        return left, 0, right, height
    return left, int((first % height).min()), right, int((last % height).max()) + 1


def read_segment(value: object, height: int, width: int) -> Segment:
    """Returns what a "segmentation" of COCO JSON says, checked against the picture's size.

    Args:
        value: outlines [[x0, y0, x1, y1, ...], ...], or {"size": [height, width], "counts": ...}
            with a list of lengths or COCO's compressed text.
        height: of the picture.
        width: of the picture.

    Raises:
        NoAreaError: none of the outlines has three corners.
        ValueError: it is none of these, or does not fit the picture; the message completes "the
            segmentation ...".
    """
    if isinstance(value, list):
        return _read_outlines(value, height, width)
    if not isinstance(value, dict) or "counts" not in value:
        raise ValueError("must be a list of outlines or an object with size and counts")
    if value.get("size") != [height, width]:
        raise ValueError(f"must have the size [{height}, {width}], got another")
    counts = value["counts"]
    lengths = _decompress(counts) if isinstance(counts, str) else _read_lengths(counts)
    if not len(lengths) or (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(
            f"must have lengths of at least 0 that add up to {height * width} pixels, got "
            f"{len(lengths)} that add up to {lengths.sum():g}"
        )
    if (lengths != np.round(lengths)).any():
        raise ValueError("must have whole numbers as lengths")
    return Segment((lengths.astype(np.float64),), is_outline=False)


def segment_counts(segment: Segment, height: int, width: int) -> Counts:
    """Returns the run lengths of a mask; outlines are filled as COCO's own tools fill them.

    Raises:
        ImportError: outlines need faster-coco-eval.
    """
    if not segment.is_outline:
        return segment.parts[0].astype(np.int64)
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ImportError(
            "outlines of objects need faster-coco-eval; install it with: pip install "
            "'visionmamba[detection]'"
        ) from error
    filled = mask.frPyObjects([part.tolist() for part in segment.parts], height, width)
    counts = mask.merge(filled)["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return _decompress(text).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class SegmentTable:
    """Many masks in four arrays, which processes share without copies."""

    numbers: NDArray[np.float64]
    part_starts: NDArray[np.int64]
    """(parts + 1,): where each part begins in numbers."""
    first_parts: NDArray[np.int64]
    """(masks + 1,): which part is each mask's first."""
    is_outline: NDArray[np.bool_]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> "SegmentTable":
        """Returns the table of some masks."""
        parts = [part for segment in segments for part in segment.parts]
        return cls(
            numbers=np.concatenate([np.empty(0), *parts]),
            part_starts=np.cumsum([0, *map(len, parts)]),
            first_parts=np.cumsum([0, *(len(segment.parts) for segment in segments)]),
            is_outline=np.array([segment.is_outline for segment in segments], dtype=np.bool_),
        )

    def __getitem__(self, index: int) -> Segment:
        parts = range(int(self.first_parts[index]), int(self.first_parts[index + 1]))
        bounds = self.part_starts
        return Segment(
            tuple(self.numbers[bounds[part] : bounds[part + 1]] for part in parts),
            bool(self.is_outline[index]),
        )


def _runs(counts: Counts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns where the runs of 1 that are not empty begin, and the places behind their ends."""
    ends = np.cumsum(counts)
    is_held = counts[1::2] > 0
    return ends[:-1:2][is_held], ends[1::2][is_held]


def _read_outlines(value: list[object], height: int, width: int) -> Segment:
    allowed: float = min(
        _MAX_OUTLINE_PX, 4 * (height + 2) * (width + 2)
    )  # more cannot tell pixels apart
    parts: list[NDArray[np.float64]] = []
    for one in value:
        part = _plain_numbers(one, "outlines")
        if len(part) % 2:
            raise ValueError("must have outlines of x and y in turn, got an odd number of values")
        if len(part) < 6:
            continue
        x, y = part[::2], part[1::2]
        bounds = min(x), min(y), max(x), max(y)
        is_far = bounds[0] < -width or bounds[1] < -height
        if is_far or bounds[2] > 2 * width or bounds[3] > 2 * height:
            raise ValueError(
                f"leaves the picture of {width}x{height} px by more than the picture's size"
            )
        parts.append(np.array(part, dtype=np.float64))
        longest = max(bounds[2] - bounds[0], bounds[3] - bounds[1])
        allowed -= longest * len(x) if longest * len(x) <= allowed else _length(parts[-1])
        if allowed < 0:
            raise ValueError("has longer outlines than a picture of that size can hold")
    if not parts:
        raise NoAreaError("has no outline of at least three corners")
    return Segment(tuple(parts), is_outline=True)


def _length(part: NDArray[np.float64]) -> float:
    x, y = part[::2], part[1::2]
    return float(np.maximum(abs(np.diff(x, append=x[0])), abs(np.diff(y, append=y[0]))).sum())


def _plain_numbers(value: object, name: str) -> list[int | float]:
    """Returns a list of numbers, which may be too large for an array."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int, float}:
        raise ValueError(f"must have {name} that are lists of numbers")
    return value


def _read_lengths(value: object) -> NDArray[np.float64]:
    numbers = _plain_numbers(value, "counts")
    if any(not 0 <= number <= _MAX_LENGTH for number in numbers):
        raise ValueError("must have lengths of at least 0 in its counts, and none beyond a picture")
    return np.array(numbers, dtype=np.float64)


def _decompress(text: str) -> NDArray[np.float64]:
    """Returns the lengths in COCO's text.

    Each is a row of characters, six bits beyond "0": five of the number, the lowest first, and one
    that says that more follow; the last character's fifth bit is the sign. From the fourth on they
    are differences to the last but one.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError("has counts with characters that no compressed text has") from None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("has counts that are no compressed text, or are cut short")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    num_characters = ends - starts + 1
    if num_characters.max() > _MAX_CHARACTERS:
        raise ValueError("has a length in its counts that no picture has")
    places = np.arange(len(codes)) - np.repeat(starts, num_characters)
    lengths = np.add.reduceat((codes & 31) << (5 * places), starts)
    lengths -= (codes[ends] >> 4 & 1) << (5 * num_characters)
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return lengths.astype(np.float64)
