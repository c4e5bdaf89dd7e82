"""Scores of every pixel of a picture of any size: whole or window by window, scaled and mirrored.

Scores come in bands that run across the shorter side, so that what is held does not grow with the
longer one. What is done with them is segmentation.py's and segmenter.py's business.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmamba.data import BatchTooLargeError, explain_out_of_memory

Mode = Literal["whole", "slide"]

_MAX_BAND_SCORES = 2**24  # 64 MiB of float32


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a picture goes through a model: in one pass, or window after window."""

    mode: Mode = "whole"
    """"whole": in one pass; "slide": in windows, whose results are put together."""
    crop_size: int = 512
    """Side of the windows in pixels; a picture's shorter side cuts it down."""
    stride: int = 341
    """Distance of the windows in pixels, at most crop_size."""
    num_windows: int = 4
    """Windows that go through the model at once."""

    def __post_init__(self) -> None:
        if self.mode not in ("whole", "slide"):
            raise ValueError(f'mode must be "whole" or "slide", got {self.mode!r}')
        if self.crop_size < 1:
            raise ValueError(f"crop_size must be at least 1, got {self.crop_size}")
        if not 1 <= self.stride <= self.crop_size:
            raise ValueError(
                f"stride must lie between 1 and crop_size={self.crop_size}, or pixels between "
                f"windows are not seen; got {self.stride}"
            )
        if self.num_windows < 1:
            raise ValueError(f"num_windows must be at least 1, got {self.num_windows}")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for the header of a weights file."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns what `to_dict` described; what is missing has its default.

        Raises:
            ValueError: a key is unknown, or a value is of another type or out of range.
        """
        known = [one.name for one in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"inference knows {', '.join(known)}; got {', '.join(unknown)}")
        return cls(**{name: _typed(name, value, like=getattr(cls, name))
                      for name, value in values.items()})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Inference(Windows):
    """How a picture goes through a segmentation model; scores of windows are averaged."""

    scales: tuple[float, ...] = (1.0,)
    """Sizes at which the picture is judged, as shares of its own; probabilities are averaged."""
    flip: bool = False
    """Judge the mirrored picture too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales or not all(0 < scale <= 16 for scale in self.scales):
            raise ValueError(f"scales must be numbers above 0 and at most 16, got {self.scales}")


def _typed(name: str, value: Any, *, like: object) -> Any:
    """Returns a value of JSON as the option that a default stands for; ValueError if it is none."""
    if isinstance(like, tuple):
        if isinstance(value, list | tuple) and all(type(one) in (int, float) for one in value):
            return tuple(map(float, value))
    elif type(value) is type(like):
        return value
    raise ValueError(f"{name} is of the wrong type: {value!r}")


class Band(NamedTuple):
    """Scores of a rectangle of a picture."""

    rows: slice
    """Which rows of the picture."""
    columns: slice
    """Which columns."""
    scores: Tensor
    """(B, K, rows, columns) float32: logits, or logarithms of probabilities averaged over views."""


def score_bands(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    size: tuple[int, int],
    inference: Inference,
    device: torch.device | None = None,
) -> Iterator[Band]:
    """Yields the scores of all pixels, band after band; together the bands cover the picture.

    Windows lie as in the published evaluation (mmsegmentation): every `stride` pixels, the last
    one flush with the edge. Scores of a view (a scale, mirrored or not) are resized to `size` by
    bilinear interpolation; softmax and the mean over views come after that.

    In "slide" mode, with L the longer and S the shorter side, crop_size x S scores of a class are
    held at once instead of L x S.

    Args:
        model: (b, C, h, w) to (b, K, h, w) for any h and w.
        images: (B, C, h, w) of equal size; they may stay in the CPU's memory while the model is on
            a GPU.
        size: height and width in pixels of the scores wanted, those of the pictures themselves.
        inference: windows, scales, mirroring.
        device: where the model is; None for where the images are.
    """
    height, width = size
    is_turned = inference.mode == "slide" and width > height
    work = images.mT if is_turned else images
    length, across = (width, height) if is_turned else (height, width)
    views = [
        _View(
            model,
            work,
            scale=scale,
            inference=inference,
            is_turned=is_turned,
            is_mirrored=is_mirrored,
            device=device or images.device,
        )
        for scale in inference.scales
        for is_mirrored in ((False, True) if inference.flip else (False,))
    ]
    num_maps = views[0].take(0, 1).shape[:2].numel()
    widest = max(across, *(view.across for view in views))
    rows_a_row = max(1.0, *(view.length / length for view in views))
    step = max(1, int(_MAX_BAND_SCORES / (num_maps * widest * rows_a_row)))
    for start in range(0, length, step):
        stop = min(start + step, length)
        scores = _merged([_resized(view, start, stop, length, across) for view in views])
        rows, columns = slice(start, stop), slice(0, across)
        if is_turned:
            yield Band(columns, rows, scores.mT)
        else:
            yield Band(rows, columns, scores)


