"""How examples of any kind become batches: order, ranks, resumption, workers, unreadable files.

The order and the random changes are pure functions of (seed, epoch, place), so that neither the
number of workers, nor the number of processes, nor an interruption shows in the result.
"""

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from visionmamba.data.image_files import UnreadableImageError
from visionmamba.data.sets import OnUnreadable

PADDING = -1
"""Index of a row that holds no picture, in batches of evaluation; also its label."""

BatchType = TypeVar("BatchType")
MakeBatch = Callable[[Tensor, Tensor, Tensor], BatchType]
"""Makes a batch of images, targets and indices, each with the batch as first dimension."""


@dataclass(frozen=True)
class Unstacked(Generic[BatchType]):
    """Makes a batch of examples that differ in size, or whose targets are no tensors."""

    make: Callable[[Sequence[Tensor], Sequence[Any], Tensor], BatchType]
    """Takes the images, the targets, and the indices as one tensor."""


_ORDER, CHANGES = 0, 1  # purposes, so that the seeds of order and changes never meet
_REPEATED_MULTIPLE = 256  # an epoch of repeated augmentation is a multiple of this, as published
_MAX_REPLACEMENTS = 100
_GRACE_SECONDS = 20  # what a signalled worker leaves the training for its checkpoint


class Examples(Protocol):
    """Pictures with their targets, prepared for a model; what batches are made of."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Files that were left out from the start, each with the reason."""

    @property
    def on_unreadable(self) -> OnUnreadable:
        """Whether batches stop at a picture that cannot be opened, or do without it."""

    @property
    def draws_beyond_torch(self) -> bool:
        """Whether random changes draw from numpy's and Python's generators too."""

    def __len__(self) -> int: ...

    def example(self, index: int) -> tuple[Tensor, Any]:
        """Returns image and target; `UnreadableImageError` or `FileNotFoundError` for a bad file.

        Its random changes come from the global generators.
        """

    def padding(self, stand_in: int) -> tuple[Tensor, Any]:
        """Returns image and target of a row without a picture, shaped as those of a picture."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Returns (num_examples,) int64: the order of a pass of training."""


class Place(NamedTuple):
    """What to load."""

    sample: int
    """Index of a picture, or `PADDING`."""
    epoch: int = 0
    repetition: int = 0
    """How often the picture came up before in this epoch."""
    stand_in: int = 0
    """Picture whose shape a row without a picture has."""


