"""Batches of labelled images, for one process or for one of several."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from visionmamba.data.erasing import Rectangle
from visionmamba.data.loading import (
    PADDING,
    OrderedBatches,
    Place,
    ShuffledBatches,
    Unstacked,
    check_numbers,
)
from visionmamba.data.sets import ImageSet, OnUnreadable
from visionmamba.data.transforms import Changed, ImageTransform, Preprocessing


class Batch(NamedTuple):
    """What a model trains on or is evaluated on."""

    images: Tensor
    """(B, C, H, W) float32."""
    labels: Tensor
    """(B,) int64; `PADDING` where there is no picture."""
    indices: Tensor
    """(B,) int64: which pictures of the set these are; `PADDING` where there is none."""


class ChangedImages(NamedTuple):
    """A batch of training as bytes, a quarter of the size; `to` makes a `Batch` of it."""

    pixels: Tensor
    """(B, H, W, C) uint8."""
    labels: Tensor
    """(B,) int64."""
    indices: Tensor
    """(B,) int64: which pictures of the set these are."""
    erased: tuple[Rectangle, ...]
    """B rectangles that will become noise."""
    noise_seeds: tuple[int, ...]
    """B numbers that the noise follows from."""
    preprocessing: Preprocessing

    def to(self, device: torch.device | str, **_: Any) -> Batch:
        """Returns the batch on a device; training loops call this as they would for a tensor."""
        pixels, labels, indices = (
            one.to(device, non_blocking=True) for one in (self.pixels, self.labels, self.indices)
        )
        images = self.preprocessing.finish(pixels, self.erased, self.noise_seeds)
        return Batch(images, labels, indices)


class TrainBatches(ShuffledBatches[ChangedImages]):
    """Shuffled batches of one epoch after another, resumable after any batch.

    A batch is bytes until it is moved: `batch.to(device)` is the `Batch`.

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
        """Takes the set, a transform to tensors of equal shape, and as `ShuffledBatches` the rest.

        Raises:
            ValueError: a number is out of range, or the set is smaller than one step.
        """
        super().__init__(
            _ChangedExamples(images, transform),
            Unstacked(partial(_put_together, transform.preprocessing)),
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            rank=rank,
            num_ranks=num_ranks,
            repeats=repeats,
            batches_per_step=batches_per_step,
        )


class EvalBatches(OrderedBatches[Batch]):
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
        check_numbers(batch_size, num_workers, rank, num_ranks)
        samples = list(range(rank, len(images), num_ranks))
        num_rows = -(-len(images) // num_ranks)
        samples += [PADDING] * (num_rows - len(samples))
        super().__init__(
            LabelledExamples(images, transform),
            Batch,
            [
                [Place(sample) for sample in samples[start : start + batch_size]]
                for start in range(0, num_rows, batch_size)
            ],
            num_workers=num_workers,
        )


class LabelledExamples:
    """Transformed pictures and their labels."""

    def __init__(self, images: ImageSet, transform: ImageTransform) -> None:
        self._images = images
        self._transform = transform
        self.unreadable = images.unreadable
        self.on_unreadable: OnUnreadable = images.on_unreadable
        self.draws_beyond_torch = transform.draws_beyond_torch

    def __len__(self) -> int:
        return len(self._images)

    def example(self, index: int) -> tuple[Tensor, Any]:
        image = self._images.image(index)
        return self._transform(image), torch.tensor(self._images.labels[index])

    def padding(self, stand_in: int) -> tuple[Tensor, Tensor]:
        preprocessing = self._transform.preprocessing
        zeros = torch.zeros(preprocessing.num_channels, *preprocessing.size)
        return zeros, torch.tensor(PADDING)

    def order(self, generator: torch.Generator) -> Tensor:
        return self._images.order(generator)


class _ChangedExamples(LabelledExamples):
    """Changed pictures as bytes, each with what else is known of it."""

    def example(self, index: int) -> tuple[Tensor, Any]:
        changed = self._transform.change(self._images.image(index))
        return torch.from_numpy(changed.pixels), (changed, self._images.labels[index])


def _put_together(
    preprocessing: Preprocessing,
    pixels: Sequence[Tensor],
    others: Sequence[tuple[Changed, int]],
    indices: Tensor,
) -> ChangedImages:
    return ChangedImages(
        pixels=default_collate(list(pixels)),  # in a worker at once in memory that is shared
        labels=torch.tensor([label for _, label in others]),
        indices=indices,
        erased=tuple(changed.erased for changed, _ in others),
        noise_seeds=tuple(changed.noise_seed for changed, _ in others),
        preprocessing=preprocessing,
    )