def predict_labels(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    size: tuple[int, int],
    inference: Inference,
    device: torch.device | None = None,
) -> Tensor:
    """Returns the class of every pixel, (B, height, width) uint8 in the CPU's memory.

    Args: as score_bands; at most 256 classes.
    """
    labels = torch.empty(len(images), *size, dtype=torch.uint8)
    for band in score_bands(model, images, size=size, inference=inference, device=device):
        labels[:, band.rows, band.columns] = band.scores.argmax(dim=1).to("cpu", torch.uint8)
    return labels


@contextmanager
def explain_large_picture(
    inference: Windows, size: tuple[int, int], *, num_images: int = 1
) -> Iterator[None]:
    """Turns running out of memory over pictures of (height, width) into one sentence.

    Raises:
        BatchTooLargeError: the body ran out of memory on a GPU or on the CPU.
    """
    try:
        with explain_out_of_memory(inference.num_windows):
            yield
    except BatchTooLargeError as error:
        height, width = size
        if num_images > 1:
            raise BatchTooLargeError(
                f"{num_images} pictures of {height}x{width} pixels do not fit into memory at once; "
                "lower batch_size, on the command line --batch-size"
            ) from error
        if inference.mode == "whole":
            raise BatchTooLargeError(
                f"a picture of {height}x{width} pixels does not fit into memory in one pass; go "
                'over it in windows: Inference(mode="slide"), on the command line --mode slide'
            ) from error
        raise BatchTooLargeError(
            f"{inference.num_windows} windows of {inference.crop_size} pixels of a picture of "
            f"{height}x{width} do not fit into memory; lower num_windows or crop_size"
        ) from error


