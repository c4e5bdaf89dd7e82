"""Objects of a picture of any size: found in one pass, or window by window and put together.

What a window shows is a picture of its own to the model. Objects of two windows that overlap are
compared by their masks in the part that both windows show, class by class:

- two that no inner edge of their windows cuts are one object when the intersection of their masks
  is more than half of the union; the better scored one stays;
- one that an inner edge cuts is dropped when another that is whole covers more than half of it
  there, and is scored at least half as high;
- those cut ones that are left are one object when one covers more than half of the other, and the
  scores of both differ by no more than a factor of two: the union of their masks, the box around
  their boxes, the best of their scores.

So an object is seen whole when it fits into what neighbouring windows share, and is pieced together
when it does not; windows should be larger than the objects.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from visionmamba.data.box_transforms import DetectionPreprocessing
from visionmamba.data.object_masks import decode_part, merge_masks
from visionmamba.tasks.detection_sizes import FoundObjects, own_objects
from visionmamba.tasks.sliding import Windows, window_starts

_SAME = 0.5
_CREDIBLE = 0.5  # of another's score: what is believed less does not change that one
_EDGE_SHARE = 1 / 128  # of a window's side: boxes that end so close to an inner edge are cut


@dataclass(frozen=True, kw_only=True)
class DetectionInference(Windows):
    """How a picture goes through a detector, and what of it is told.

    "whole" resizes a picture to just fit the detector's image size. "slide" does so with every
    window of it, so that small objects of a large picture keep their size.
    """

    crop_size: int = 1024
    """Side of the windows in pixels of the picture, whose shorter side cuts it down."""
    stride: int = 768
    """Distance of the windows in pixels, at most crop_size; what is left is shared."""
    num_windows: int = 1
    """Windows that go through the model at once."""
    min_score: float = 0.5
    """Objects scored lower are not told; average precision counts all that the model reports."""

    @classmethod
    def of_size(cls, size: tuple[int, int]) -> "DetectionInference":
        """Returns whole pictures, or windows as large as a model's pictures (height, width)."""
        side = min(size)
        return cls(crop_size=side, stride=max(1, side * 3 // 4))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "min_score", float(self.min_score))
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score must lie between 0 and 1, got {self.min_score}")


class Window(NamedTuple):
    """A rectangle of a picture, in its pixels."""

    top: int
    left: int
    bottom: int
    right: int


def find_objects(
    model: Callable[[list[Tensor]], Any],
    image: Image.Image,
    *,
    preprocessing: DetectionPreprocessing,
    inference: DetectionInference,
    min_score: float = 0.0,
    device: torch.device | None = None,
) -> FoundObjects:
    """Returns the objects of a picture, best first.

    Beside the picture it holds what the model makes of `num_windows` windows, and the run lengths
    of what was found.

    Args:
        model: in evaluation mode: a list of (3, h, w) to one of dicts of "boxes", "scores",
            "labels" and "masks" as torchvision's detectors give them.
        image: upright, "RGB".
        preprocessing: of the model.
        inference: whole or windows.
        min_score: objects scored lower are left out before windows are put together.
        device: where the model is; None for the CPU.
    """
    size = (image.height, image.width)
    transform = preprocessing.build()
    windows = cut_windows(size, inference)
    found: list[FoundObjects] = []
    for start in range(0, len(windows), inference.num_windows):
        some = windows[start : start + inference.num_windows]
        inputs = [transform.pixels(_cut_out(image, window)) for window in some]
        answers = model([one.to(device) for one in inputs])
        for window, one, answer in zip(some, inputs, answers, strict=True):
            is_told = answer["scores"] >= min_score
            found.append(
                own_objects(
                    {name: values[is_told] for name, values in answer.items()},
                    size=(one.shape[1], one.shape[2]),
                    own_size=(window.bottom - window.top, window.right - window.left),
                    at=(window.top, window.left),
                    picture_size=size,
                )
            )
    return join_windows(windows, found, size=size)


def cut_windows(size: tuple[int, int], inference: DetectionInference) -> list[Window]:
    """Returns the windows over a picture of (height, width), row after row.

    They lie every `stride` pixels, the last ones flush with the edges.
    """
    if inference.mode == "whole":
        return [Window(0, 0, *size)]
    height, width = (min(inference.crop_size, side) for side in size)
    return [
        Window(top, left, top + height, left + width)
        for top in window_starts(size[0], height, inference.stride)
        for left in window_starts(size[1], width, inference.stride)
    ]


def join_windows(
    windows: Sequence[Window], found: Sequence[FoundObjects], *, size: tuple[int, int]
) -> FoundObjects:
    """Returns the objects of a picture, each once, best first; see above for the rule.

    Args:
        windows: row after row, no two the same.
        found: what each window shows, in the pixels of the picture.
        size: (height, width) of the picture.
    """
    together = FoundObjects(
        boxes=np.concatenate([one.boxes for one in found]),
        scores=np.concatenate([one.scores for one in found]),
        labels=np.concatenate([one.labels for one in found]),
        masks=tuple(counts for one in found for counts in one.masks),
    )
    if len(windows) == 1:
        return _best_first(together)
    is_cut = np.concatenate([
        _cut(window, one.boxes, size) for window, one in zip(windows, found, strict=True)
    ])  # fmt: skip
    pairs = _same_objects(_overlaps(windows, found, together, size[0]), is_cut, together.scores)
    dropped = pairs.covered | _worse(pairs.whole, together.scores)
    groups = _groups(
        [place for place in range(len(is_cut)) if place not in dropped],
        [pair for pair in pairs.cut if not dropped.intersection(pair)],
    )
    return _best_first(
        FoundObjects(
            boxes=np.array([_box_around(together.boxes[group]) for group in groups]).reshape(-1, 4),
            scores=np.array([together.scores[group].max() for group in groups]),
            labels=np.array([together.labels[group[0]] for group in groups], dtype=np.int64),
            masks=tuple(merge_masks([together.masks[place] for place in group])
                        for group in groups),
        )
    )  # fmt: skip


def _cut_out(image: Image.Image, window: Window) -> Image.Image:
    if window == (0, 0, image.height, image.width):
        return image
    return image.crop((window.left, window.top, window.right, window.bottom))


class _Overlap(NamedTuple):
    """Two objects of one class, as far as both of their windows show them."""

    first: int
    second: int
    areas: tuple[int, int]
    """Pixels of each."""
    shared: int
    """Pixels of both."""


def _overlaps(
    windows: Sequence[Window],
    found: Sequence[FoundObjects],
    together: FoundObjects,
    height: int,
) -> Iterator[_Overlap]:
    """Yields the objects of different windows that have pixels in common."""
    starts = np.cumsum([0, *(len(one.labels) for one in found)])
    for one, other, seen in _shared_parts(windows):
        firsts, seconds = (np.arange(starts[place], starts[place + 1]) for place in (one, other))
        # of boxes left, top, right, bottom, as of windows: top, left, bottom, right
        held = [_intersection(together.boxes[some][:, [1, 0, 3, 2]], seen)
                for some in (firsts, seconds)]  # fmt: skip
        both = _intersection(held[0][:, None], held[1][None])
        is_same_class = together.labels[firsts][:, None] == together.labels[seconds][None]
        is_near = _has_area(both) & is_same_class
        for row, column in np.argwhere(is_near).tolist():
            pair = int(firsts[row]), int(seconds[column])
            around = np.concatenate([
                np.minimum(held[0][row], held[1][column])[:2],
                np.maximum(held[0][row], held[1][column])[2:],
            ])  # fmt: skip
            top, left = np.floor(around[:2]).astype(int).tolist()
            bottom, right = np.ceil(around[2:]).astype(int).tolist()
            masks = [
                decode_part(
                    together.masks[place], height, rows=(top, bottom), columns=(left, right)
                )
                for place in pair
            ]
            shared = int(np.count_nonzero(masks[0] & masks[1]))
            if shared:
                areas = int(np.count_nonzero(masks[0])), int(np.count_nonzero(masks[1]))
                yield _Overlap(*pair, areas, shared)


class _Pairs(NamedTuple):
    """What is one object, by places in a list of all."""

    whole: list[tuple[int, int]]
    """Two that are whole."""
    cut: list[tuple[int, int]]
    """Two that are cut."""
    covered: set[int]
    """Cut ones of which another window shows the whole."""


def _same_objects(
    overlaps: Iterable[_Overlap], is_cut: NDArray[np.bool_], scores: NDArray[np.float64]
) -> _Pairs:
    """Returns which of the objects that overlap are the same."""
    pairs = _Pairs([], [], set())
    for first, second, areas, shared in overlaps:
        if not (is_cut[first] or is_cut[second]):
            if shared > _SAME * (sum(areas) - shared):
                pairs.whole.append((first, second))
            continue
        covered = [shared > _SAME * area for area in areas]
        if is_cut[first] and is_cut[second]:
            low, high = sorted((scores[first], scores[second]))
            if any(covered) and low >= _CREDIBLE * high:
                pairs.cut.append((first, second))
            continue
        piece, whole = (first, second) if is_cut[first] else (second, first)
        if covered[piece == second] and scores[whole] >= _CREDIBLE * scores[piece]:
            pairs.covered.add(piece)
    return pairs


def _shared_parts(windows: Sequence[Window]) -> Iterator[tuple[int, int, NDArray[np.float64]]]:
    """Yields the places of two windows, the first one first, and what both show."""
    edges = np.array(windows)
    for one in range(len(windows)):
        num_behind = np.searchsorted(edges[one:, 0], edges[one, 2])  # rows that begin above its end
        parts = _intersection(edges[one], edges[one + 1 : one + num_behind])
        for number in np.flatnonzero(_has_area(parts)).tolist():
            yield one, one + 1 + number, parts[number]


def _intersection(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Returns what rectangles (..., 4) top, left, bottom, right have in common."""
    shape = np.broadcast_shapes(one.shape, other.shape)
    common = np.empty(shape)
    common[..., :2] = np.maximum(one[..., :2], other[..., :2])
    common[..., 2:] = np.minimum(one[..., 2:], other[..., 2:])
    return common


def _has_area(rectangles: NDArray[Any]) -> NDArray[np.bool_]:
    has_area: NDArray[np.bool_] = np.all(rectangles[..., 2:] > rectangles[..., :2], axis=-1)
    return has_area


def _cut(window: Window, boxes: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns (n,): whether a box ends at an edge of its window that is not the picture's."""
    down, right = (
        _EDGE_SHARE * side for side in (window.bottom - window.top, window.right - window.left)
    )
    return (
        ((boxes[:, 0] < window.left + right) & (window.left > 0))
        | ((boxes[:, 1] < window.top + down) & (window.top > 0))
        | ((boxes[:, 2] > window.right - right) & (window.right < size[1]))
        | ((boxes[:, 3] > window.bottom - down) & (window.bottom < size[0]))
    )


def _worse(pairs: Sequence[tuple[int, int]], scores: NDArray[np.float64]) -> set[int]:
    """Returns those that are the same as a better one that stays."""
    same: dict[int, list[int]] = {}
    for first, second in pairs:
        same.setdefault(first, []).append(second)
        same.setdefault(second, []).append(first)
    worse: set[int] = set()
    for place in sorted(same, key=lambda place: (-scores[place], place)):
        if place not in worse:
            worse.update(other for other in same[place])
    return worse


def _groups(places: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Returns the places, those together that pairs connect."""
    parent = {place: place for place in places}

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for first, second in pairs:
        parent[root(second)] = root(first)
    groups: dict[int, list[int]] = {}
    for place in places:
        groups.setdefault(root(place), []).append(place)
    return list(groups.values())


def _box_around(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])


def _best_first(found: FoundObjects) -> FoundObjects:
    return found.take(np.argsort(-found.scores, kind="stable"))
