"""Pictures that are decoded once, stay on the device, and are cropped and changed there in batches.

Where a GPU takes thousands of pictures a second, processes cannot decode and change them in time. A
set of some GB fits into the GPU's memory as 8-bit pixels; there a batch is cut out, mirrored,
changed in colour and erased.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visionmamba.data.batches import Batch, EvalBatches, LabelledExamples
from visionmamba.data.erasing import AREAS, ASPECTS, TRIES, erase
from visionmamba.data.image_files import UnreadableImageError
from visionmamba.data.loading import (
    CHANGES,
    Place,
    Prepared,
    ShuffledPlaces,
    derive_seed,
    left_out_hint,
)
from visionmamba.data.memory import BatchTooLargeError
from visionmamba.data.sets import ImageSet
from visionmamba.data.transforms import RESAMPLING, Augmentation, Preprocessing, centred_box

_READ_AT_ONCE = 64
_TRIES = 10  # of a crop, as in torchvision
_ASPECTS = (3 / 4, 4 / 3)  # of a crop, width over height
_GRAY = (0.2989, 0.587, 0.114)
_STEP = np.uint64(0x9E3779B97F4A7C15)


class ResidentTrainBatches(ShuffledPlaces["ResidentBatch"]):
    """Batches of the same pictures in the same order as `TrainBatches`, changed on the device.

    A batch is numbers alone until it is moved: `batch.to(device)` is the `Batch`. Crops, mirroring,
    colours, rectangles and the noise in them are pure functions of (seed, epoch, picture), the same
    on every device. Changes are those of torchvision and timm but
    for the resize, which is bilinear without a filter: pictures much larger than the model's input
    are made smaller with one when they are read.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        batches_per_step: int = 1,
    ) -> None:
        """Takes the set, its preparation, and as `ShuffledPlaces` the rest.

        Reads the pictures when the first batch is asked for, with num_workers processes.

        Raises:
            ValueError: the augmentation has a change that is not made on the device, a number is
                out of range, or the set is smaller than one step.
        """
        unknown = {
            "auto_augment": augmentation.auto_augment is not None,
            "rotation_degrees": augmentation.rotation_degrees > 0,
            "translation": augmentation.translation > 0,
            "zoom": augmentation.zoom > 0,
        }
        if any(unknown.values()):
            names = ", ".join(f"augmentation.{name}" for name, is_set in unknown.items() if is_set)
            raise ValueError(
                f"resident pictures are cropped, mirrored, changed in colour and erased, nothing "
                f"else; leave {names} out, or resident"
            )
        super().__init__(
            LabelledExamples(images, preprocessing.build()),
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            rank=rank,
            num_ranks=num_ranks,
            repeats=augmentation.repeats,
            batches_per_step=batches_per_step,
        )
        self._images = images
        self._preprocessing = preprocessing
        self._augmentation = augmentation
        self._store: ResidentImages | None = None

    def _prepare(self, places: Iterator[list[Place]]) -> Iterator[Prepared["ResidentBatch"]]:
        if self._store is None:
            self._store = ResidentImages.read(
                self._images, self._preprocessing, num_workers=self._num_workers
            )
        store = self._store
        labels = np.asarray(self._images.labels)
        for batch in places:
            pictures = store.stand_ins[[place.sample for place in batch]]
            seeds = _seeds(batch, derive_seed(self._seed, CHANGES))
            changes = Changes.draw(
                store.sizes[pictures], seeds, self._preprocessing, self._augmentation
            )
            yield Prepared(
                ResidentBatch(
                    store=store,
                    preprocessing=self._preprocessing,
                    changes=changes,
                    labels=torch.from_numpy(labels[pictures]),
                    indices=torch.from_numpy(pictures),
                    noise_seeds=(_mixed(seeds) >> np.uint64(2)).tolist(),
                ),
                store.unreadable,
            )


