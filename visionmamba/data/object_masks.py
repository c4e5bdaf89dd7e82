"""Masks of single objects as COCO writes them: outlines and run lengths, checked, then decoded.

Nothing here trusts what it reads: lengths must fill the picture exactly before any memory is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
"""Lengths of the runs of 0 and 1 in turn, column after column; the first may be 0."""

_MAX_CHARACTERS = 6  # of one length in a compressed text: 30 bits
_MAX_OUTLINE_PX = 10_000_000
_MAX_LENGTH = 2**31


class Segment(NamedTuple):
    """A mask as it was written; what `decode` needs in the least memory."""

    parts: tuple[NDArray[np.float64], ...]
    """Outlines x0, y0, x1, y1, ... in pixels, or a single array of run lengths."""
    is_outline: bool


class NoAreaError(ValueError):
    """Outlines without three corners."""


def encode_mask(mask: NDArray[np.uint8] | NDArray[np.bool_]) -> Counts:
    """Returns the run lengths of an (H, W) mask, not empty, whose values are 0 and 1."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.array([height * width])
    # an empty row above or below, where there is one, keeps runs of neighbouring columns apart
    top, bottom = max(int(rows[0]) - 1, 0), min(int(rows[-1]) + 2, height)
    left = int(columns[0])
    line = mask[top:bottom, left : int(columns[-1]) + 1].T.ravel().astype(np.bool_)
    edges = np.flatnonzero(np.diff(line, prepend=False, append=False))
    first, last = edges[::2], edges[1::2] - 1
    bounds = np.empty(len(edges) + 1, dtype=np.int64)
    bounds[:-1:2] = (first // (bottom - top) + left) * height + first % (bottom - top) + top
    bounds[1::2] = (last // (bottom - top) + left) * height + last % (bottom - top) + top + 1
    bounds[-1] = height * width
    held = bounds[:-1] if bounds[-2] == bounds[-1] else bounds
    return np.diff(held, prepend=0)


def decode_mask(counts: Counts, height: int, width: int) -> NDArray[np.uint8]:
    """Returns (height, width) of 0 and 1; the lengths must add up to height * width."""
    line = np.repeat((np.arange(len(counts)) % 2).astype(np.uint8), counts)
    return line.reshape(width, height).T


def mask_area(counts: Counts) -> int:
    """Returns the number of pixels of the object."""
    return int(counts[1::2].sum())


def mask_box(counts: Counts, height: int) -> tuple[int, int, int, int] | None:
    """Returns left, top, right, bottom around the object's pixels, None where it has none.

    Args:
        counts: run lengths of the mask.
        height: of the picture.
    """
    ends = np.cumsum(counts)
    is_held = counts[1::2] > 0
    first, last = ends[:-1:2][: len(is_held)][is_held], ends[1::2][is_held] - 1
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