def derive_seed(*parts: int) -> int:
    """Returns a 64-bit seed that is a pure function of its parts, all of them at least 0."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0])


class ShuffledPlaces(Generic[BatchType]):
    """Shuffled batches of one epoch after another, resumable after any batch.

    Each pass yields what is left of an epoch and goes on to the next one. The last, incomplete step
    of an epoch is left out. Of the samples of a step every rank takes every num_ranks-th, so that
    together they train on the same pictures, however many they are. How batches are made of places
    is for subclasses to say.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        repeats: int = 1,
        batches_per_step: int = 1,
        epoch_steps: int | None = None,
    ) -> None:
        """Takes the examples and how this process reads them.

        Args:
            examples: their number and order; an unreadable picture is replaced by the next readable
                one when their on_unreadable is "skip".
            batch_size: samples of a batch of this rank.
            seed: of order and changes.
            num_workers: processes that prepare pictures; 0 prepares them in this one.
            rank: number of this process.
            num_ranks: processes that share each step.
            repeats: how often a chosen picture comes up, each time changed anew (repeated
                augmentation). An epoch has as many samples as without, rounded down to a multiple
                of 256 as in the published training, when there are so many.
            batches_per_step: batches of a rank whose gradients make one step.
            epoch_steps: steps of an epoch, which goes through the set as often as they need, in a
                new order each time; None goes through it once.

        Raises:
            ValueError: a number is out of range, or the set is empty or smaller than one step.
        """
        check_numbers(batch_size, num_workers, rank, num_ranks)
        for name, value in (("repeats", repeats), ("batches_per_step", batches_per_step)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if epoch_steps is not None and (epoch_steps < 1 or repeats > 1):
            raise ValueError(
                f"epoch_steps must be at least 1, and repeats 1 beside it, got {epoch_steps} and "
                f"{repeats}"
            )
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._num_workers = num_workers
        self._rank = rank
        self._num_ranks = num_ranks
        self._repeats = repeats
        step_size = batch_size * num_ranks * batches_per_step
        if epoch_steps is None:
            num_samples = _epoch_length(len(examples), repeats)
            if num_samples < step_size:
                raise ValueError(
                    f"batch_size={step_size} is larger than the training set of {len(examples)} "
                    "images; lower it"
                )
            epoch_steps = num_samples // step_size
        elif not len(examples):
            raise ValueError("the training set holds no images; add some")
        self._epoch_samples = epoch_steps * step_size
        self._epoch = 0
        self._num_samples = 0
        self._unreadable = dict.fromkeys(examples.unreadable)

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, wherever in it a pass begins."""
        return self._epoch_samples // (self._batch_size * self._num_ranks)

    def __iter__(self) -> Iterator[BatchType]:
        for prepared in self._prepare(self._rest_of_epoch()):
            self._num_samples += self._batch_size * self._num_ranks
            self._unreadable |= dict.fromkeys(prepared.unreadable)
            yield prepared.batch
        self.set_epoch(self._epoch + 1)

    @property
    def sampler(self) -> "ShuffledPlaces[BatchType]":
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

    def workers_kept(self) -> AbstractContextManager[None]:
        """Keeps the processes that prepare pictures from one pass to the next, in its body."""
        return nullcontext()

    def _rest_of_epoch(self) -> Iterator[list[Place]]:
        pass_size = len(self._examples) * self._repeats
        size = self._batch_size * self._num_ranks
        orders: dict[int, Tensor] = {}
        for start in range(self._num_samples, self._epoch_samples - size + 1, size):
            places = []
            for number in range(start + self._rank, start + size, self._num_ranks):
                num_passes, place = divmod(number, pass_size)
                if num_passes not in orders:
                    orders = {num_passes: self._order(num_passes)}
                sample = int(orders[num_passes][place // self._repeats])
                repetition = num_passes * self._repeats + place % self._repeats
                places.append(Place(sample, self._epoch, repetition))
            yield places

    def _order(self, num_passes: int) -> Tensor:
        parts = (num_passes,) if num_passes else ()
        generator = torch.Generator().manual_seed(
            derive_seed(self._seed, _ORDER, self._epoch, *parts)
        )
        return self._examples.order(generator)

    def _prepare(self, places: Iterator[list[Place]]) -> "Iterator[Prepared[BatchType]]":
        """Yields the batch of each list of places."""
        raise NotImplementedError


class ShuffledBatches(ShuffledPlaces[BatchType]):
    """Shuffled batches whose pictures are opened and changed one by one, also in other processes.

    Takes `make_batch`, which puts them together, and the arguments of `ShuffledPlaces`.
    """

    def __init__(
        self,
        examples: Examples,
        make_batch: MakeBatch[BatchType] | Unstacked[BatchType],
        *,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(examples, seed=seed, **options)
        self._loader = _Loader(_Examples(examples, seed=seed), make_batch, self._num_workers)

    @override
    def workers_kept(self) -> AbstractContextManager[None]:
        return self._loader.workers_kept()

    @override
    def _prepare(self, places: Iterator[list[Place]]) -> "Iterator[Prepared[BatchType]]":
        return self._loader.load(places)


class OrderedBatches(Generic[BatchType]):
    """The same batches at every pass, without random changes."""

    def __init__(
        self,
        examples: Examples,
        make_batch: MakeBatch[BatchType] | Unstacked[BatchType],
        places: Sequence[Sequence[Place]],
        *,
        num_workers: int = 0,
        unreadable: Sequence[str] = (),
    ) -> None:
        """Takes the examples, and the places of each batch of this rank.

        An unreadable picture's row is padding when the examples' on_unreadable is "skip".
        """
        self._loader = _Loader(_Examples(examples, seed=None), make_batch, num_workers)
        self._places = places
        self._unreadable = dict.fromkeys((*examples.unreadable, *unreadable))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[BatchType]:
        for prepared in self._loader.load(map(list, self._places)):
            self._unreadable |= dict.fromkeys(prepared.unreadable)
            yield prepared.batch

    def workers_kept(self) -> AbstractContextManager[None]:
        """Keeps the processes that prepare pictures from one pass to the next, in its body."""
        return self._loader.workers_kept()

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Why pictures were left out, one sentence each, as far as this rank has met them."""
        return tuple(self._unreadable)


def check_numbers(batch_size: int, num_workers: int, rank: int, num_ranks: int) -> None:
    """Raises ValueError for a batch size below 1 and a rank that there is not."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must lie between 0 and num_ranks - 1 = {num_ranks - 1}, got {rank}")


def left_out_hint(error: Exception) -> str:
    """Returns the error's sentence with what else can be done about an unreadable file."""
    return f'{error}, or leave such files out with on_unreadable="skip"'


class _Sample(NamedTuple):
    image: Tensor
    target: Any
    picture: int
    unreadable: tuple[str, ...] = ()


class _Failure(NamedTuple):
    """An unreadable file, on its way from a worker as a value so that its sentence survives."""

    message: str


class Prepared(NamedTuple, Generic[BatchType]):
    """A batch, and why pictures were replaced in it, one sentence each."""

    batch: BatchType
    unreadable: tuple[str, ...]


class _Examples(Dataset[_Sample | _Failure]):
    """Prepared pictures; with a seed, the changes of each follow from (seed, place)."""

    def __init__(self, examples: Examples, *, seed: int | None) -> None:
        self.examples = examples
        self._seed = seed

    def __getitem__(self, place: Place) -> _Sample | _Failure:
        if self._seed is None:
            return self._unchanged(place)
        unreadable: list[str] = []
        for offset in range(_MAX_REPLACEMENTS):
            index = (place.sample + offset) % len(self.examples)
            parts = (place.repetition,) if place.repetition else ()
            seed = derive_seed(self._seed, CHANGES, place.epoch, place.sample, *parts)
            try:
                with _seeded(seed, torch_only=not self.examples.draws_beyond_torch):
                    image, target = self.examples.example(index)
            except (UnreadableImageError, FileNotFoundError) as error:
                if self.examples.on_unreadable == "fail":
                    return _Failure(left_out_hint(error))
                unreadable.append(str(error))
                continue
            return _Sample(image, target, index, tuple(unreadable))
        return _Failure(
            f"{_MAX_REPLACEMENTS} images in a row cannot be opened; the first: {unreadable[0]}"
        )

    def _unchanged(self, place: Place) -> _Sample | _Failure:
        if place.sample == PADDING:
            return _Sample(*self.examples.padding(place.stand_in), PADDING)
        try:
            return _Sample(*self.examples.example(place.sample), place.sample)
        except (UnreadableImageError, FileNotFoundError) as error:
            if self.examples.on_unreadable == "fail":
                return _Failure(left_out_hint(error))
            return _Sample(*self.examples.padding(place.sample), PADDING, (str(error),))


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


class _Loader(Generic[BatchType]):
    """Prepares lists of places, also in other processes."""

    def __init__(
        self,
        examples: _Examples,
        make_batch: MakeBatch[BatchType] | Unstacked[BatchType],
        num_workers: int,
    ) -> None:
        self._examples = examples
        self._collate = partial(_collate, make_batch)
        self._num_workers = num_workers
        self._places = _NextPlaces()
        self._keeps_workers = False
        self._kept: DataLoader[_Sample | _Failure] | None = None

    def load(self, places: Iterator[list[Place]]) -> "Iterator[Prepared[BatchType]]":
        """Yields the batch of each list of places; one pass at a time where workers are kept."""
        loader = self._new() if self._kept is None else self._kept
        if self._keeps_workers:
            self._kept = loader
        self._places.next = places
        for prepared in loader:
            if isinstance(prepared, _Failure):
                raise UnreadableImageError(prepared.message)
            yield prepared

    @contextmanager
    def workers_kept(self) -> Iterator[None]:
        """Starts the processes of a body once; a signal to all of them leaves them time."""
        self._keeps_workers = self._num_workers > 0
        try:
            yield
        finally:
            kept, self._kept, self._keeps_workers = self._kept, None, False
            iterator: Any = getattr(kept, "_iterator", None)
            if iterator is not None:  # a pass that was broken off would hold them
                iterator._shutdown_workers()

    def _new(self) -> "DataLoader[_Sample | _Failure]":
        return DataLoader(
            self._examples,
            batch_sampler=self._places,
            collate_fn=self._collate,
            num_workers=self._num_workers,
            persistent_workers=self._keeps_workers,
            worker_init_fn=_outlive_signals if self._keeps_workers else None,
            pin_memory=torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]  # so in every run on a GPU
            generator=torch.Generator(),  # keeps torch's global generator untouched
        )