class KeptEvalBatches:
    """Batches of evaluation, prepared at the first pass and kept in memory for the others."""

    def __init__(self, batches: EvalBatches) -> None:
        self._batches = batches
        self._kept: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        for batch in self._batches:
            # out of memory that is shared with another process, each tensor by an open file
            kept.append(Batch(*(one if one.is_pinned() else one.clone() for one in batch)))
            if len(kept) == len(self):  # now: whoever knows the length asks for no more
                self._kept = kept
            yield batch

    def workers_kept(self) -> AbstractContextManager[None]:
        """Keeps no process: there is one pass that needs them."""
        return nullcontext()

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Why pictures were left out, one sentence each, as far as this rank has met them."""
        return self._batches.unreadable


class ResidentImages:
    """Pictures of any sizes as 8-bit pixels in one tensor, on every device that asked for them."""

    def __init__(
        self,
        pixels: Tensor,
        sizes: NDArray[np.int64],
        stand_ins: NDArray[np.int64],
        unreadable: tuple[str, ...] = (),
    ) -> None:
        """Takes what was read.

        Args:
            pixels: (sum of heights x widths, C) uint8, picture after picture, row after row.
            sizes: (num_images, 2) heights and widths; 0 for one that cannot be read.
            stand_ins: (num_images,) which picture is taken for each: itself, or the next readable.
            unreadable: why pictures were replaced, one sentence each.
        """
        self.sizes = sizes
        self.stand_ins = stand_ins
        self.unreadable = unreadable
        ends = sizes.prod(1).cumsum()
        self._starts = torch.from_numpy(ends - sizes.prod(1))
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._pixels = pixels

    @classmethod
    def read(
        cls, images: ImageSet, preprocessing: Preprocessing, *, num_workers: int
    ) -> "ResidentImages":
        """Reads a whole set.

        Raises:
            UnreadableImageError: a picture cannot be opened and the set's on_unreadable is "fail",
                or none can be opened.
        """
        loader = DataLoader(
            _Decoded(images, preprocessing),
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator(),  # keeps torch's global generator untouched
        )
        pixels: list[Tensor] = []
        sizes: list[tuple[int, int]] = []
        unreadable: list[str] = []
        for some_pixels, some_sizes, failures in loader:
            if failures and images.on_unreadable == "fail":
                raise UnreadableImageError(failures[0])
            pixels.append(some_pixels.clone())  # out of memory that is shared with a process
            sizes += some_sizes
            unreadable += failures
        all_sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        readable = np.flatnonzero(all_sizes.prod(1))
        if not len(readable):
            raise UnreadableImageError(f"no image can be opened; the first: {unreadable[0]}")
        places = np.searchsorted(readable, np.arange(len(all_sizes)))
        stand_ins = readable[places % len(readable)]
        return cls(torch.cat(pixels), all_sizes, stand_ins, tuple(unreadable))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns pixels, starts of the pictures (num_images,) and their widths on a device.

        Raises:
            BatchTooLargeError: they do not fit into its memory.
        """
        if device not in self._on:
            widths = torch.from_numpy(self.sizes[:, 1])
            try:
                self._on[device] = (
                    self._pixels.to(device),
                    self._starts.to(device),
                    widths.to(device),
                )
            except torch.OutOfMemoryError as error:
                raise BatchTooLargeError(
                    f"the pictures take {self._pixels.numel() / 1e9:.1f} GB decoded and do not fit "
                    f"into the memory of {device}; train without resident"
                ) from error
        return self._on[device]


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is done to each picture of a batch; every array has the batch as first dimension."""

    boxes: NDArray[np.float32]
    """(B, 4) top, left, height, width in pixels of the picture: what fills the model's input."""
    flips: NDArray[np.bool_]
    """(B,) whether left and right are mirrored."""
    colours: NDArray[np.float32]
    """(B, 3) factors of brightness, contrast and saturation, made in this order."""
    erased: NDArray[np.int64]
    """(B, 4) top, left, height, width in pixels of the input that become noise; height 0: none."""

    @classmethod
    def draw(
        cls,
        sizes: NDArray[np.int64],
        seeds: NDArray[np.uint64],
        preprocessing: Preprocessing,
        augmentation: Augmentation,
    ) -> "Changes":
        """Draws the changes of pictures (B, 2) of some heights and widths, each from its seed."""
        drawn = _Uniforms(seeds)
        if augmentation.min_crop_area < 1:
            boxes = _random_boxes(sizes, augmentation.min_crop_area, drawn)
        else:
            corners = np.array([centred_box((int(h), int(w)), preprocessing) for h, w in sizes])
            left, top, right, bottom = corners.T
            boxes = np.stack([top, left, bottom - top, right - left], axis=1)
        flips = drawn(1)[:, 0] < 0.5 * augmentation.horizontal_flip
        span = augmentation.color_jitter
        colours = 1 + span * (2 * drawn(3) - 1)
        erased = np.zeros((len(sizes), 4), dtype=np.int64)
        if augmentation.erase_probability:
            chosen = drawn(1)[:, 0] < augmentation.erase_probability
            erased = _random_rectangles(preprocessing.size, drawn) * chosen[:, None]
        return cls(
            boxes=boxes.astype(np.float32),
            flips=flips,
            colours=colours.astype(np.float32),
            erased=erased,
        )


