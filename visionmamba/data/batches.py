"""From sets of images to batches, for one process or for one of several.

The order and the random changes are pure functions of (seed, epoch, place), so that neither the
number of workers, nor the number of processes, nor an interruption shows in the result.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visionmamba.data.image_files import UnreadableImageError
from visionmamba.data.sets import ImageSet
from visionmamba.data.transforms import ImageTransform

PADDING = -1
"""Label and index of a row that holds no picture, in batches of evaluation."""

_ORDER, _CHANGES = 0, 1  # purposes, so that the seeds of order and changes never meet
_REPEATED_MULTIPLE = 256  # an epoch of repeated augmentation is a multiple of this, as published
_MAX_REPLACEMENTS = 100


class Batch(NamedTuple):
    """What a model trains on or is evaluated on."""

    images: Tensor
    """(B, C, H, W) float32."""
    labels: Tensor
    """(B,) int64; `PADDING` where there is no picture."""
    indices: Tensor
    """(B,) int64: which pictures of the set these are; `PADDING` where there is none."""


def derive_seed(*parts: int) -> int:
    """Returns a 64-bit seed that is a pure function of its parts, all of them at least 0."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0])


class TrainBatches:
    """Shuffled batches of one epoch after another, resumable after any batch.

    Each pass yields what is left of an epoch and goes on to the next one. The last, incomplete step
    of an epoch is left out. Of the samples of a step every rank takes every num_ranks-th, so that
    together they train on the same pictures, however many they are.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: ImageTransform,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        repeats: int = 1,
        batches_per_step: int = 1,
    ) -> None:
        """Takes the set and how this process reads it.

        Args:
            images: an unreadable picture is replaced by the next readable one of the set when its
                on_unreadable is "skip".
            transform: makes tensors of equal shape.
            batch_size: samples of a batch of this rank.
            seed: of order and changes.
            num_workers: processes that prepare pictures; 0 prepares them in this one.
            rank: number of this process.
            num_ranks: processes that share each step.
            repeats: how often a chosen picture comes up, each time changed anew (repeated
                augmentation). An epoch has as many samples as without, rounded down to a multiple
                of 256 as in the published training, when there are so many.
            batches_per_step: batches of a rank whose gradients make one step.

        Raises:
            ValueError: a number is out of range, or the set is smaller than one step.
        """
        _check_numbers(batch_size, num_workers, rank, num_ranks)
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        if batches_per_step < 1:
            raise ValueError(f"batches_per_step must be at least 1, got {batches_per_step}")
        self._samples = _Samples(images, transform, seed=seed)
        self._batch_size = batch_size
        self._seed = seed
        self._num_workers = num_workers
        self._rank = rank
        self._num_ranks = num_ranks
        self._repeats = repeats
        step_size = batch_size * num_ranks * batches_per_step
        num_samples = _epoch_length(len(images), repeats)
        if num_samples < step_size:
            raise ValueError(
                f"batch_size={step_size} is larger than the training set of {len(images)} "
                "images; lower it"
            )
        self._epoch_samples = num_samples // step_size * step_size
        self._epoch = 0
        self._num_samples = 0
        self._unreadable = dict.fromkeys(images.unreadable)

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, wherever in it a pass begins."""
        return self._epoch_samples // (self._batch_size * self._num_ranks)

    def __iter__(self) -> Iterator[Batch]:
        for prepared in _load(self._samples, self._rest_of_epoch(), self._num_workers):
            self._num_samples += self._batch_size * self._num_ranks
            self._unreadable |= dict.fromkeys(prepared.unreadable)
            yield prepared.batch
        self.set_epoch(self._epoch + 1)

    @property
    def sampler(self) -> "TrainBatches":
        """Itself: training loops look here for `set_epoch`."""
        return self

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Why pictures were left out or replaced, one sentence each, as far as this rank met them.

        Known once the batch that holds the replacement has been given out.
        """
        return tuple(self._unreadable)

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of an epoch, unless that epoch is already under way."""
        if epoch != self._epoch:
            self._epoch, self._num_samples = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Returns the place in the data: the epoch and its samples given out over all ranks."""
        return {"epoch": self._epoch, "num_samples": self._num_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a place that `state_dict` returned, also with another number of ranks."""
        self._epoch, self._num_samples = state["epoch"], state["num_samples"]

    def _rest_of_epoch(self) -> Iterator[list["_Place"]]:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, _ORDER, self._epoch))
        order = self._samples.images.order(generator)
        size = self._batch_size * self._num_ranks
        for start in range(self._num_samples, self._epoch_samples - size + 1, size):
            numbers = range(start + self._rank, start + size, self._num_ranks)
            samples = order[torch.tensor(numbers) // self._repeats].tolist()
            yield [
                _Place(self._epoch, sample, number % self._repeats)
                for number, sample in zip(numbers, samples, strict=True)
            ]


class EvalBatches:
    """Batches of a whole set in its own order, without random changes.

    Each picture goes to exactly one rank; all ranks have equally many rows. Where that leaves a row
    over, and where a picture is unreadable and its set's on_unreadable is "skip", the row has the
    label and the index `PADDING` and an image of zeros, and does not count.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: ImageTransform,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Raises ValueError for a batch size below 1 and a rank that there is not."""
        _check_numbers(batch_size, num_workers, rank, num_ranks)
        self._samples = _Samples(images, transform, seed=None)
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._rank = rank
        self._num_ranks = num_ranks
        self._unreadable = dict.fromkeys(images.unreadable)

    def __len__(self) -> int:
        num_rows = -(-len(self._samples) // self._num_ranks)
        return -(-num_rows // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for prepared in _load(self._samples, self._places(), self._num_workers):
            self._unreadable |= dict.fromkeys(prepared.unreadable)
            yield prepared.batch

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Why pictures were left out, one sentence each, as far as this rank has met them."""
        return tuple(self._unreadable)

    def _places(self) -> Iterator[list["_Place"]]:
        samples = list(range(self._rank, len(self._samples), self._num_ranks))
        num_rows = -(-len(self._samples) // self._num_ranks)
        samples += [PADDING] * (num_rows - len(samples))
        size = self._batch_size
        for start in range(0, len(samples), size):
            yield [_Place(0, sample, 0) for sample in samples[start : start + size]]


class _Place(NamedTuple):
    epoch: int
    sample: int
    repetition: int


class _Sample(NamedTuple):
    image: Tensor
    label: int
    picture: int
    unreadable: tuple[str, ...] = ()


class _Failure(NamedTuple):
    """An unreadable file, on its way from a worker as a value so that its sentence survives."""

    message: str


class _Prepared(NamedTuple):
    batch: Batch
    unreadable: tuple[str, ...]


class _Samples(Dataset[_Sample | _Failure]):
    """Transformed pictures; with a seed, the changes of each follow from (seed, place)."""

    def __init__(self, images: ImageSet, transform: ImageTransform, *, seed: int | None) -> None:
        self.images = images
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: _Place) -> _Sample | _Failure:
        if self._seed is None:
            return self._unchanged(place.sample)
        unreadable: list[str] = []
        for offset in range(_MAX_REPLACEMENTS):
            index = (place.sample + offset) % len(self.images)
            try:
                image = self.images.image(index)
            except (UnreadableImageError, FileNotFoundError) as error:
                if self.images.on_unreadable == "fail":
                    return _Failure(_left_out_hint(error))
                unreadable.append(str(error))
                continue
            parts = (place.repetition,) if place.repetition else ()
            seed = derive_seed(self._seed, _CHANGES, place.epoch, place.sample, *parts)
            with _seeded(seed, torch_only=not self._transform.draws_beyond_torch):
                changed = self._transform(image)
            return _Sample(changed, self.images.labels[index], index, tuple(unreadable))
        return _Failure(
            f"{_MAX_REPLACEMENTS} images in a row cannot be opened; the first: {unreadable[0]}"
        )

    def _unchanged(self, index: int) -> _Sample | _Failure:
        if index == PADDING:
            return self._padding()
        try:
            image = self.images.image(index)
        except (UnreadableImageError, FileNotFoundError) as error:
            if self.images.on_unreadable == "fail":
                return _Failure(_left_out_hint(error))
            return self._padding(str(error))
        return _Sample(self._transform(image), self.images.labels[index], index)

    def _padding(self, *unreadable: str) -> _Sample:
        preprocessing = self._transform.preprocessing
        zeros = torch.zeros(preprocessing.num_channels, *preprocessing.size)
        return _Sample(zeros, PADDING, PADDING, unreadable)


@contextmanager
def _seeded(seed: int, *, torch_only: bool) -> Iterator[None]:
    """Seeds torch, and unless torch_only numpy and Python's random, and puts the states back."""
    torch_state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        if torch_only:  # numpy takes 0.1 ms to hand its state out and back
            yield
            return
        numpy_state, python_state = np.random.get_state(), random.getstate()
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
    finally:
        torch.default_generator.set_state(torch_state)


def _load(
    samples: _Samples, places: Iterator[list[_Place]], num_workers: int
) -> Iterator[_Prepared]:
    loader = DataLoader(
        samples,
        batch_sampler=places,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]  # so in every run on a GPU
        generator=torch.Generator(),  # keeps torch's global generator untouched
    )
    for prepared in loader:
        if isinstance(prepared, _Failure):
            raise UnreadableImageError(prepared.message)
        yield prepared


def _collate(samples: Sequence[_Sample | _Failure]) -> _Prepared | _Failure:
    good: list[_Sample] = []
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
        good.append(sample)
    batch = Batch(
        torch.stack([sample.image for sample in good]),
        torch.tensor([sample.label for sample in good]),
        torch.tensor([sample.picture for sample in good]),
    )
    return _Prepared(batch, tuple(why for sample in good for why in sample.unreadable))


def _left_out_hint(error: Exception) -> str:
    return f'{error}, or leave such files out with on_unreadable="skip"'


def _epoch_length(num_images: int, repeats: int) -> int:
    if repeats == 1 or num_images < _REPEATED_MULTIPLE:
        return num_images
    return num_images // _REPEATED_MULTIPLE * _REPEATED_MULTIPLE


def _check_numbers(batch_size: int, num_workers: int, rank: int, num_ranks: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must lie between 0 and num_ranks - 1 = {num_ranks - 1}, got {rank}")
