"""From sets of images to batches.

The order and the random changes are pure functions of (seed, epoch, index), so that neither the
number of workers nor an interruption shows in the result.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visionmamba.data.image_files import UnreadableImageError
from visionmamba.data.sets import ImageSet
from visionmamba.data.transforms import ImageTransform

_ORDER, _CHANGES = 0, 1  # purposes, so that the seeds of order and changes never meet


class Batch(NamedTuple):
    """What a model trains on or is evaluated on."""

    images: Tensor
    """(B, C, H, W) float32."""
    labels: Tensor
    """(B,) int64."""
    indices: Tensor
    """(B,) int64: which pictures of the set these are."""


class _Place(NamedTuple):
    epoch: int
    sample: int


class _Failure(NamedTuple):
    """An unreadable file, on its way from a worker as a value so that its sentence survives."""

    message: str


def derive_seed(*parts: int) -> int:
    """Returns a 64-bit seed that is a pure function of its parts, all of them at least 0."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0])


class TrainBatches:
    """Shuffled batches of one epoch after another, resumable after any batch.

    Each pass yields what is left of an epoch and goes on to the next one. The last, incomplete
    batch of an epoch is left out.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: ImageTransform,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
    ) -> None:
        """Raises ValueError when the set is smaller than one batch."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        if len(images) < batch_size:
            raise ValueError(
                f"batch_size={batch_size} is larger than the training set of {len(images)} "
                "images; lower it"
            )
        self._samples = _Samples(images, transform, seed=seed)
        self._batch_size = batch_size
        self._seed = seed
        self._num_workers = num_workers
        self._epoch = 0
        self._num_done = 0

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever in it a pass begins."""
        return len(self._samples) // self._batch_size

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self._samples,
            batch_sampler=self._rest_of_epoch(),
            collate_fn=_collate,
            num_workers=self._num_workers,
            generator=torch.Generator(),  # keeps torch's global generator untouched
        )
        for batch in loader:
            self._num_done += 1
            yield _or_raise(batch)
        self.set_epoch(self._epoch + 1)

    @property
    def sampler(self) -> "TrainBatches":
        """Itself: training loops look here for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of an epoch, unless that epoch is already under way."""
        if epoch != self._epoch:
            self._epoch, self._num_done = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Returns the place in the data: the epoch and the batches of it already given out."""
        return {"epoch": self._epoch, "num_done": self._num_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a place that `state_dict` returned."""
        self._epoch, self._num_done = state["epoch"], state["num_done"]

    def _rest_of_epoch(self) -> list[list[_Place]]:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, _ORDER, self._epoch))
        order = torch.randperm(len(self._samples), generator=generator).tolist()
        size = self._batch_size
        return [
            [_Place(self._epoch, index) for index in order[number * size : (number + 1) * size]]
            for number in range(self._num_done, len(self))
        ]


class EvalBatches:
    """Batches of a whole set in its own order, without random changes."""

    def __init__(
        self,
        images: ImageSet,
        transform: ImageTransform,
        *,
        batch_size: int,
        num_workers: int = 0,
    ) -> None:
        """Raises ValueError for a batch size below 1."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        self._samples = _Samples(images, transform, seed=None)
        self._batch_size = batch_size
        self._num_workers = num_workers

    def __len__(self) -> int:
        return -(-len(self._samples) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        places = [_Place(0, index) for index in range(len(self._samples))]
        size = self._batch_size
        loader = DataLoader(
            self._samples,
            batch_sampler=[places[start : start + size] for start in range(0, len(places), size)],
            collate_fn=_collate,
            num_workers=self._num_workers,
            generator=torch.Generator(),
        )
        for batch in loader:
            yield _or_raise(batch)


class _Samples(Dataset[tuple[Tensor, int, int] | _Failure]):
    """Transformed pictures; with a seed, the changes of each follow from (seed, epoch, index)."""

    def __init__(self, images: ImageSet, transform: ImageTransform, *, seed: int | None) -> None:
        self._images = images
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: _Place) -> tuple[Tensor, int, int] | _Failure:
        try:
            image = self._images.image(place.sample)
        except (UnreadableImageError, FileNotFoundError) as error:
            return _Failure(str(error))
        label = self._images.labels[place.sample]
        if self._seed is None:
            return self._transform(image), label, place.sample
        state = torch.default_generator.get_state()
        try:
            torch.default_generator.manual_seed(
                derive_seed(self._seed, _CHANGES, place.epoch, place.sample)
            )
            return self._transform(image), label, place.sample
        finally:
            torch.default_generator.set_state(state)


def _collate(samples: Sequence[tuple[Tensor, int, int] | _Failure]) -> Batch | _Failure:
    tensors: list[Tensor] = []
    labels: list[int] = []
    indices: list[int] = []
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
        tensors.append(sample[0])
        labels.append(sample[1])
        indices.append(sample[2])
    return Batch(torch.stack(tensors), torch.tensor(labels), torch.tensor(indices))


def _or_raise(batch: Batch | _Failure) -> Batch:
    if isinstance(batch, _Failure):
        raise UnreadableImageError(
            f'{batch.message}, or leave such files out with on_unreadable="skip"'
        )
    return batch