class _NextPlaces:
    """What the next pass over a loader loads."""

    next: Iterator[list[Place]] = iter(())

    def __iter__(self) -> Iterator[list[Place]]:
        return self.next


def _outlive_signals(worker: int) -> None:
    """Leaves stopping to the process that trains: launchers signal all processes of a job.

    A worker that died would break off the step, or the checkpoint, that the training ends with.
    """

    def end_later(number: int, frame: FrameType | None) -> None:
        signal.alarm(_GRACE_SECONDS)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, end_later)


def _collate(
    make_batch: MakeBatch[BatchType] | Unstacked[BatchType], samples: Sequence[_Sample | _Failure]
) -> "Prepared[BatchType] | _Failure":
    good: list[_Sample] = []
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
        good.append(sample)
    images, targets = [sample.image for sample in good], [sample.target for sample in good]
    indices = torch.tensor([sample.picture for sample in good])
    if isinstance(make_batch, Unstacked):
        batch = make_batch.make(images, targets, indices)
    else:
        batch = make_batch(torch.stack(images), torch.stack(targets), indices)
    return Prepared(batch, tuple(why for sample in good for why in sample.unreadable))


def _epoch_length(num_images: int, repeats: int) -> int:
    if repeats == 1 or num_images < _REPEATED_MULTIPLE:
        return num_images
    return num_images // _REPEATED_MULTIPLE * _REPEATED_MULTIPLE