@dataclass(frozen=True, kw_only=True)
class ResidentBatch:
    """A batch before its pictures are made."""

    store: ResidentImages
    preprocessing: Preprocessing
    changes: Changes
    labels: Tensor
    """(B,) int64."""
    indices: Tensor
    """(B,) int64."""
    noise_seeds: Sequence[int]
    """B numbers that the noise in the rectangles follows from."""

    def to(self, device: torch.device | str, **_: Any) -> Batch:
        """Returns the batch on a device; training loops call this as they would for a tensor."""
        device = torch.device(device)
        images = self._cut_out(device)
        images = _with_colours(images, torch.from_numpy(self.changes.colours).to(device))
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.preprocessing.mean, device=device).view(shape)
        std = torch.tensor(self.preprocessing.std, device=device).view(shape)
        images = erase(images.sub_(mean).div_(std), self.changes.erased.tolist(), self.noise_seeds)
        return Batch(images, self.labels.to(device), self.indices.to(device))

    def _cut_out(self, device: torch.device) -> Tensor:
        """Returns (B, C, H, W) in 0..1: the boxes of the pictures, resized and mirrored."""
        pixels, starts, widths = self.store.on(device)
        indices = self.indices.to(device)
        height, width = self.preprocessing.size
        boxes = torch.from_numpy(self.changes.boxes).to(device)
        flips = torch.from_numpy(self.changes.flips).to(device)
        rows, row_weights = _between(boxes[:, 0], boxes[:, 2], height)
        columns, column_weights = _between(boxes[:, 1], boxes[:, 3], width)
        columns = torch.where(flips[:, None, None], columns.flip(1), columns)
        column_weights = torch.where(flips[:, None], column_weights.flip(1), column_weights)
        images: Tensor | None = None
        for i in range(2):
            line = starts[indices, None] + rows[..., i] * widths[indices, None]  # (B, H)
            down = row_weights if i else 1 - row_weights
            for j in range(2):
                right = column_weights if j else 1 - column_weights
                corner = pixels[line[:, :, None] + columns[:, None, :, j]]  # (B, H, W, C)
                weight = (down[:, :, None] * right[:, None, :]).unsqueeze(-1)
                part = corner * weight
                images = part if images is None else images.add_(part)
        assert images is not None
        return images.div_(255).permute(0, 3, 1, 2).contiguous()


class _Decoded(Dataset[tuple[Tensor, list[tuple[int, int]], list[str]]]):
    """Some pictures after one another as (pixels, C) uint8, their sizes, and what went wrong."""

    def __init__(self, images: ImageSet, preprocessing: Preprocessing) -> None:
        self._images = images
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return -(-len(self._images) // _READ_AT_ONCE)

    def __getitem__(self, number: int) -> tuple[Tensor, list[tuple[int, int]], list[str]]:
        if number >= len(self):
            raise IndexError(number)
        start = number * _READ_AT_ONCE
        pixels, sizes, failures = [], [], []
        for index in range(start, min(start + _READ_AT_ONCE, len(self._images))):
            try:
                picture = self._pixels(index)
            except (UnreadableImageError, FileNotFoundError) as error:
                is_fatal = self._images.on_unreadable == "fail"
                failures.append(left_out_hint(error) if is_fatal else str(error))
                picture = np.zeros((0, 0, self._preprocessing.num_channels), dtype=np.uint8)
            sizes.append((picture.shape[0], picture.shape[1]))
            pixels.append(torch.from_numpy(picture).flatten(0, 1))
        return torch.cat(pixels), sizes, failures

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        """Returns (h, w, C), made smaller where its sides are beyond what evaluation resizes to."""
        image = self._images.image(index).convert(self._preprocessing.channels)
        height, width = self._preprocessing.size
        fraction = self._preprocessing.crop_fraction
        scale = max(height / image.height, width / image.width) / fraction
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, RESAMPLING[self._preprocessing.interpolation])
        pixels = np.array(image, dtype=np.uint8)
        return pixels if pixels.ndim == 3 else pixels[..., None]


