"""Batches of pictures with objects, for one process or for one of several."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from visionmamba.data.box_transforms import BoxTransform, DetectionTarget
from visionmamba.data.coco import DetectionSet
from visionmamba.data.loading import (
    PADDING,
    OrderedBatches,
    Place,
    ShuffledBatches,
    Unstacked,
    check_numbers,
)
from visionmamba.data.sets import OnUnreadable

_SMALL: tuple[Literal["boxes", "labels", "area", "iscrowd"], ...] = (
    "boxes", "labels", "area", "iscrowd",
)  # fmt: skip


class DetectionBatch(NamedTuple):
    """What a detector trains on or is evaluated on."""

    images: Sequence[Tensor]
    """B of (3, H, W) float32; in training all as large as a cut, in evaluation each its own."""
    targets: Sequence[DetectionTarget]
    """B of them."""
    indices: Tensor
    """(B,) int64: which pictures of the set these are; `PADDING` where there is none."""


class DetectionTrainBatches(ShuffledBatches[DetectionBatch]):
    """Shuffled batches of one epoch after another, resumable after any batch.

    Each pass yields what is left of an epoch and goes on to the next one. The last, incomplete step
    of an epoch is left out. Of the samples of a step every rank takes every num_ranks-th, so that
    together they train on the same pictures, however many they are.
    """

    def __init__(
        self,
        images: DetectionSet,
        transform: BoxTransform,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        batches_per_step: int = 1,
        epoch_steps: int | None = None,
    ) -> None:
        """Takes the set, a transform of training, and as `ShuffledBatches` the rest.

        Raises:
            ValueError: the transform is one of evaluation, a number is out of range, or the set is
                smaller than one step.
        """
        if transform.augmentation is None:
            raise ValueError("training needs pictures of one size; build() with an augmentation")
        super().__init__(
            _ObjectExamples(images, transform),
            Unstacked(_make_batch),
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            rank=rank,
            num_ranks=num_ranks,
            batches_per_step=batches_per_step,
            epoch_steps=epoch_steps,
        )


class DetectionEvalBatches(OrderedBatches[DetectionBatch]):
    """Batches of a whole set in its own order, without random changes.

    Each picture goes to exactly one rank; all ranks have equally many rows. Where that leaves a row
    over, and where a picture is unreadable and its set's on_unreadable is "skip", the row has the
    index `PADDING`, an image of zeros and no objects, and does not count.
    """

    def __init__(
        self,
        images: DetectionSet,
        transform: BoxTransform,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Raises ValueError for a batch size below 1, a rank that there is not, and a transform of
        training."""
        if transform.augmentation is not None:
            raise ValueError("evaluation changes nothing at random; build() without augmentation")
        check_numbers(batch_size, num_workers, rank, num_ranks)
        places = [Place(sample) for sample in range(rank, len(images), num_ranks)]
        num_rows = -(-len(images) // num_ranks)
        places += [Place(PADDING)] * (num_rows - len(places))
        super().__init__(
            _ObjectExamples(images, transform),
            Unstacked(_make_batch),
            [places[start : start + batch_size] for start in range(0, num_rows, batch_size)],
            num_workers=num_workers,
        )


def _make_batch(
    images: Sequence[Tensor], targets: Sequence[DetectionTarget], indices: Tensor
) -> DetectionBatch:
    """Returns a batch whose small tensors share memory: each of its own would cost a worker, which
    passes them on, and this process one open file."""
    counts = [len(target["labels"]) for target in targets]
    joined = [target.copy() for target in targets]
    for name in _SMALL:
        parts = torch.split(torch.cat([target[name] for target in targets]), counts)
        for target, part in zip(joined, parts, strict=True):
            target[name] = part
    if len({image.shape for image in images}) == 1:
        images = torch.stack(list(images)).unbind()
    return DetectionBatch(images, joined, indices)


class _ObjectExamples:
    """Pictures and objects, transformed together."""

    draws_beyond_torch = False

    def __init__(self, images: DetectionSet, transform: BoxTransform) -> None:
        self._images = images
        self._transform = transform
        self.unreadable = images.unreadable
        self.on_unreadable: OnUnreadable = images.on_unreadable

    def __len__(self) -> int:
        return len(self._images)

    def example(self, index: int) -> tuple[Tensor, DetectionTarget]:
        return self._transform(self._images.image(index), self._images.objects(index))

    def padding(self, stand_in: int) -> tuple[Tensor, DetectionTarget]:
        size = self._images.size(stand_in)
        target: DetectionTarget = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "area": torch.zeros(0),
            "iscrowd": torch.zeros(0, dtype=torch.int64),
            "image_id": PADDING,
            "size": size,
        }
        if self._images.has_masks:
            target["run_lengths"] = ()
        return torch.zeros(3, *self._transform.preprocessing.resized(*size)), target

    def order(self, generator: torch.Generator) -> Tensor:
        return self._images.order(generator)