class _View:
    """The scores of one scale of a picture, whose rows must be asked for from first to last.

    Rows run along the longer side: a turned view is a transposed picture.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        *,
        scale: float,
        inference: Inference,
        is_turned: bool,
        is_mirrored: bool,
        device: torch.device,
    ) -> None:
        self._model = model
        self._images = images
        self._is_turned = is_turned
        self._is_mirrored = is_mirrored
        self._device = device
        self.length, self.across = (max(1, round(scale * side)) for side in images.shape[-2:])
        is_whole = inference.mode == "whole"
        self._crop = tuple(
            side if is_whole else min(inference.crop_size, side)
            for side in (self.length, self.across)
        )
        tops = window_starts(self.length, self._crop[0], inference.stride)
        lefts = window_starts(self.across, self._crop[1], inference.stride)
        if is_mirrored and is_turned:  # the mirrored picture's own windows
            tops = [self.length - self._crop[0] - top for top in reversed(tops)]
        elif is_mirrored:
            lefts = [self.across - self._crop[1] - left for left in reversed(lefts)]
        self._tops, self._lefts = tops, lefts
        self._counts = (
            _coverage(tops, self._crop[0], self.length).to(device),
            _coverage(lefts, self._crop[1], self.across).to(device),
        )
        self._group = max(1, inference.num_windows // len(images))
        self._at_once = len(images) if is_whole else inference.num_windows
        self._num_done = 0  # rows of windows
        self._first = 0  # row that the sums begin with
        self._sums: Tensor | None = None  # (B, K, rows, across)

    def take(self, start: int, stop: int) -> Tensor:
        """Returns mean scores of some rows, (B, K, stop - start, across); drops those before."""
        while self._num_done < len(self._tops) and self._tops[self._num_done] < stop:
            self._forget(min(start, self._tops[self._num_done]))
            self._add_windows(self._tops[self._num_done])
            self._num_done += 1
        self._forget(start)
        assert self._sums is not None
        sums = self._sums[:, :, : stop - start]
        if len(self._tops) == len(self._lefts) == 1:
            return sums
        down, across = self._counts
        return sums / (down[start:stop, None] * across)

    def _forget(self, start: int) -> None:
        if self._sums is not None and start > self._first:
            self._sums = self._sums[:, :, start - self._first :]
            self._first = start

    def _add_windows(self, top: int) -> None:
        height, width = self._crop
        for number in range(0, len(self._lefts), self._group):
            lefts = self._lefts[number : number + self._group]
            windows = torch.cat([self._window(top, left) for left in lefts])
            parts = [
                self._run(part.to(self._device)) for part in torch.split(windows, self._at_once)
            ]
            scores = (parts[0] if len(parts) == 1 else torch.cat(parts)).chunk(len(lefts))
            if len(self._tops) == len(self._lefts) == 1:
                self._sums = scores[0]
                return
            sums = self._reach(top + height, scores[0])
            rows = slice(top - self._first, top - self._first + height)
            for left, one in zip(lefts, scores, strict=True):
                sums[:, :, rows, left : left + width] += one

    def _reach(self, stop: int, like: Tensor) -> Tensor:
        """Returns the sums, with rows of zeros for those up to `stop` that are not there yet."""
        num_rows = stop - self._first
        if self._sums is not None and self._sums.shape[2] >= num_rows:
            return self._sums
        kept = None if self._sums is None else self._sums.clone()
        self._sums = None  # what is forgotten is freed before more is asked for
        self._sums = like.new_zeros(*like.shape[:2], num_rows, self.across)
        if kept is not None:
            self._sums[:, :, : kept.shape[2]] = kept
        return self._sums

    def _window(self, top: int, left: int) -> Tensor:
        height, width = self._crop
        rows = resize_span(self._images, -2, top, top + height, self.length)
        return resize_span(rows, -1, left, left + width, self.across)

    def _run(self, windows: Tensor) -> Tensor:
        windows = windows.mT if self._is_turned else windows
        windows = windows.flip(-1) if self._is_mirrored else windows
        scores = self._model(windows.contiguous()).float()
        scores = scores.flip(-1) if self._is_mirrored else scores
        return scores.mT if self._is_turned else scores


def resize_span(
    x: Tensor,
    dim: int,
    start: int,
    stop: int,
    target: int,
    *,
    source: int | None = None,
    offset: int = 0,
) -> Tensor:
    """Returns places start to stop - 1 of what `dim` is when resized, without the rest of it.

    Bilinear, without smoothing, edges of pixels aligned: a part of F.interpolate's result.

    Args:
        x: any shape.
        dim: the dimension to resize.
        start, stop: places wanted of the `target` ones.
        target: length of the whole resized dimension.
        source: length of the whole dimension before; None for that of x.
        offset: place in the whole dimension that x begins at.
    """
    source = x.shape[dim] if source is None else source
    if source == target:
        return x.narrow(dim, start - offset, stop - start)
    places = torch.arange(start, stop, device=x.device, dtype=torch.float64)
    places = ((places + 0.5) * (source / target) - 0.5).clamp(0, source - 1)
    low = places.long()
    high = (low + 1).clamp(max=source - 1)
    shape = [1] * x.dim()
    shape[dim] = stop - start
    weights = (places - low).to(x.dtype).reshape(shape)
    return torch.lerp(
        x.index_select(dim, low - offset), x.index_select(dim, high - offset), weights
    )


def _resized(view: _View, start: int, stop: int, length: int, across: int) -> Tensor:
    """Returns rows of a view's scores at the picture's size, (B, K, stop - start, across)."""
    ratio = view.length / length
    first = max(0, int((start + 0.5) * ratio - 0.5))
    last = min(view.length, max(0, int((stop - 0.5) * ratio - 0.5)) + 2)
    if view.length == length:
        first, last = start, stop
    scores = view.take(first, last)
    scores = resize_span(scores, -2, start, stop, length, source=view.length, offset=first)
    if view.across == across:
        return scores
    return F.interpolate(scores, size=(stop - start, across), mode="bilinear")


def _merged(views: list[Tensor]) -> Tensor:
    if len(views) == 1:
        return views[0]
    total = views[0].softmax(dim=1)
    for scores in views[1:]:
        total += scores.softmax(dim=1)
    return (total / len(views)).clamp_min(torch.finfo(total.dtype).tiny).log()


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Returns where windows begin along a side: every stride, the last one flush with the end."""
    num_windows = max(0, -(-(length - crop) // stride)) + 1
    return [min(number * stride, length - crop) for number in range(num_windows)]


def _coverage(starts: list[int], crop: int, length: int) -> Tensor:
    counts = torch.zeros(length)
    for start in starts:
        counts[start : start + crop] += 1
    return counts