class _Uniforms:
    """Numbers in [0, 1) for each of some seeds: splitmix64 (Steele, Lea and Flood, 2014)."""

    def __init__(self, seeds: NDArray[np.uint64]) -> None:
        self._state = seeds.astype(np.uint64)

    def __call__(self, count: int) -> NDArray[np.float64]:
        """Returns the next (num_seeds, count)."""
        steps = np.arange(1, count + 1, dtype=np.uint64) * _STEP
        states = self._state[:, None] + steps
        self._state = states[:, -1]
        return (_mixed(states) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _seeds(places: Sequence[Place], seed: int) -> NDArray[np.uint64]:
    """Returns (num_places,): a seed of each picture, epoch and repetition."""
    seeds = np.full(len(places), seed, dtype=np.uint64)
    for numbers in (
        [place.epoch for place in places],
        [place.sample for place in places],
        [place.repetition for place in places],
    ):
        seeds = _mixed(seeds + (np.array(numbers, dtype=np.uint64) + np.uint64(1)) * _STEP)
    return seeds


def _random_boxes(
    sizes: NDArray[np.int64], min_area: float, drawn: _Uniforms
) -> NDArray[np.float64]:
    """Returns (B, 4) boxes of whole pixels, drawn as by torchvision's RandomResizedCrop."""
    heights, widths = sizes[:, :1], sizes[:, 1:]
    areas = heights * widths * _scaled(drawn(_TRIES), min_area, 1.0)
    aspects = np.exp(_scaled(drawn(_TRIES), *np.log(_ASPECTS)))
    box_widths = np.round(np.sqrt(areas * aspects))
    box_heights = np.round(np.sqrt(areas / aspects))
    fits = (box_widths > 0) & (box_widths <= widths) & (box_heights > 0) & (box_heights <= heights)
    first, none = _first_true(fits)
    box_height = np.take_along_axis(box_heights, first, 1)[:, 0]
    box_width = np.take_along_axis(box_widths, first, 1)[:, 0]
    height, width = heights[:, 0], widths[:, 0]
    aspect = np.clip(width / height, *_ASPECTS)  # the largest in the middle that is not too long
    box_height = np.where(none, np.minimum(height, np.round(width / aspect)), box_height)
    box_width = np.where(none, np.minimum(width, np.round(height * aspect)), box_width)
    at = np.where(none[:, None], 0.5, drawn(2))
    top = np.floor(at[:, 0] * (height - box_height + ~none))
    left = np.floor(at[:, 1] * (width - box_width + ~none))
    return np.stack([top, left, box_height, box_width], axis=1)


def _random_rectangles(size: tuple[int, int], drawn: _Uniforms) -> NDArray[np.int64]:
    """Returns (B, 4) rectangles of whole pixels, drawn as by timm's RandomErasing."""
    height, width = size
    areas = height * width * _scaled(drawn(TRIES), *AREAS)
    aspects = np.exp(_scaled(drawn(TRIES), *np.log(ASPECTS)))
    heights, widths = np.round(np.sqrt(areas * aspects)), np.round(np.sqrt(areas / aspects))
    fits = (heights < height) & (widths < width)
    first, none = _first_true(fits)
    chosen_height = np.take_along_axis(heights, first, 1)[:, 0]
    chosen_width = np.take_along_axis(widths, first, 1)[:, 0]
    at = drawn(2)
    top = np.floor(at[:, 0] * (height - chosen_height + 1))
    left = np.floor(at[:, 1] * (width - chosen_width + 1))
    rectangles = np.stack([top, left, chosen_height, chosen_width], axis=1)
    rectangles[none] = 0
    return rectangles.astype(np.int64)


def _first_true(fits: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Returns (B, 1): the first column that fits in each row, and (B,) the rows without one."""
    first: NDArray[np.intp] = np.argmax(fits, axis=1)[:, None]
    none: NDArray[np.bool_] = np.logical_not(np.any(fits, axis=1))
    return first, none


def _scaled(uniforms: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * uniforms


def _between(starts: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the neighbours (B, count, 2) of `count` centres in spans, and the second's share."""
    steps = torch.arange(count, device=starts.device) + 0.5
    centres = starts[:, None] + steps * (lengths / count)[:, None] - 0.5
    last = (starts + lengths).ceil() - 1
    centres = torch.minimum(torch.maximum(centres, starts.floor()[:, None]), last[:, None])
    first = centres.floor()
    second = torch.minimum(first + 1, last[:, None])
    return torch.stack([first, second], dim=-1).long(), centres - first


def _with_colours(images: Tensor, factors: Tensor) -> Tensor:
    """Returns pictures in 0..1 with other brightness, contrast and saturation."""
    brightness, contrast, saturation = factors.view(*factors.shape, 1, 1, 1).unbind(1)
    images = (images * brightness).clamp_(0, 1)
    images = _blended(images, _gray(images).mean((1, 2, 3), keepdim=True), contrast)
    return _blended(images, _gray(images), saturation)


def _blended(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + other * (1 - factor)).clamp_(0, 1)


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(_GRAY, device=images.device).view(1, -1, 1, 1)
    return (images * weights).sum(1, keepdim=True)
